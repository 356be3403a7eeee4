"""How long doctor and diagnose take, as a shell sees it: `python benchmarks/host.py`. Writes benchmarks/host.json.

doctor on the tree of a healthy machine, on this machine with and without an engine, on an engine's socket that accepts
and says nothing, and on a file of sysfs that never comes back (a FUSE file; needs root). diagnose on logs of 100 MB and
1 GB whose cause stands at the end, with its peak memory.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the staged machines are the tests'

from tests.stages import STAGES, build  # noqa: E402
from tests.stuck import impossible, stuck  # noqa: E402

PROGRAM = str(Path(sys.executable).with_name("radeon-stack"))
ROUNDS = 20
LINE = b"{'loss': 0.1234, 'grad_norm': 1.25, 'learning_rate': 5e-05, 'epoch': 0.31}\n"
FAULT = b"Memory access fault by GPU node-1 (Agent handle: 0x55b017570c40) on address 0x7fcd499e6000.\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip(),
            "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
            "doctor": doctor(Path(folder)),
            "diagnose": [diagnose(Path(folder), megabytes) for megabytes in (100, 1000)],
        }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def doctor(folder: Path) -> dict[str, object]:
    """Seconds, medians and worst of several rounds."""
    tree = build(STAGES["r9700"], folder / "tree")
    found: dict[str, object] = {"healthy tree": timed(["doctor", "--sysroot", str(tree)], ROUNDS)}
    found["this machine, no engine"] = timed(["doctor"], ROUNDS, {"DOCKER_HOST": f"unix://{folder}/none.sock"})
    if "DOCKER_HOST" in os.environ:
        found["this machine, engine"] = timed(["doctor"], ROUNDS)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{folder}/dead.sock")
        dead.listen(64)
        found["engine says nothing"] = timed(["doctor"], 3, {"DOCKER_HOST": f"unix://{folder}/dead.sock"})
    if why := impossible():
        found["sysfs never answers"] = why
    else:
        file = tree / "sys/bus/pci/devices/0000:05:00.0/pp_dpm_sclk"
        file.touch()
        with stuck(file):
            found["sysfs never answers"] = timed(["doctor", "--sysroot", str(tree)], 3)
    return found


def diagnose(folder: Path, megabytes: int) -> dict[str, float]:
    """Seconds and peak MiB of one run over a log of that size."""
    log = folder / "long.log"
    piece = LINE * (1_000_000 // len(LINE))
    with log.open("wb") as stream:
        for _ in range(megabytes):
            stream.write(piece)
        stream.write(FAULT)
    begun = time.perf_counter()
    child = os.posix_spawn(
        PROGRAM,
        [PROGRAM, "diagnose", str(log)],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, out, os.devnull, os.O_WRONLY, 0) for out in (1, 2)],
    )
    usage = os.wait4(child, 0)[2]
    seconds = time.perf_counter() - begun
    log.unlink()
    return {"megabytes": megabytes, "seconds": round(seconds, 2), "peak_mib": round(usage.ru_maxrss / 1024, 1)}


def timed(arguments: list[str], rounds: int, env: Mapping[str, str] | None = None) -> dict[str, float]:
    """Warm: the first of each is not counted."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        subprocess.run([PROGRAM, *arguments], check=False, capture_output=True, env={**os.environ, **(env or {})})
        times.append(time.perf_counter() - begun)
    return {"median": round(statistics.median(times[1:]), 3), "worst": round(max(times[1:]), 3)}


if __name__ == "__main__":
    main()
