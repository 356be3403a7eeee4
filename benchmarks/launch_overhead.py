"""What launching through the docker engine costs, against `docker run` with the same arguments.

    python benchmarks/launch_overhead.py [--rounds 20]

Both start the same container (the demo's LaunchPlan; its command only starts Python) and wait for it, in turns.
`engine` is our DockerEngine from `start` to `wait`; `docker run` is the printed command. The whole demo, from the
shell's prompt back to it, is timed both ways too. Writes benchmarks/launch_overhead.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from radeon_stack.catalog.load import read, resolve
from radeon_stack.host.engines import require_engine
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.launch.circumstances import Asked, find_out
from radeon_stack.launch.docker import DockerEngine
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.planner import plan

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--demos", type=int, default=2, help="whole demo runs each way (a minute each)")
    arguments = parser.parse_args()
    engine = require_engine()
    with tempfile.TemporaryDirectory() as folder:
        launches = measure_launches(Path(folder), arguments.rounds)
        demos = measure_demos(Path(folder), arguments.demos)
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "engine": engine.version,
        "launch": launches,
        "demo": demos,
    }
    (HERE / "launch_overhead.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, row in (("launch", launches), ("whole demo", demos)):
        print(f"{name:<11} docker run {row['docker_run']:.3f} s   ours {row['ours']:.3f} s   ratio {row['ratio']:.3f}")


def measure_launches(folder: Path, rounds: int) -> dict[str, Any]:
    """Medians in seconds over interleaved rounds, after one of each to warm up."""
    made = [empty_plan(folder, number) for number in range(2 * rounds + 2)]

    def by_hand(launch: LaunchPlan) -> None:
        subprocess.run(DockerEngine().render(launch), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def by_engine(launch: LaunchPlan) -> None:
        engine = DockerEngine()
        handle = engine.start(launch)
        engine.logs(handle)
        if engine.wait(handle) != 0:
            raise SystemExit("the container failed")

    by_hand(made[0])
    by_engine(made[1])
    pairs = [
        (seconds(lambda i=i: by_hand(made[i])), seconds(lambda i=i: by_engine(made[i + 1])))  # type: ignore[misc]
        for i in range(2, 2 * rounds + 2, 2)
    ]
    return compared([a for a, _ in pairs], [b for _, b in pairs])


def measure_demos(folder: Path, rounds: int) -> dict[str, Any]:
    """The whole demo, pasted and run."""
    environment = {**os.environ, "RADEON_STACK_HOME": str(folder / "home")}
    demo = [sys.executable, "-m", "radeon_stack", "run", "train-llama", "--preset", "demo", "--engine", "docker"]

    def printed() -> str:
        return subprocess.run([*demo, "--dry-run"], env=environment, capture_output=True, text=True, check=True).stdout

    def pasted(script: str) -> None:
        subprocess.run(["sh", "-e"], input=script, text=True, check=True, capture_output=True)

    def ours() -> None:
        subprocess.run(demo, env=environment, check=True, capture_output=True)

    if not rounds:
        return compared([float("nan")], [float("nan")])
    ours()  # unpacks the model into the cache
    scripts = [printed() for _ in range(rounds)]  # printing is not launching
    pairs = [(seconds(lambda script=script: pasted(script)), seconds(ours)) for script in scripts]  # type: ignore[misc]
    return compared([a for a, _ in pairs], [b for _, b in pairs])


def empty_plan(folder: Path, number: int) -> LaunchPlan:
    """The demo's plan with a command that does nothing."""
    run_dir, cache = folder / f"run-{number}", folder / "cache"
    (run_dir / "artifacts").mkdir(parents=True)
    for name in ("config.json", "events.jsonl"):
        (run_dir / name).touch()
    cache.mkdir(exist_ok=True)
    made = plan(
        resolve(read("train-llama"), "demo"),
        find_out(resolve(read("train-llama"), "demo"), Sysroot(), Asked(engine="docker"), folder),
        run_id=f"overhead-{os.getpid()}-{number}",
        run_dir=run_dir,
        cache=cache,
    )
    return replace(made, command=(made.command[0], "-c", "pass"))


def compared(by_hand: list[float], by_us: list[float]) -> dict[str, Any]:
    a, b = statistics.median(by_hand), statistics.median(by_us)
    return {
        "docker_run": a,
        "ours": b,
        "ratio": b / a,
        "rounds": len(by_us),
        "all": [[round(s, 4) for s in side] for side in (by_hand, by_us)],
    }


def seconds(call: Callable[[], None]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
