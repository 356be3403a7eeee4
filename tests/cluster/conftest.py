"""A real Slurm: a controller and two nodes on this host, for as long as the tests last."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT

TOOL = ROOT / "tools/cluster.py"
Tool = Callable[..., subprocess.CompletedProcess[str]]


@contextmanager
def running(*words: str) -> Iterator[Tool]:
    """A cluster of its own, started with these words; what runs meanwhile asks it."""
    root = Path(tempfile.mkdtemp(prefix="rs"))  # short: a socket's path has 107 characters

    def tool(action: str, *words: str) -> subprocess.CompletedProcess[str]:
        asked = [sys.executable, str(TOOL), action, "--root", str(root), *words]
        return subprocess.run(asked, capture_output=True, text=True, check=False)

    try:
        started = tool("start", *words)
        if started.returncode:
            if os.environ.get("RADEON_STACK_NEED_ENGINE"):
                pytest.fail(f"RADEON_STACK_NEED_ENGINE is set, and {started.stderr.strip()}")
            pytest.skip(started.stderr.strip())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", started.stdout.strip())
            yield tool
    finally:
        tool("stop")
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster_tool() -> Iterator[Tool]:
    """tools/cluster.py for a cluster that has been started; its daemons can be killed and brought up again."""
    with running() as tool:
        yield tool


@pytest.fixture(autouse=True)
def slurm(cluster_tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here has the cluster, and is in no job of another one."""
    for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
        monkeypatch.delenv(name)


@pytest.fixture
def taken() -> Iterator[None]:
    """All nodes are busy."""
    job = subprocess.Popen(
        ["srun", "--partition=main", "--nodes=2", "--exclusive", "--time=5", "sh", "-c", "echo there; sleep 300"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert job.stdout is not None
    assert job.stdout.readline() == b"there\n"
    yield
    job.terminate()
    job.communicate(timeout=60)
