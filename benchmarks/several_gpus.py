"""One fine-tune on one GPU and on several: the same losses for the same rows a step, its time and its memory.

    PYTHONPATH=. python benchmarks/several_gpus.py --tokenizer FOLDER [--layers 8] [--gpus 1,2,3] [--out FILE]

On several, the base is once whole on each and once shared out (`train.parallel`); and once more each as if it were on a
node of its own: one process a node, as a cluster's job starts it, and NCCL over TCP alone.

Llama-3.1-8B's shape with random weights, so many layers of it; 12 rows of 512 tokens a step, by torchrun and NCCL as
`run --gpus 0,1,2` starts it. Losses are held to those of one GPU: exit 7 where one is further than 1 % of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # in the place of this folder: its file names are none of a library's business
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks.estimate import made  # noqa: E402
from radeon_stack.catalog.load import read, resolve  # noqa: E402
from radeon_stack.errors import Exit  # noqa: E402
from radeon_stack.launch.torchrun import started, variables  # noqa: E402
from radeon_stack.runs.events import Error, Fact, Metric, Result, read_events  # noqa: E402

PARALLEL = ("data", "sharded")
ROWS, BATCH, LENGTH, STEPS, WARM_UP = 12, 2, 512, 8, 3
STOP_SECONDS = 60
TOLERANCE = 0.01
SECONDS = 150


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--gpus", default="1,2,3")
    parser.add_argument("--commit", default="", help="where this folder is no repository")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    wanted = [int(number) for number in arguments.gpus.split(",")]
    if torch.cuda.device_count() < max(wanted):
        sys.exit(f"{torch.cuda.device_count()} GPUs are here")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = made(root / "model", arguments.tokenizer, arguments.layers)
        data = root / "texts.jsonl"
        words = ("one", "two", "three", "four")
        rows = (" ".join(words[(number >> place % 6) % 4] for place in range(2048)) for number in range(96))
        data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        cases = [
            (number, parallel, nodes)
            for number in wanted
            for parallel in (PARALLEL if number > 1 else ("auto",))
            for nodes in ((1, number) if number > 1 else (1,))
        ]
        measured = [
            case(root / f"{n}-{parallel}-{nodes}", model, data, n, parallel, nodes) for n, parallel, nodes in cases
        ]
    record = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": arguments.commit,
        "card": torch.cuda.get_device_name(0),
        **{name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "model": f"Llama-3.1-8B's shape, {arguments.layers} layers, random weights",
        "rows": ROWS,
        "tokens": LENGTH,
        "measured": measured,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    far = [off(one, measured[0]) for one in measured]
    for one, distance in zip(measured, far, strict=True):
        told = f"{one['step_seconds']:.3f} s/step" if "step_seconds" in one else one.get("error", "no step")
        where = f" on {one['nodes']} nodes" if one["nodes"] > 1 else ""
        print(
            f"{one['gpus']} GPUs{where}, {one['parallel']}: {told} · losses {one['losses']} · "
            f"{distance:.2%} from one GPU's"
        )
    return Exit.OK if max(far) <= TOLERANCE else Exit.CHECK


def off(one: dict[str, Any], alone: dict[str, Any]) -> float:
    """The largest share by which a loss differs; inf where steps are missing."""
    pairs = list(zip(one["losses"], alone["losses"], strict=False))
    return max(abs(a / b - 1) for a, b in pairs) if len(pairs) == len(one["losses"]) == STEPS else float("inf")


def case(root: Path, model: Path, data: Path, gpus: int, parallel: str, nodes: int) -> dict[str, Any]:
    """A run on so many GPUs, through the workload as a plan starts it, here or on each of several nodes."""
    values = (
        *(f"train.parallel={parallel}", f"train.processes={gpus}", f"train.batch_size={BATCH}", f"train.steps={STEPS}"),
        *(f"train.gradient_accumulation={ROWS // BATCH // gpus}", f"data.max_length={LENGTH}"),
        *("train.gradient_checkpointing=true", "samples.count=0", "export.merge=false", f"data.dataset={data}"),
    )
    effective = resolve(read("train-llama"), None, values)
    (root / "artifacts").mkdir(parents=True)
    (root / "config.json").write_text(json.dumps({"recipe": effective.tree()}))
    work = ["radeon_stack.workloads.finetune", "--run", str(root), "--cache", str(root)]
    work += ["--model", str(model), "--data", str(data)]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    with (root / "log.txt").open("wb") as log:
        if nodes == 1:
            begun = [begin([*started(sys.executable, gpus), *work], log, here(seen[:gpus]))]
        else:
            words = ["--nodes", str(nodes), "--processes", "1", "--"]
            command = [sys.executable, "-m", "radeon_stack.workloads.node", *words, *work]
            begun = [begin(command, log, as_a_node(number, seen[number], root.name)) for number in range(nodes)]
        for one in begun:
            one.wait(timeout=SECONDS)
    events = read_events(root / "events.jsonl") if (root / "events.jsonl").exists() else []
    metrics = [event for event in events if isinstance(event, Metric) and "loss" in event.values]
    steps = [(event.time, event.values["loss"]) for event in metrics]
    between = [later - earlier for (earlier, _), (later, _) in pairwise(steps)]
    told: dict[str, Any] = {
        "gpus": gpus,
        "nodes": nodes,
        "parallel": parallel,
        "losses": [round(loss, 5) for _, loss in steps],
    }
    if len(between) >= WARM_UP:
        told["step_seconds"] = statistics.median(between[WARM_UP - 1 :])
    told |= {event.name: event.value for event in events if isinstance(event, Fact) and event.name == "shares"}
    for event in events:
        if isinstance(event, Result):
            told["peak_memory_bytes"] = event.values["peak_memory_bytes"]
    if errors := [event.what for event in events if isinstance(event, Error)]:
        told["error"] = errors[-1]
    if not steps:
        print((root / "log.txt").read_text()[-2000:], file=sys.stderr)
    return told


def begin(command: list[str], log: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)


def here(cards: list[str]) -> dict[str, str]:
    """Variables of processes on one machine."""
    told = {name: value for name, value, _ in variables(len(cards), STOP_SECONDS, None)}
    return {"CUDA_VISIBLE_DEVICES": ",".join(cards), **told}


def as_a_node(number: int, card: str, attempt: str) -> dict[str, str]:
    """Variables of a node with one card, as Slurm and a job's script set them; nothing but TCP leads to the other."""
    return {
        "CUDA_VISIBLE_DEVICES": card,
        "SLURM_NODEID": str(number),
        "SLURM_JOB_ID": "1",
        "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
        "RADEON_STACK_ATTEMPT": attempt,
        **{f"NCCL_{way}_DISABLE": "1" for way in ("P2P", "SHM", "IB")},
    }


if __name__ == "__main__":
    sys.exit(main())
