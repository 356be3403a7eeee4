"""The adapter and the merged 16-bit model: saved whole, and checked by reading them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open

from radeon_stack import atomic
from radeon_stack.errors import CheckError
from radeon_stack.workloads.finetune.adapter import lora_layers
from radeon_stack.workloads.job import Job


def save_adapter(job: Job, model: Any, tokenizer: Any) -> Path:
    """The adapter as safetensors in PEFT's layout."""
    folder = job.artifacts / "adapter"
    job.progress("save", 0, 1, note="adapter")
    with atomic.whole_directory(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    job.progress("save", 1, 1, note="adapter")
    job.artifact("adapter", folder)
    return folder


def merge(job: Job, base: Any, base_folder: Path, adapter: Path, tokenizer: Any) -> tuple[Any, Path]:
    """Merge the adapter into a 16-bit base, layer by layer; check the tensors; give model and folder.

    CheckError when a targeted tensor equals the base's or another one differs: then no `merged` folder appears.
    """
    folder = job.artifacts / "merged"
    model = PeftModel.from_pretrained(base, adapter)
    layers = lora_layers(model)
    for number, layer in enumerate(layers.values()):
        job.progress("merge", number, len(layers), unit="layers")
        layer.merge(safe_merge=True)  # refuses NaN
    merged = model.unload()
    with atomic.whole_directory(folder) as partial:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        job.progress("merge", len(layers), len(layers), unit="layers")
        job.fact("merge", check_tensors(job, base_folder, partial, {f"{name}.weight" for name in layers}))
    job.artifact("merged", folder)
    return merged, folder


def check_tensors(job: Job, base: Path, merged: Path, targeted: set[str]) -> dict[str, Any]:
    """Compare two folders tensor by tensor; {"tensors", "targeted", "changed", "shards", "largest_change"}."""
    before, after = tensor_files(base), tensor_files(merged)
    missing = sorted(targeted - set(after)) or sorted(set(before) ^ set(after))
    if missing:
        raise CheckError(f"tensor {missing[0]} is on one side only", where=str(merged))
    changed, largest = set(), 0.0
    for number, name in enumerate(sorted(after)):
        old, new = _tensor(before[name], name), _tensor(after[name], name)
        if old.shape != new.shape:
            raise CheckError(
                f"tensor {name} changed its shape: {list(old.shape)} → {list(new.shape)}", where=str(merged)
            )
        difference = (old.float() - new.float()).abs().max().item()
        if difference:
            changed.add(name)
            largest = max(largest, difference)
        job.progress("check tensors", number + 1, len(after), unit="tensors")
    wrong = sorted(targeted ^ changed)
    if wrong:
        verb = (
            "is unchanged although LoRA targeted it" if wrong[0] in targeted else "changed although nothing targeted it"
        )
        raise CheckError(f"tensor {wrong[0]} {verb} ({len(wrong)} such)", where=str(merged))
    return {
        "tensors": len(after),
        "targeted": len(targeted),
        "changed": len(changed),
        "shards": len(set(after.values())),
        "largest_change": largest,
    }


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file of a folder holds which tensor, sharded or not."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / Path(file).name for name, file in weight_map.items()}
    files = sorted(folder.glob("*.safetensors"))
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found.update(dict.fromkeys(tensors.keys(), file))
    return found


def _tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)
