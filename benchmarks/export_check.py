"""Two demos trained, exported and asked: `python benchmarks/export_check.py`. On the CPU, without a container.

SmolLM2-135M that was taught the birthday, and the tiny mixture of experts; each is converted to GGUF in three ways,
compared tensor by tensor, and asked by transformers, llama.cpp and vLLM. Writes benchmarks/export_check.json. The first
time, llama.cpp is compiled; then it takes some six minutes on two cores with nothing beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from radeon_stack import atomic

ROOT = Path(__file__).resolve().parent.parent
DEMOS = ("train-llama", "train-qwen-moe")
KEPT = ("compared", "types", "worst", "seconds", "bytes", "peak_memory")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    exports = {}
    for demo in DEMOS:
        trained = run(demo, "--preset", "demo")
        begun, load = time.monotonic(), os.getloadavg()[0]
        checked = run("export-check", "--from", trained["run"])
        exports[demo] = {
            "state": checked["state"],
            "seconds": round(time.monotonic() - begun, 1),
            "load_before": round(load, 1),
            "loaded": checked["loaded"],
            "gguf": {
                name.removeprefix("gguf_"): {key: fact[key] for key in KEPT if key in fact}
                for name, fact in checked["facts"].items()
                if name.startswith("gguf_")
            },
        }
        for one in checked["loaded"]:
            print(demo, one["loader"], one["state"], json.dumps(one["values"]), flush=True)
    told = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "machine": {"cores": os.cpu_count(), "processor": processor()},
        "exports": exports,
    }
    atomic.write_text(Path(__file__).with_suffix(".json"), json.dumps(told, indent=2) + "\n")
    return 0


def run(recipe: str, *options: str) -> dict[str, Any]:
    """A run's JSON, however it ended."""
    command = [sys.executable, "-m", "radeon_stack", "run", recipe, *options, "--engine", "local", "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    return dict(json.loads(done.stdout))


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")


if __name__ == "__main__":
    sys.exit(main())
