"""The floor under a figure: bytes over bandwidth or operations over the matrix rate, both measured on this card first.

No implementation runs much faster than the larger of the two times; "1.7× of the floor (memory)" says how near it is
and what it is up against. Datasheets are left out: nobody reaches their rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from radeon_stack.workloads.bench.timing import Budget, Clock, measure

Bound = Literal["memory", "compute"]
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # far beyond every cache
MEMORY_SHARE = 8  # the copy takes at most this part of a small card's memory, twice
SIDES = {"cuda": (4096, 8192), "cpu": (256, 512, 1024)}
LARGE_ENOUGH = 0.02  # seconds of one product: a larger one brings no more
QUICK = Budget(seconds=0.2, least=5, most=30)


@dataclass(frozen=True)
class Floor:
    """Rates of one card: `bandwidth` in bytes/s, `matrix` in operations/s by dtype name (`bfloat16` …)."""

    bandwidth: float
    matrix: Mapping[str, float]

    def seconds(self, bytes_moved: float, operations: float, dtype: str) -> float:
        """The least time: each input byte read once, each output byte written once, every operation at full rate."""
        return max(self.times(bytes_moved, operations, dtype).values())

    def bound(self, bytes_moved: float, operations: float, dtype: str) -> Bound:
        """Which of the two it is up against."""
        times = self.times(bytes_moved, operations, dtype)
        return "memory" if times["memory"] >= times["compute"] else "compute"

    def times(self, bytes_moved: float, operations: float, dtype: str) -> dict[Bound, float]:
        """Both times, in seconds. KeyError for a dtype that was not measured."""
        return {"memory": bytes_moved / self.bandwidth, "compute": operations / self.matrix[dtype]}

    def facts(self) -> dict[str, Any]:
        """As plain data; `Floor(**facts)` is the floor again."""
        return asdict(self)


def measure_floor(device: torch.device, dtypes: Iterable[str], *, budget: Budget = QUICK) -> Floor:
    """Measure both rates; takes about a second a dtype. A dtype that the device has no product for is left out."""
    rates = {dtype: matrix_rate(device, dtype, budget=budget) for dtype in dict.fromkeys(dtypes)}
    return Floor(copy_bandwidth(device, budget=budget), {name: rate for name, rate in rates.items() if rate})


def copy_bandwidth(device: torch.device, *, budget: Budget = QUICK, clock: Clock | None = None) -> float:
    """Bytes read plus bytes written a second, by a large copy on the device."""
    size = COPY_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.get_device_properties(device).total_memory // MEMORY_SHARE)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(generator=_seeded(device))
    target = torch.empty_like(source)
    found = measure({"copy": lambda: target.copy_(source)}, device=device, budget=budget, flush=False, clock=clock)
    return 2 * size / found.times["copy"].median


def matrix_rate(device: torch.device, dtype: str, *, budget: Budget = QUICK, clock: Clock | None = None) -> float:
    """Operations a second (a multiply-add is two) of the best square product on random data; 0 where it has none."""
    best = 0.0
    for side in SIDES[device.type]:
        # Zeros would run faster than data does: fewer bits toggle.
        a, b = (
            torch.randn(side, side, device=device, generator=_seeded(device, seed)).to(getattr(torch, dtype))
            for seed in (0, 1)
        )
        out = torch.empty_like(a)

        def product(a: Any = a, b: Any = b, out: Any = out) -> None:
            torch.mm(a, b, out=out)

        found = measure({"mm": product}, device=device, budget=budget, flush=False, clock=clock)
        if "mm" not in found.times:
            return 0.0
        best = max(best, 2 * side**3 / found.times["mm"].median)
        if found.times["mm"].median > LARGE_ENOUGH:
            break
    return best


def _seeded(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
