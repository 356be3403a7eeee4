"""What compiling our kernels into an image takes and saves: `python benchmarks/shipped_kernels.py`. No GPU; not run.

As the image's stage does it, for gfx1201, two at a time, by each triton that kernels must compile with. What a first
step would compile is told for the recipes, one after the other as a run does; without the C module by which Triton 3.5
calls each signature, for which HIP's library would have to be here. On a machine that others use ("load before") the
processors' seconds say more than the clock's. Writes benchmarks/shipped_kernels.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from tritons import TRITONS, python_with_triton, surroundings  # noqa: E402

TARGET, AT_ONCE, MIB = "gfx1201", 2, 1 << 20
# Names of what a step launches: of 129 to 512 rows, and of up to 170 tokens, as texts of the recipes' own data are.
FIRST_STEP = {
    "train-llama": (
        "dense * nf4 double split 8",
        "dense * low rank rows 64 split 8",
        "dense adapter gradients rows 64",
    ),
    "train-qwen-moe": (
        "dense * nf4 rows 64",
        "dense * low rank rows 64 split 16",
        "dense adapter gradients rows 64",
        "experts * nf4 rows 16",
        "count experts 128",
        "place slots 128",
        "combine parts *",
        "router 4",
        "router back 4",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the environments with one triton are; else made anew")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        result = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "python": platform.python_version(),
            "target": TARGET,
            "at once": AT_ONCE,
            "triton": {version: build(folder, version, Path(temporary, f"kernels-{version}")) for version in TRITONS},
        }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def build(environments: Path, version: str, folder: Path) -> dict[str, Any]:
    """What one triton's build took, in seconds of the clock and of its processes, and what it left."""
    python = python_with_triton(environments, version)
    command = [python, "-m", "radeon_stack.kernels.warm", "--target", TARGET, "--at-once", AT_ONCE, folder]
    environment = {name: value for name, value in surroundings().items() if not name.startswith("TRITON_")}
    load = os.getloadavg()[0]
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        list(map(str, command)), env=environment, cwd=ROOT, check=True, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    times = {name: float(took) for name, took in re.findall(r"^✓ (.+) ([\d.]+) s$", done.stderr, re.MULTILINE)}
    return {
        "kernels": len(list(folder.glob("*/*.hsaco"))),
        "failed": len(re.findall(r"^✗", done.stderr, re.MULTILINE)),
        "load before": round(load, 1),
        "seconds": round(time.monotonic() - begun, 1),
        "processor seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "MiB": round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / MIB, 2),
        "MiB compressed": round(compressed(folder) / MIB, 2),
        "first step": {name: saved(times, patterns) for name, patterns in FIRST_STEP.items()},
    }


def saved(times: dict[str, float], patterns: tuple[str, ...]) -> dict[str, float]:
    took = [seconds for name, seconds in times.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return {"kernels": len(took), "seconds": round(sum(took), 1)}


def compressed(folder: Path) -> int:
    """Bytes of a layer as registries keep it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", compresslevel=6) as archive:
        archive.add(folder, arcname="kernels")
    return data.tell()


if __name__ == "__main__":
    main()
