"""A Python environment with one triton and nothing else, from docker/locks/triton-VERSION.txt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from radeon_stack.errors import MachineError
from radeon_stack.images.locking import TRITONS

ROOT = Path(__file__).resolve().parent.parent
__all__ = ["ROOT", "TRITONS", "in_each_triton", "python_with_triton", "surroundings"]


def python_with_triton(folder: Path, version: str, beside: Path | None = None) -> Path:
    """The interpreter of an environment below `folder`, made if it is not there; as Python as this one.

    `beside`: a folder of packages that it sees too, after its own. MachineError when triton cannot be had.
    """
    home = folder / f"triton-{version}"
    python = home / "bin/python"
    uv = [sys.executable, "-m", "uv", "--quiet"]
    lock = ROOT / "docker/locks" / f"triton-{version}.txt"
    if not (home / ".ready").is_file():
        _do([*uv, "venv", "--allow-existing", "--python", sys.executable, str(home)], version)
        _do([*uv, "pip", "install", "--python", str(python), "--no-deps", "--require-hashes", "-r", str(lock)], version)
        (home / ".ready").touch()
    if beside:
        packages = next((home / "lib").glob("python*/site-packages"))
        (packages / "beside.pth").write_text(f"{beside}\n", encoding="utf-8")
    return python


def in_each_triton(folder: Path | None, beside: Path, script: Sequence[str]) -> dict[str, Any]:
    """What a script prints as JSON, by the triton that it runs in. MachineError when one cannot be had."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for version in TRITONS:
            command = [str(python_with_triton(folder or Path(temporary), version, beside=beside)), *script]
            done = subprocess.run(command, env=surroundings(), stdout=subprocess.PIPE, text=True, check=True)
            found[version] = json.loads(done.stdout)
    return found


def surroundings() -> dict[str, str]:
    """The environment variables of a child that compiles: this tree is what it imports, and nothing is interpreted."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return kept | {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}


def _do(command: list[str], version: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise MachineError(f"triton {version} cannot be had: {' '.join(lines)[:400]}", remedy="is the index reachable?")
