"""A node is asked by a real Slurm: what it tells, how long that is kept, and what is said when it cannot be asked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from radeon_stack.errors import MachineError
from radeon_stack.host.bundle import opened
from radeon_stack.host.cluster import Cluster, Partition, cluster, partition_named
from radeon_stack.host.machine import probe
from radeon_stack.host.nodes import KEPT_SECONDS, node_of
from radeon_stack.host.slurm import ControllerError
from tests.cluster.conftest import Tool
from tests.conftest import wait_for


@pytest.fixture
def main() -> tuple[Cluster, Partition]:
    found = cluster()
    return found, partition_named(found, None)


def test_the_cluster_is_what_its_controller_says() -> None:
    found = cluster()
    assert found.name == "stand-in" and found.version and found.settings["JobRequeue"] == "1"
    main, urgent = found.partitions
    assert (main.name, main.default, main.up, main.nodes, main.max_minutes) == ("main", True, True, 2, None)
    assert main.cpus == os.cpu_count() and main.memory > 1 << 30 and main.gres == () and main.gpus == 0
    assert (main.preempt, main.grace, urgent.preempt) == ("REQUEUE", 60, "OFF")


def test_a_node_tells_what_it_is(home: Path, main: tuple[Cluster, Partition]) -> None:
    found = node_of(home, *main)
    record = found.record
    assert record.node in ("n1", "n2") and record.python == sys.executable and record.srun
    assert 1 <= record.cpus <= record.all_cpus == os.cpu_count()
    assert any(one.loopback and one.addresses == ("127.0.0.1",) for one in record.interfaces)
    assert record.shared.writable and record.shared.locks == "" and record.shared.kind
    assert abs(record.shared.clock_offset) < 5 and abs(record.shared.mtime_offset) < 5
    with opened(str(found.machine)) as tree:
        assert probe(tree).memory == record.memory == probe().memory
    names = {path.name for path in (home / "cluster/stand-in").iterdir()}
    assert names == {"main.machine.tar.gz", "main.node.json"}


def test_a_node_is_asked_once_a_week_and_anew_when_told(home: Path, main: tuple[Cluster, Partition]) -> None:
    first = node_of(home, *main)
    assert node_of(home, *main) == first
    assert node_of(home, *main, anew=True).record.written > first.record.written
    record = first.machine.with_name("main.node.json")
    os.utime(record, (0, time.time() - KEPT_SECONDS - 1))
    assert node_of(home, *main).asked > time.time() - 60
    record.write_text('{"hostname": 7}')
    assert node_of(home, *main).record.node


def test_from_within_another_job_the_node_is_asked_all_the_same(
    home: Path, main: tuple[Cluster, Partition], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"JOB_ID": "4711", "STEP_ID": "0", "NTASKS": "8", "CPUS_PER_TASK": "99", "NNODES": "7"}.items():
        monkeypatch.setenv(f"SLURM_{name}", text)
    assert node_of(home, *main).record.node


def test_when_no_node_is_free_in_time_that_is_said(home: Path, main: tuple[Cluster, Partition], taken: None) -> None:
    with pytest.raises(MachineError, match="partition main: no node was free within 2 s; wait until one is"):
        node_of(home, *main, wait_seconds=2)
    assert not list((home / "cluster/stand-in").iterdir())


def test_a_python_that_the_node_does_not_see_is_named(
    home: Path, main: tuple[Cluster, Partition], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/of-the-login-node/python")
    with pytest.raises(MachineError, match=r"this Python .* does not run on the node") as raised:
        node_of(home, *main)
    assert "file system that all nodes see" in raised.value.remedy


def test_gpus_that_the_cluster_does_not_count_are_said(home: Path, main: tuple[Cluster, Partition]) -> None:
    with pytest.raises(MachineError, match="radeon-stack doctor --engine slurm"):
        node_of(home, *main, 1)


def test_a_home_that_the_node_does_not_share_is_named(home: Path) -> None:
    """The submit side has a file system of its own there: what it writes, no node sees."""
    code = (
        "from pathlib import Path; import sys\n"
        "from radeon_stack.host.cluster import cluster, partition_named\n"
        "from radeon_stack.host.nodes import node_of\n"
        "found = cluster()\n"
        "try: node_of(Path(sys.argv[1]), found, partition_named(found, None))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    alone = 'mount -t tmpfs none "$1" && exec "$2" -c "$3" "$1"'
    words = ["unshare", "--mount", "sh", "-c", alone, "sh", str(home), sys.executable, code]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file system of its own here: {done.stderr.strip()}")
    assert done.stdout.startswith("SharingError") and "is not the submit host's folder" in done.stdout, done
    assert "RADEON_STACK_HOME=DIR" in done.stdout


def test_without_a_controller_it_is_the_controller_that_is_named(cluster_tool: Tool) -> None:
    assert cluster_tool("kill", "--daemon", "slurmctld").returncode == 0
    try:
        with pytest.raises(ControllerError, match="scontrol"):
            cluster()
    finally:
        assert cluster_tool("up", "--daemon", "slurmctld").returncode == 0
        wait_for(answers, what="the controller")


def answers() -> bool:
    try:
        return not any(node.broken for one in cluster().partitions for node in one.members)
    except MachineError:
        return False
