"""The processes of a data-parallel run: how they meet, agree and part. Alone, each of these does nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from radeon_stack.workloads.ranks import Rank

T = TypeVar("T")

# The others wait while the first one samples a large model before training. One that died is not waited for:
# torchrun ends the run.
PATIENCE = timedelta(hours=2)
_KEPT: list[object] = []


def join(rank: Rank) -> None:
    """Meet the other processes, each on its own card: over RCCL on GPUs, over gloo on CPUs."""
    if rank.alone:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(rank.local)
        dist.init_process_group("nccl", timeout=PATIENCE, device_id=torch.device("cuda", rank.local))
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)


def meet() -> None:
    """Wait until each process is here."""
    if dist.is_initialized():
        dist.barrier()


def any_of(flag: bool) -> bool:
    """Is it so in at least one process? All get the same answer, and have to ask together."""
    return bool(most_of(int(flag)))


def most_of(number: int) -> int:
    """The largest of all processes' numbers. All get the same answer, and have to ask together."""
    if not dist.is_initialized():
        return number
    where = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    votes = torch.tensor([number], device=where)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return int(votes.item())


def leave_to_each_process(model: torch.nn.Module) -> None:
    """Keep out of data parallelism what it would have all take from the first process, and they need not or must not.

    Weights in 8 or 4 bit: each has read the same, and gloo cannot send 8-bit floats. Shares: each has its own.
    """
    frozen = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.float8_e4m3fn, torch.uint8) or isinstance(parameter, DTensor)
    ]
    if frozen:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def part() -> None:
    """From here on each goes its own way: nobody waits in a collective while the first one merges for an hour.

    The group itself is kept until the process ends. Gloo's destructor joins a thread that may be waiting for Python's
    lock, which whoever frees the model then holds: both wait for ever (torch 2.13, seen with three processes).
    """
    if dist.is_initialized():
        dist.barrier()
        _KEPT.append(dist.group.WORLD)
        dist.destroy_process_group()


def first_then_all(rank: Rank, make: Callable[[], T]) -> T:
    """What `make` gives; the first process makes it, the others find it made."""
    if rank.first:
        made = make()
        meet()
        return made
    meet()
    return make()
