"""The seed's Llama run (S3) on the GPU at hand: train-llama's own defaults on an 8B-shaped model of random weights.

    python benchmarks/seed_train_llama.py --tokenizer FOLDER [--layers 32] [--out benchmarks/seed_train_llama.json]

No model hub is needed, so the weights are random: time and memory are those of Llama-3.1-8B, answers are not.
Needs the extra `work`, and a tokenizer with a chat template (a demo run leaves one in its `merged` folder).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from radeon_stack.catalog.load import read, resolve
from radeon_stack.runs.events import Fact, Result, metrics_by_step, read_events

SEED = {"steps_per_second": 1.17, "samples_per_second": 11.702, "train_seconds": 85.46, "card": "R9700"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32, help="32 is the 8B model; fewer is a quick try")
    parser.add_argument("--no-merge", action="store_true")
    parser.add_argument("--cap-gb", type=float, help="let the workload have no more GPU memory (an R9700: 29.86)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        begun = time.monotonic()
        make_model(root / "model", arguments.tokenizer, arguments.layers)
        print(f"model written in {time.monotonic() - begun:.0f} s", flush=True)
        environment = capped(arguments.cap_gb)
        code = run_workload(root, environment, merge=not arguments.no_merge)
        result = told(root, code, arguments.layers) | {"cap_gb": arguments.cap_gb}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}, indent=2))


def make_model(folder: Path, tokenizer: Path, layers: int) -> None:
    """Llama-3.1-8B's shape, random weights, bf16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    torch.cuda.empty_cache()


def capped(gigabytes: float | None) -> dict[str, str]:
    """An environment in which torch gets no more than this; seen to hold before it is relied upon."""
    environment = dict(os.environ)
    if gigabytes is None:
        return environment
    share = gigabytes * 2**30 / torch.cuda.get_device_properties(0).total_memory
    environment["PYTORCH_ALLOC_CONF"] = f"per_process_memory_fraction:{share:.5f}"
    for factor, fits in ((0.9, True), (1.05, False)):
        code = f"import torch; torch.empty(int({factor * gigabytes} * 2**30), dtype=torch.uint8, device='cuda')"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
        if (done.returncode == 0) != fits:
            raise SystemExit(f"the cap does not hold: {done.stderr.decode()[-300:]}")
    return environment


def run_workload(root: Path, environment: dict[str, str], *, merge: bool) -> int:
    """The workload as the launch plan would start it."""
    effective = resolve(read("train-llama"), None, [f"export.merge={str(merge).lower()}"])
    (root / "run" / "artifacts").mkdir(parents=True)
    (root / "run" / "config.json").write_text(json.dumps({"recipe": effective.tree()}))
    command = [sys.executable, "-m", "radeon_stack.workloads.finetune"]
    command += ["--run", str(root / "run"), "--cache", str(root / "cache"), "--model", str(root / "model")]
    return subprocess.run(command, env=environment, check=False).returncode


def told(root: Path, code: int, layers: int) -> dict[str, Any]:
    """The figures, out of the run's own events."""
    events = read_events(root / "run" / "events.jsonl")
    facts: dict[str, Any] = {event.name: event.value for event in events if isinstance(event, Fact)}
    results = [event.values for event in events if isinstance(event, Result)]
    losses = [values["loss"] for values in metrics_by_step(events).values() if "loss" in values]
    last = events[-1].model_dump() if events else {}
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": torch.cuda.get_device_name(0),
        "python": platform.python_version(),
        "layers": layers,
        "exit_code": code,
        "environment": facts.get("environment"),
        "model": facts.get("model"),
        "trainer_output": facts.get("trainer_output"),
        "merge": facts.get("merge"),
        "result": results[-1] if results else last,
        "seconds": events[-1].time - events[0].time if events else None,
        "seed": SEED,
        "losses": [round(loss, 4) for loss in losses],
    }


if __name__ == "__main__":
    main()
