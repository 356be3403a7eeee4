"""What two processes on this machine take to all-reduce and to all-gather so many bytes, by gloo over loopback."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

PROCESSES, WARM_UP = 2, 2
WORD = 4  # bytes of a float32, as which FSDP2 is handed packed weights
HALF = 2  # of a bfloat16: TRL trains the adapter of a quantised model in it


def collectives(sizes: dict[str, int], rounds: int) -> dict[str, list[float]]:
    """Seconds of each of so many rounds, by what is sent: `gradients` are all-reduced, anything else all-gathered.

    A round has taken as long as the slower of the two processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_process, (sizes, rounds, folder), nprocs=PROCESSES)
        told = [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(PROCESSES)]
    return {name: [max(both) for both in zip(*(one[name] for one in told), strict=True)] for name in sizes}


def _process(rank: int, sizes: dict[str, int], rounds: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    told = {name: _timed(_sending(name, nbytes), rounds) for name, nbytes in sizes.items()}
    (Path(folder) / str(rank)).write_text(json.dumps(told))
    dist.destroy_process_group()


def _sending(name: str, nbytes: int) -> Callable[[], Any]:
    if name == "gradients":
        values = torch.zeros(nbytes // HALF, dtype=torch.bfloat16)
        return lambda: dist.all_reduce(values)
    share = torch.zeros(-(-nbytes // WORD // PROCESSES))
    whole = share.new_empty(PROCESSES * share.numel())
    return lambda: dist.all_gather_into_tensor(whole, share)


def _timed(send: Callable[[], Any], rounds: int) -> list[float]:
    seconds = []
    for _ in range(WARM_UP + rounds):
        dist.barrier()
        begun = time.perf_counter()
        send()
        seconds.append(time.perf_counter() - begun)
    return seconds[WARM_UP:]
