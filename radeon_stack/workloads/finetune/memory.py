"""Out of memory: how much was missing, and which smaller sizes fit. Pure functions on torch's own figures; no torch.

What a training step needs is what is held between the steps (weights, adapter, gradients, optimizer) and activations,
which grow with the batch and with the length. So of a step that failed with `allocated` bytes in use and `asked` more
wanted, activations were at least `allocated + asked - held`, at this batch. The sizes proposed are those whose share of
that fits into `HEADROOM` of what can be had: memory is never without gaps. The step had not come to its peak, so what
is proposed may have to be lowered once more; it is told again then.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.workloads.job import Sizes

HEADROOM = 0.9
LENGTH_STEP = 64  # proposed lengths are multiples of it: whole tiles, and RS-KI-001 spares them
GIB = 1 << 30
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB}
_SIZE = r"(\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB)"
# c10/cuda/CUDACachingAllocator.cpp says it so since torch 2.1, of HIP too; `allowed` where a fraction was set.
_ASKED = re.compile(rf"out of memory\. Tried to allocate {_SIZE}")
_TOTAL = re.compile(rf"total capac\w+ of {_SIZE} of which {_SIZE} is free")
_ALLOWED = re.compile(rf"{_SIZE} allowed;")
_ALLOCATED = re.compile(rf"Of the allocated memory {_SIZE} is allocated by PyTorch")
_RESERVED = re.compile(rf"{_SIZE} is reserved by PyTorch but unallocated")
_CPU = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
MAX_MESSAGE = 10_000


@dataclass(frozen=True)
class Shortage:
    """Bytes: `asked` for in vain while `allocated` were in use; `reachable` is all that this process could have had.

    `asked` is 0 where the message does not say; `total` is the device's memory, or what it is allowed of it.
    """

    asked: int
    allocated: int
    reachable: int
    total: int

    @property
    def short(self) -> int:
        """How much was missing; 0 or less where there was enough, and not in one piece."""
        return self.allocated + self.asked - self.reachable


def shortage(message: str) -> Shortage | None:
    """The figures in torch's message of a GPU; None where it has none."""
    message = message[:MAX_MESSAGE]
    asked, total, allocated = _ASKED.search(message), _TOTAL.search(message), _ALLOCATED.search(message)
    if not (asked and total and allocated):
        return None
    reserved, allowed = _RESERVED.search(message), _ALLOWED.search(message)
    capacity, free = _bytes(total.groups()[:2]), _bytes(total.groups()[2:])
    used = _bytes(allocated.groups())
    reachable = used + free + (_bytes(reserved.groups()) if reserved else 0)
    if allowed:
        capacity = min(capacity, _bytes(allowed.groups()))
    return Shortage(_bytes(asked.groups()), used, min(reachable, capacity), capacity)


def cpu_shortage(message: str, *, most: int, reachable: int) -> Shortage:
    """The same on a CPU, with the most that the process had, and could have, of main memory (bytes).

    The most, for what it had at the error has been given back in part by the time that anybody can look. Of those who
    want memory there torch's allocator alone says how much.
    """
    asked = _CPU.search(message[:MAX_MESSAGE])
    return Shortage(int(asked[1]) if asked else 0, min(most, reachable), reachable, reachable)


def advice(found: Shortage, config: FinetuneConfig, *, stage: str, held: int) -> Sizes:
    """What is short, and what to change by how much. `held`: bytes between two steps, 0 where no step had begun."""
    told = _told(found)
    if stage not in ("train", "evaluate") or not held:
        return Sizes(*_other_stage(stage, config), told)
    where, remedy = _smaller(found, config, held)
    return Sizes(where, remedy, told)


def _told(found: Shortage) -> str:
    """What was missing, in words."""
    if not found.asked:
        return f"{_gib(found.allocated)} of {_gib(found.total)} in use, and more asked for"
    what = f"{_gib(found.asked)} asked for in one piece, which is free only in several"
    if found.short > 0:
        what = f"{_gib(found.short)} short of {_gib(found.total)}"
    return f"{what} ({_gib(found.allocated)} in use, {_gib(found.asked)} more asked for)"


