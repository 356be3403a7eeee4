"""What fine-tunes take on the GPU at hand, beside what was estimated: exit 7 where one is off by more than 10 %.

    python benchmarks/estimate.py --tokenizer FOLDER [--layers 32] [--out benchmarks/estimate.json]
    python benchmarks/estimate.py --model FOLDER [--set lora.target_modules='["q_proj","k_proj","v_proj","o_proj"]']

Without --model it is Llama-3.1-8B's shape with random weights. Rows are texts cut at the length, so that each is as
long as the estimate takes it to be. Needs the extra `work`, and for the tokenizer a folder such as a run's `merged`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from radeon_stack.catalog.load import read, resolve
from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.errors import Exit
from radeon_stack.launch.estimate import TOLERANCE, estimate, training_of
from radeon_stack.launch.model_shape import read_shape
from radeon_stack.runs.events import Error, Result, read_events

# batch × length, and what else: the two shapes of issue 6's table, then each kind of memory made large.
CASES: dict[str, tuple[str, ...]] = {
    "60 tokens x 5": ("train.batch_size=5", "data.max_length=60"),
    "2048 tokens x 4": ("train.batch_size=4", "data.max_length=2048"),
    "512 tokens x 1": ("train.batch_size=1", "data.max_length=512"),
    "512 tokens x 1, no checkpointing": (
        *("train.batch_size=1", "data.max_length=512"),
        "train.gradient_checkpointing=false",
    ),
    "512 tokens x 1, 32-bit AdamW": ("train.batch_size=1", "data.max_length=512", "train.optimizer=adamw_torch"),
    "512 tokens x 1, 16 bit": ("train.batch_size=1", "data.max_length=512", "quantization.kind=none"),
}

MODEL = "Llama-3.1-8B's shape, {} layers, random weights"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder, in place of random weights")
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer, for random weights")
    parser.add_argument("--layers", type=int, default=32, help="of the random model; 32 is the 8B one")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs a GPU: on a CPU nobody counts what tensors take")
    cases: dict[str, Any] = {}
    record = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": torch.cuda.get_device_name(0),
        **{name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
        "model": arguments.model.name if arguments.model else MODEL.format(arguments.layers),
        "sets": arguments.sets,
        "cases": cases,
    }
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = arguments.model or made(root / "model", arguments.tokenizer, arguments.layers)
        data = root / "texts.jsonl"
        data.write_text((json.dumps({"text": "one two three four " * 4096}) + "\n") * 64)
        for number, (name, sets) in enumerate(CASES.items()):
            cases[name] = case(root / str(number), model, data, (*sets, *arguments.sets))
            arguments.out.write_text(json.dumps(record, indent=2) + "\n")  # it takes minutes, and may be ended before
    off = [name for name, told in cases.items() if not abs(told.get("off", 1)) <= TOLERANCE]
    print(
        f"{len(cases) - len(off)} of {len(cases)} within {TOLERANCE:.0%}" + (f"; not {', '.join(off)}" if off else "")
    )
    return Exit.CHECK if off else Exit.OK


def made(folder: Path, tokenizer: Path | None, layers: int) -> Path:
    """The random model that the seed's run is timed with."""
    if tokenizer is None:
        sys.exit("give --tokenizer FOLDER, or --model FOLDER")
    script = Path(__file__).with_name("seed_train_llama.py")
    code = "import runpy, sys; from pathlib import Path; make = runpy.run_path(sys.argv[1])['make_model']; "
    code += "make(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))"
    subprocess.run([sys.executable, "-c", code, str(script), str(folder), str(tokenizer), str(layers)], check=True)
    return folder


def case(root: Path, model: Path, data: Path, sets: tuple[str, ...]) -> dict[str, Any]:
    """Three steps of one case in a process of its own; bytes, and by how much the estimate is off."""
    values = ("train.steps=3", "samples.count=0", "export.merge=false", f"data.dataset={data}", *sets)
    effective = resolve(read("train-llama"), None, values)
    config = FinetuneConfig.model_validate(effective.config.model_dump())
    found = estimate(read_shape(model), training_of(config))
    (root / "artifacts").mkdir(parents=True)
    (root / "config.json").write_text(json.dumps({"recipe": effective.tree()}))
    command = [sys.executable, "-m", "radeon_stack.workloads.finetune", "--run", str(root), "--cache", str(root)]
    with (root / "log.txt").open("wb") as log:
        one_card = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
        command += ["--model", str(model), "--data", str(data)]
        subprocess.run(command, env=one_card, stdout=log, stderr=log, check=False)
    told: dict[str, Any] = {"estimated": found.tensors, "parts": dict(found.parts)}
    for event in read_events(root / "events.jsonl"):
        if isinstance(event, Result):
            measured = int(str(event.values["peak_memory_bytes"]))
            told |= {"measured": measured, "off": found.tensors / measured - 1}
        elif isinstance(event, Error):
            told |= {"error": event.what}
    print(f"{sets}: {told.get('error') or '{measured:,} measured, {estimated:,} estimated, {off:+.1%}'.format(**told)}")
    return told


if __name__ == "__main__":
    sys.exit(main())
