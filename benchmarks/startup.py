"""How quickly the program answers: `python benchmarks/startup.py [--rounds 30]`. Writes benchmarks/startup.json.

Times `radeon-stack --help` and `radeon-stack list` as a shell does, warm: the first of each is not counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    program = str(Path(sys.executable).with_name("radeon-stack"))
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "milliseconds": {name: timed([program, name], rounds) for name in ("--help", "list")},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def timed(command: list[str], rounds: int) -> dict[str, float]:
    """Median and worst of the wall times, in milliseconds."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(1000 * (time.perf_counter() - begun))
    return {"median": round(statistics.median(times[1:]), 1), "worst": round(max(times[1:]), 1)}


if __name__ == "__main__":
    main()
