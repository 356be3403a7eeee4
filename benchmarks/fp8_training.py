"""Llama-8B from each kind of weights on the GPU that is here: FP8 of three sources, beside bf16 and NF4.

    PYTHONPATH=. python benchmarks/fp8_training.py [--out FILE] [--only nf4,bf16,rounded,channel,block] [--commit HASH]

Twenty steps on one batch of 4 × 512 tokens, so that the loss has something to fall to; rank 64, adamw_8bit, every layer
computed again, by the recipe's own trainer. Weights are random and drawn where a checkpoint would be read: `rounded` is
a 16-bit checkpoint rounded while it is read, `channel` one as compressed-tensors' FP8-Dynamic has it (a scale for each
output channel), `block` one as DeepSeek's and Qwen's have it (a scale for 128 × 128, called `weight_scale_inv`).
Each in a process of its own. Exit 7 where a loss has not fallen. `--smoke` is the same on tiny sizes, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # in the place of this folder: its file names are none of a library's business
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks.random_checkpoint import STD, device, shapes, tokenizer  # noqa: E402
from benchmarks.train_cases import LLAMA, Drawn  # noqa: E402
from benchmarks.train_speed import peak, reset_peak, save, watcher  # noqa: E402
from radeon_stack.errors import Exit  # noqa: E402

SOURCES = ("nf4", "bf16", "rounded", "channel", "block")
STEPS, WARM_UP = 20, 4
LENGTH, BATCH, BLOCK = 512, 4, 128
SPREAD = 100.0  # of random codes; the largest e4m3fn is 448
SECONDS = 240
TINY = {**LLAMA, "vocab_size": 256, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


class Codes(Drawn):
    """A weight of an FP8 checkpoint."""

    def __getitem__(self, _: Any) -> torch.Tensor:
        values = torch.empty(tuple(self.shape), dtype=torch.bfloat16, device=device())
        return values.normal_(0, SPREAD).clamp_(-448, 448).to(torch.float8_e4m3fn)


class Scales(Drawn):
    """What its values are multiplied with."""

    def __getitem__(self, _: Any) -> torch.Tensor:
        return torch.full(tuple(self.shape), STD / SPREAD, device=device())


def checkpoint(sizes: Mapping[str, Any], source: str) -> tuple[dict[str, Drawn], dict[str, list[int]]]:
    """Tensors by name, and of those layers that are in FP8 the shape of their scales."""
    found: dict[str, Drawn] = {}
    layers: dict[str, list[int]] = {}
    for name, shape in shapes("Llama", sizes).items():
        layer = name.removesuffix(".weight")
        if source not in ("channel", "block") or not layer.endswith("_proj"):
            found[name] = Drawn(shape)
            continue
        rows, columns = shape
        by_block = [-(-rows // BLOCK), -(-columns // BLOCK)]
        layers[layer] = by_block if source == "block" else [rows, 1]
        found[name] = Codes(shape)
        end = "weight_scale_inv" if source == "block" else "weight_scale"
        found[f"{layer}.{end}"] = Scales(torch.Size(layers[layer]))
    return found, layers


def load(sizes: Mapping[str, Any], source: str, quantization: Any) -> Any:
    """The model, through transformers' own loading."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from radeon_stack.kernels import fp8_quantizer
    from radeon_stack.workloads.finetune import base

    tensors, layers = checkpoint(sizes, source)
    config: Any = LlamaConfig(**sizes)
    asked = base.quantization_config(quantization, torch.bfloat16)
    if quantization.kind == "fp8":
        fp8_quantizer.register()
        if layers:
            config.quantization_config = fp8_quantizer.Fp8Config(layers, quantization.products).to_dict()
        else:
            asked = fp8_quantizer.Fp8Config(way=quantization.products)
    where = {"device_map": {"": device()}, "dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    more = {} if asked is None else {"quantization_config": asked}
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors, **more, **where)


def measured(source: str, *, smoke: bool) -> dict[str, Any]:
    """The child's side: load, train, tell."""
    from radeon_stack.contracts.finetune import FinetuneConfig
    from radeon_stack.kernels.liger import use_liger
    from radeon_stack.workloads.finetune import base, training
    from radeon_stack.workloads.finetune.encoding import Encoded
    from radeon_stack.workloads.job import Arguments, Job

    sizes = TINY if smoke else LLAMA
    length = 16 if smoke else LENGTH
    config = FinetuneConfig.model_validate(
        {
            "model": "random",
            "quantization": {"kind": {"nf4": "nf4", "bf16": "none"}.get(source, "fp8")},
            "train": {
                "steps": STEPS,
                "batch_size": BATCH,
                "gradient_accumulation": 1,
                "checkpoint_every": 1000,
                "gradient_checkpointing": True,
            },
        }
    )
    torch.manual_seed(0)
    begun = time.monotonic()
    model = load(sizes, source, config.quantization)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, sizes["vocab_size"], (length,), generator=generator).tolist() for _ in range(BATCH)]
    data = [Encoded(ids, ids, "") for ids in rows]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Arguments(Path(folder), Path(folder), "", None, False), lambda event: None)
        model = base.ready(model, config.quantization)
        use_liger(model)
        loaded = {"seconds": time.monotonic() - begun, "peak_gib": peak()}
        facts = base.describe(model, Path("random"), "random")
        trainer = training.trainer_for(job, config, model, tokenizer(), data)
        reset_peak()
        trainer.add_callback(watch := watcher(None))
        trainer.train()
    steps = [after - before for before, after in pairwise(watch.times)][WARM_UP:]
    return {
        "source": source,
        "step_seconds": statistics.median(steps),
        "tokens_per_second": BATCH * length / statistics.median(steps),
        "peak_gib": peak(),
        "weights_gib": facts["memory_bytes"] / 2**30,
        "weights_8bit_gib": facts.get("weights_8bit_bytes", 0) / 2**30,
        "scaled_by": facts.get("scaled_by"),
        "load": loaded,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--only", default=",".join(SOURCES))
    parser.add_argument("--commit", default="", help="where this folder is no repository")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("SOURCE", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        source, file = arguments.child
        Path(file).write_text(json.dumps(measured(source, smoke=arguments.smoke)))
        return Exit.OK
    found = []
    for source in arguments.only.split(","):
        found.append(apart(source, smoke=arguments.smoke))
        print(line(found[-1]), flush=True)
        save(arguments.out, found, arguments.commit)
    return Exit.OK if all("losses" in one and one["losses"][-1] < one["losses"][0] for one in found) else Exit.CHECK


def apart(source: str, *, smoke: bool) -> dict[str, Any]:
    """One of them in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "told.json")
        command = [sys.executable, str(Path(__file__)), *["--smoke"] * smoke, "--child", source, str(file)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return {"source": source, "failed": f"no end in {SECONDS} s"}
        if not file.is_file():
            return {"source": source, "failed": done.stderr[-2000:]}
        told: dict[str, Any] = json.loads(file.read_text())
        return told


def line(one: Mapping[str, Any]) -> str:
    if "failed" in one:
        return f"{one['source']:<8} failed: {' '.join(one['failed'].split())[-300:]}"
    losses = one["losses"]
    return (
        f"{one['source']:<8} {one['step_seconds']:.3f} s/step · {one['tokens_per_second']:,.0f} tokens/s · "
        f"peak {one['peak_gib']:.2f} GiB · weights {one['weights_gib']:.2f} GiB · "
        f"loss {losses[0]:.3f} → {losses[-1]:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