def _smaller(found: Shortage, config: FinetuneConfig, held: int) -> tuple[str, str]:
    """(key, what to set) for a step that does not fit."""
    train = config.train
    activations = max(found.allocated + found.asked - held, 1)
    room = HEADROOM * found.reachable - held
    if room <= 0:
        return _smaller_model(config, held)
    share = min(1.0, room / activations)
    batch = fitting_batch(train.batch_size, train.gradient_accumulation, share)
    if batch < train.batch_size:
        accumulation = train.batch_size * train.gradient_accumulation // batch
        change = (
            f"batch_size {train.batch_size} → {batch} with gradient_accumulation {train.gradient_accumulation} → "
            f"{accumulation} keeps the same global batch: "
            f"--set train.batch_size={batch} --set train.gradient_accumulation={accumulation}"
        )
        enough = batch <= train.batch_size * share
        return (
            "config.train.batch_size",
            change if enough else f"{change}; and {_at_batch_one(config, share * train.batch_size)}",
        )
    return "config.train.batch_size", _at_batch_one(config, share)


def fitting_batch(batch: int, accumulation: int, share: float) -> int:
    """The largest batch below this one that is at most its `share` and divides the global batch; 1 if there is none."""
    largest = min(int(batch * share), batch - 1)
    return next((size for size in range(largest, 1, -1) if batch * accumulation % size == 0), 1)


def _at_batch_one(config: FinetuneConfig, share: float) -> str:
    """What is left when one row at a time does not fit; `share` of its activations does."""
    if not config.train.gradient_checkpointing or config.train.every_n_layers > 1:
        every = " --set train.every_n_layers=1" if config.train.every_n_layers > 1 else ""
        return f"--set train.gradient_checkpointing=true{every}: activations are computed again in place of being kept"
    length = max(LENGTH_STEP, int(config.data.max_length * share) // LENGTH_STEP * LENGTH_STEP)
    if length < config.data.max_length:
        what = "shorter packs" if config.data.packing else "cut the rows"
        return f"{what}: max_length {config.data.max_length} → {length}: --set data.max_length={length}"
    return "a smaller model, or a card with more memory"


def _smaller_model(config: FinetuneConfig, held: int) -> tuple[str, str]:
    taken = f"{_gib(held)} are held before any row is read"
    if config.quantization.kind == "none":
        return "config.quantization.kind", f"{taken}: --set quantization.kind=nf4 takes a quarter for the weights"
    if config.train.optimizer.startswith("adamw_torch"):
        return "config.train.optimizer", f"{taken}: --set train.optimizer=adamw_8bit takes a quarter for its states"
    if config.lora.rank > 8:
        rank = max(8, config.lora.rank // 4)
        return "config.lora.rank", f"{taken}: a smaller adapter, --set lora.rank={rank}, or a smaller model"
    return "config.model", f"{taken}: a smaller model, or a card with more memory"


def _other_stage(stage: str, config: FinetuneConfig) -> tuple[str, str]:
    """(key, remedy) of what is not a training step."""
    if stage.startswith("ask") and config.samples.count > 1:
        fewer = config.samples.count // 2
        return "config.samples.count", f"samples.count {config.samples.count} → {fewer}: --set samples.count={fewer}"
    if stage in ("load 16 bit", "merge", "reload", "check tensors"):
        return "config.export.merge", "the adapter is saved; --set export.merge=false leaves the merged model out"
    if config.quantization.kind == "none":
        return "config.quantization.kind", "--set quantization.kind=nf4 takes a quarter for the weights"
    return "config.model", "a smaller model, or a card with more memory; is somebody else on it? radeon-stack gpus"


def _bytes(size: tuple[str | None, ...]) -> int:
    number, unit = size
    return round(float(number or 0) * _UNITS[unit or "bytes"])


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.3g} MiB"
