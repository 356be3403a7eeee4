"""Several devices: all-reduce over all that are visible, and copies between each two."""

from __future__ import annotations

import os
import tempfile
import time
from itertools import permutations
from pathlib import Path

import torch
import torch.multiprocessing as processes

from radeon_stack.workloads.capabilities.measure import on_gpu
from radeon_stack.workloads.capabilities.steps import Measured, MissingError, Step, Steps

# RCCL's protocols part at some 16 KiB (LL) and 1 MiB (LL128, then Simple): values of float32.
COUNTS = {"4 kib": 1 << 10, "1 mib": 1 << 18, "64 mib": 1 << 24}
CPU_COUNTS = {"4 kib": 1 << 10, "1 mib": 1 << 18}
CPU_RANKS = 2
COPY_BYTES = 64 << 20


def all_reduce(seed: int) -> Steps:
    """A step for each size: the sum over all GPUs (RCCL, NCCL), or over two processes on the CPU (gloo)."""
    ranks = torch.cuda.device_count() if on_gpu() else CPU_RANKS
    if ranks < 2:
        raise MissingError("a second GPU")
    for name, count in (COUNTS if on_gpu() else CPU_COUNTS).items():
        yield Step(name, lambda count=count: _reduced(seed, count, ranks))  # type: ignore[misc]


def _reduced(seed: int, count: int, ranks: int) -> Measured:
    """The worst error of any rank; float32 sums of `ranks` values."""
    # One host: no other interface is looked at, and a container without a network has no other.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_rank, (seed, count, ranks, folder), nprocs=ranks)
        told = [(Path(folder) / str(rank)).read_text().split() for rank in range(ranks)]
    worst = max(float(error) for error, _ in told)
    tolerance = 4 * ranks * torch.finfo(torch.float32).eps
    return Measured(worst, tolerance, max(float(ms) for _, ms in told), f"{ranks} ranks")


def _rank(rank: int, seed: int, count: int, ranks: int, folder: str) -> None:
    import torch.distributed as dist

    device = torch.device(f"cuda:{rank}" if on_gpu() else "cpu")
    if on_gpu():
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu() else "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks
    )
    given = [torch.randn(count, generator=torch.Generator().manual_seed(seed + r)) for r in range(ranks)]
    expected = torch.stack(given).double().sum(0)
    value = given[rank].to(device)
    dist.all_reduce(value)
    error = float((value.cpu().double() - expected).abs().max() / expected.abs().max())
    times = []
    for _ in range(5):
        if on_gpu():
            torch.cuda.synchronize()
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(value)
        if on_gpu():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) * 1e3)
    (Path(folder) / str(rank)).write_text(f"{error} {sorted(times)[2]}")
    dist.destroy_process_group()


def peer_copies(seed: int) -> Steps:
    """Step `copies`: 64 MiB between each two GPUs, in both directions, compared byte for byte."""
    count = torch.cuda.device_count()
    if count < 2:
        raise MissingError("a second GPU")

    def copies() -> Measured:
        told, wrong = [], 0
        slowest = 0.0
        for here, there in permutations(range(count), 2):
            maker = torch.Generator().manual_seed(seed + here)
            source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, generator=maker).to(f"cuda:{here}")
            target = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{there}")
            took = []
            for _ in range(4):
                torch.cuda.synchronize(here)
                torch.cuda.synchronize(there)
                begun = time.perf_counter()
                target.copy_(source)
                torch.cuda.synchronize(here)
                torch.cuda.synchronize(there)
                took.append(time.perf_counter() - begun)
            wrong += int((target.cpu() != source.cpu()).sum())
            slowest = max(slowest, min(took))
            way = "direct" if torch.cuda.can_device_access_peer(here, there) else "through the host"
            told.append(f"{here}→{there} {COPY_BYTES / min(took) / 1e9:.1f} GB/s {way}")
        return Measured(float(wrong), 0.0, slowest * 1e3, ", ".join(told))

    yield Step("copies", copies)
