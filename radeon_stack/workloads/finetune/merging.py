"""The adapter, and the merged 16-bit model: written whole, piece by piece, and checked by reading them back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from radeon_stack import atomic
from radeon_stack.checksums import write_summed, write_sums
from radeon_stack.errors import CheckError
from radeon_stack.safetensor_files import Place, header, places, places_in, read
from radeon_stack.workloads.finetune.deltas import Factors, Piece, Target, targets
from radeon_stack.workloads.finetune.fingerprint import Origin, require_base, write_record
from radeon_stack.workloads.finetune.streams import as_bytes, in_turn, read_values
from radeon_stack.workloads.job import Job

MERGED = "artifacts/merged"  # of the run; until it is right it has another name
# What of the base goes along: its configuration, which file has which tensor, its tokenizer and its licence.
REST = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
REMEMBERED = 2  # matrices' factors: files have the experts of a layer one after the other, and each its matrices

Bytes = bytes | memoryview
Difference = tuple[str, float]  # a tensor's name, and by how much a part of it differs at most


def save_adapter(job: Job, model: Any, tokenizer: Any, origin: Origin) -> Path:
    """The adapter as safetensors in PEFT's layout, with which base it is of, and sums."""
    folder = job.artifacts / "adapter"
    job.progress("save", 0, 1, note="adapter")
    with atomic.whole_directory(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_record(partial, origin)
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
    with atomic.whole_directory(folder) as new:
        for pattern in REST:
            for file in base.glob(pattern):
                shutil.copyfile(file, new / file.name)
        tokenizer.save_pretrained(new)
        done = 0

        def tell() -> None:
            nonlocal done
            done += 1
            job.progress("merge", done, len(found), unit="tensors")

        for file in sorted({place.file for place in found.values()}):
            sums[file.name] = write_summed(new / file.name, merged_file(places_in(file), changed, tell))
        facts = check_tensors(job, base, new, changed)
        job.fact("merge", facts | {"base": "the adapter's" if known else "not named by the adapter"})
        write_sums(new, sums)
    job.artifact("merged", folder)
    return folder


def merged_file(tensors: Sequence[Place], changed: Mapping[str, Target], told: Callable[[], None]) -> Iterator[Bytes]:
    """The bytes of a file with the same tensors in the same order, the targeted ones with what is added to them."""

    def work() -> Iterator[Callable[[], Bytes]]:
        remembering = lru_cache(REMEMBERED)(Factors.read)
        for place in tensors:
            if target := changed.get(place.name):
                for piece in target.pieces(place.shape, remembering):
                    yield partial(_summed, place, piece)
            else:
                yield from (partial(read, place, skip) for skip in place.blocks)
            told()

    yield header(tensors)
    yield from in_turn(work())


def _summed(place: Place, piece: Piece) -> Bytes:
    return as_bytes(piece.added_to(read_values(place, piece.shape, piece.begin)))


def check_tensors(job: Job, base: Path, merged: Path, changed: Mapping[str, Target]) -> dict[str, Any]:
    """Compare two folders tensor by tensor; {"tensors", "targeted", "changed", "shards", "largest_change"}.

    Each tensor must be what its base and its target make, to the bit, and one that the adapter changes must differ.
    """
    before, after = places(base), places(merged)
    if lost := sorted(set(before) ^ set(after)):
        raise CheckError(f"tensor {lost[0]} is on one side only", where=MERGED)
    moved, largest = 0, 0.0
    compared = groupby(in_turn(_comparisons(before, after, changed)), key=itemgetter(0))
    for number, (name, parts) in enumerate(compared):
        difference, target = max(part for _, part in parts), changed.get(name)
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


def _comparisons(
    before: Mapping[str, Place], after: Mapping[str, Place], changed: Mapping[str, Target]
) -> Iterator[Callable[[], Difference]]:
    """Of each tensor's parts: is it right, and by how much does it differ from the base's at most?"""
    remembering = lru_cache(REMEMBERED)(Factors.read)
    for name, new in sorted(after.items()):
        old = before[name]
        if not new.like(old):
            raise CheckError(f"tensor {name} is of another dtype or shape than the base's", where=MERGED)
        if target := changed.get(name):
            for piece in target.pieces(old.shape, remembering):
                yield partial(_sums_compared, old, new, piece)
        else:
            yield from (partial(_blocks_compared, old, new, skip) for skip in old.blocks)


def _sums_compared(old: Place, new: Place, piece: Piece) -> Difference:
    before, found = (read_values(place, piece.shape, piece.begin) for place in (old, new))
    if not torch.equal(found, piece.added_to(before)):
        raise CheckError(f"tensor {new.name} is not what base and adapter make", where=MERGED)
    return new.name, before.float().sub_(found).abs_().max().item()


def _blocks_compared(old: Place, new: Place, skip: int) -> Difference:
    if read(old, skip) != read(new, skip):
        raise CheckError(f"tensor {new.name} changed although nothing targeted it", where=MERGED)
    return new.name, 0.0
