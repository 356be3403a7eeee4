"""The adapter, and the merged 16-bit model: written whole, piece by piece, and checked by reading them back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from radeon_stack import atomic
from radeon_stack.checksums import write_summed, write_sums
from radeon_stack.errors import CheckError
from radeon_stack.safetensor_files import Place, blocks, header, opened, places, places_in
from radeon_stack.workloads.finetune.deltas import Factors, Pair, Target, targets
from radeon_stack.workloads.finetune.fingerprint import require_base, write_record
from radeon_stack.workloads.finetune.sources import told_as
from radeon_stack.workloads.finetune.streams import as_bytes, next_values
from radeon_stack.workloads.job import Job

MERGED = "artifacts/merged"  # of the run; until it is right it has another name
# What of the base goes along: its configuration, which file has which tensor, its tokenizer and its licence.
REST = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
REMEMBERED = 2  # matrices' factors: files have the experts of a layer one after the other, and each its matrices

Read = Callable[[Factors], Pair]


def save_adapter(job: Job, model: Any, tokenizer: Any, base: Path) -> Path:
    """The adapter as safetensors in PEFT's layout, with which base it is of, and sums."""
    folder = job.artifacts / "adapter"
    job.progress("save", 0, 1, note="adapter")
    with atomic.whole_directory(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_record(partial, base, told_as(job.arguments.model, base))
        write_sums(partial)
    job.progress("save", 1, 1, note="adapter")
    job.artifact("adapter", folder)
    return folder


def merge(job: Job, base: Path, adapter: Path, tokenizer: Any, *, given: Path | None = None) -> Path:
    """Merge an adapter into a folder's 16-bit weights, file by file; give the folder of the merged model.

    No model is loaded, and no file: some rows of a tensor are in memory. The files, their names and tensors are the
    base's. `given` is the base as it was given where `base` is decoded from it: the adapter knows that one.
    CheckError when it is another's base, or when read back a targeted tensor is the base's, or another one differs:
    then no `merged` folder appears.
    """
    folder = job.artifacts / "merged"
    known = require_base(adapter, given or base)
    changed, found = targets(base, adapter), places(base)
    if missing := sorted(set(changed) - set(found)):
        raise CheckError(f"the base has no tensor {missing[0]}, which LoRA targeted", where=str(base))
    sums = {}
    with atomic.whole_directory(folder) as partial:
        for pattern in REST:
            for file in base.glob(pattern):
                shutil.copyfile(file, partial / file.name)
        tokenizer.save_pretrained(partial)
        done = 0

        def tell() -> None:
            nonlocal done
            done += 1
            job.progress("merge", done, len(found), unit="tensors")

        for file in sorted({place.file for place in found.values()}):
            sums[file.name] = write_summed(partial / file.name, merged_file(places_in(file), changed, tell))
        facts = check_tensors(job, base, partial, changed)
        job.fact("merge", facts | {"base": "the adapter's" if known else "not named by the adapter"})
        write_sums(partial, sums)
    job.artifact("merged", folder)
    return folder


def merged_file(
    tensors: Sequence[Place], changed: Mapping[str, Target], tell: Callable[[], None] = lambda: None
) -> Iterator[bytes | memoryview]:
    """The bytes of a file with the same tensors in the same order, the targeted ones with what is added to them."""
    yield header(tensors)
    read = lru_cache(REMEMBERED)(Factors.read)
    for place in tensors:
        if target := changed.get(place.name):
            for _, new in sums_of(place, target, read):
                yield as_bytes(new)
        else:
            yield from blocks(place)
        tell()


def sums_of(place: Place, target: Target, read: Read) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A tensor before and after, some rows after the other."""
    with opened(place) as stream:
        for delta in target.deltas(place.shape, read):
            old = next_values(stream, place, tuple(delta.shape))
            yield old, target.added(old, delta)


def check_tensors(job: Job, base: Path, merged: Path, changed: Mapping[str, Target]) -> dict[str, Any]:
    """Compare two folders tensor by tensor; {"tensors", "targeted", "changed", "shards", "largest_change"}.

    Each tensor must be what its base and its target make, to the bit, and one that the adapter changes must differ.
    """
    before, after = places(base), places(merged)
    if lost := sorted(set(before) ^ set(after)):
        raise CheckError(f"tensor {lost[0]} is on one side only", where=MERGED)
    read = lru_cache(REMEMBERED)(Factors.read)
    moved, largest = 0, 0.0
    for number, (name, new) in enumerate(sorted(after.items())):
        old, target = before[name], changed.get(name)
        right, difference = _compared(old, new, target, read) if new.like(old) else (False, 0.0)
        if not right:
            verb = "changed although nothing targeted it" if target is None else "is not what base and adapter make"
            raise CheckError(f"tensor {name} {verb}", where=MERGED)
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
        "shards": len({place.file for place in after.values()}),
        "largest_change": largest,
    }


def _compared(old: Place, new: Place, target: Target | None, read: Read) -> tuple[bool, float]:
    """Is the new one right, and by how much does it differ from the old one at most?"""
    if target is None:
        return all(a == b for a, b in zip(blocks(old), blocks(new), strict=True)), 0.0
    largest = 0.0
    with opened(new) as stream:
        for before, wanted in sums_of(old, target, read):
            found = next_values(stream, new, tuple(wanted.shape))
            if not torch.equal(found, wanted):
                return False, largest
            largest = max(largest, (before.float() - found.float()).abs().max().item())
    return True, largest
