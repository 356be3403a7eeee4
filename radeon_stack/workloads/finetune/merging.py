"""The adapter, and the merged 16-bit model: written whole, tensor by tensor, and checked by reading them back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from radeon_stack import atomic
from radeon_stack.errors import CheckError
from radeon_stack.workloads.finetune.deltas import Target, targets
from radeon_stack.workloads.job import Job

MERGED = "artifacts/merged"  # of the run; until it is right it has another name
# What of the base goes along: its configuration, which file has which tensor, its tokenizer and its licence.
REST = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")


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


def merge(job: Job, base: Path, adapter: Path, tokenizer: Any) -> Path:
    """Merge an adapter into a folder's 16-bit weights, file by file; give the folder of the merged model.

    No model is loaded: a file's tensors are in memory, and one more. The files, their names and tensors are the base's.
    CheckError when read back a targeted tensor is the base's, or another one differs: then no `merged` folder appears.
    """
    folder = job.artifacts / "merged"
    changed, files = targets(base, adapter), tensor_files(base)
    if missing := sorted(set(changed) - set(files)):
        raise CheckError(f"the base has no tensor {missing[0]}, which LoRA targeted", where=str(base))
    with atomic.whole_directory(folder) as partial:
        for pattern in REST:
            for file in base.glob(pattern):
                shutil.copyfile(file, partial / file.name)
        tokenizer.save_pretrained(partial)
        done = 0
        for file in sorted(set(files.values())):
            held = {}
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no dict
                    tensor = tensors.get_tensor(name)
                    held[name] = changed[name].added_to(tensor) if name in changed else tensor
                    done += 1
                    job.progress("merge", done, len(files), unit="tensors")
            save_file(held, partial / file.name, metadata={"format": "pt"})
        job.fact("merge", check_tensors(job, base, partial, changed))
    job.artifact("merged", folder)
    return folder


def check_tensors(job: Job, base: Path, merged: Path, changed: Mapping[str, Target]) -> dict[str, Any]:
    """Compare two folders tensor by tensor; {"tensors", "targeted", "changed", "shards", "largest_change"}.

    Each tensor must be what its base and its target make, to the bit, and one that the adapter changes must differ.
    """
    before, after = tensor_files(base), tensor_files(merged)
    if lost := sorted(set(before) ^ set(after)):
        raise CheckError(f"tensor {lost[0]} is on one side only", where=MERGED)
    moved, largest = 0, 0.0
    for number, name in enumerate(sorted(after)):
        old, new = _tensor(before[name], name), _tensor(after[name], name)
        target = changed.get(name)
        wanted = old if target is None else target.added_to(old)
        if new.dtype != wanted.dtype or not torch.equal(new, wanted):
            verb = "changed although nothing targeted it" if target is None else "is not what base and adapter make"
            raise CheckError(f"tensor {name} {verb}", where=MERGED)
        difference = (old.float() - new.float()).abs().max().item() if target is not None else 0.0
        if target is not None and target.must_move and not difference:
            raise CheckError(
                f"tensor {name} is unchanged although LoRA targeted it",
                where=MERGED,
                remedy="what was learnt is too little for 16 bit to hold: raise train.steps or train.learning_rate, "
                "or keep the adapter alone: export.merge=false",
            )
        moved, largest = moved + bool(difference), max(largest, difference)
        job.progress("check tensors", number + 1, len(after), unit="tensors")
    return {
        "tensors": len(after),
        "targeted": len(changed),
        "changed": moved,
        "shards": len(set(after.values())),
        "largest_change": largest,
    }


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file of a folder holds which tensor, sharded or not."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / Path(file).name for name, file in weight_map.items()}
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found.update(dict.fromkeys(tensors.keys(), file))
    return found


def _tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)
