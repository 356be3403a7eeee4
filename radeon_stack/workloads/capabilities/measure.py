"""Operands, errors and times that all questions share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from radeon_stack.workloads.capabilities.steps import Measured

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# How far the worst row of a result may be off, in spacings of its dtype at 1. Rounding operands, sums and the result
# costs one to three of them; a wrong kernel is off by tens (bf16: 128 are 100 %).
SPACINGS = 8
WARM_UP, REPEATS = 3, 10
ENOUGH_SECONDS = 0.5


def on_gpu() -> bool:
    """Is there an accelerator? HIP answers to torch's name `cuda`."""
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda:0" if on_gpu() else "cpu")


def is_hip() -> bool:
    return torch.version.hip is not None


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Standard normal values times `scale`, made on the CPU so that they are the same everywhere; on the device."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(dtype).to(device())


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """Its values in float64 on the CPU, where the references are computed."""
    return tensor.detach().cpu().double()


def tolerance(dtype: torch.dtype) -> float:
    return SPACINGS * torch.finfo(dtype).eps


def worst_row(found: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest error among the rows (last dimension), relative to that row or the typical one, whichever is larger.

    One wrong row among thousands shows, and rows that are almost nothing do not. NaN when anything is not finite.
    """
    difference = (exact(found) - reference).norm(dim=-1)
    sizes = reference.norm(dim=-1)
    typical = sizes.square().mean().sqrt()
    return float((difference / sizes.clamp(min=float(typical) or 1.0)).max())


def checked(
    found: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype, milliseconds: float | None = None
) -> Measured:
    """The outcome of comparing a result of that dtype with its float64 reference, shaped alike."""
    return Measured(worst_row(found, reference), tolerance(dtype), milliseconds)


def all_checked(pairs: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype, ms: float | None) -> Measured:
    """The same for several results: the largest error counts, and NaN is the largest."""
    errors = [worst_row(found, reference) for found, reference in pairs]
    return Measured(next((e for e in errors if e != e), max(errors)), tolerance(dtype), ms)


def timed(run: Callable[[], object]) -> float:
    """Milliseconds: the median of a few calls once warm, by device events where there is a GPU."""
    begun = time.monotonic()
    for _ in range(WARM_UP):
        run()
        if time.monotonic() - begun > ENOUGH_SECONDS:
            break
    found: list[float] = []
    begun = time.monotonic()
    while len(found) < REPEATS and (not found or time.monotonic() - begun < ENOUGH_SECONDS):
        found.append(_once(run))
    return statistics.median(found)


def _once(run: Callable[[], object]) -> float:
    if not on_gpu():
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))
