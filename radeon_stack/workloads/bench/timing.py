"""Times one can believe: several contestants in turns, cold caches, medians with their spread.

The contestants are timed in interleaved rounds (ABC, BCA, CAB …): what the card does meanwhile (clocks, heat, a
neighbour) meets all of them alike. Before each timed call its inputs are prepared, the caches are written over, and the
device has nothing left to do. Device work is timed by device events, so the host's way to it counts only as far as the
device has to wait for it; to leave even that out, `graph=True` times replays of a captured graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

# What lies behind the L2 is not told by the runtime: Infinity Cache has 64 MB on Navi 48, 256 MB on MI300.
FLUSH_BYTES = {"cuda": 256 << 20, "hip": 512 << 20, "cpu": 64 << 20}
STABLE_SPREAD = 0.05  # of the median; the distance from the 20th to the 80th percentile


@dataclass(frozen=True)
class Call:
    """What is timed: `run`. With `prepare`, that is called before, untimed, and `run` is given what it returns.

    A backward pass is `Call(run=lambda out: out.backward(grad), prepare=forward)`.
    """

    run: Callable[..., Any]
    prepare: Callable[[], Any] | None = None

    def ready(self) -> Callable[[], Any]:
        """`run` with its argument, prepared now."""
        return self.run if self.prepare is None else partial(self.run, self.prepare())


@dataclass(frozen=True)
class Budget:
    """How long each contestant is timed: until `seconds` of its own time, in `least` to `most` rounds."""

    seconds: float = 0.5
    least: int = 5
    most: int = 100
    warmup: int = 3
    warmup_seconds: float = 0.1  # clocks rise only under load

    def spent(self, samples: Sequence[float]) -> bool:
        """Has a contestant with these times (seconds) had its share?"""
        return len(samples) >= self.most or (len(samples) >= self.least and sum(samples) >= self.seconds)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile of `n`; `peak_bytes` is what it allocates on the device.

    `stable` when the percentiles are near each other. `graph`: replays of a captured graph; `note` says why not,
    where that was asked for.
    """

    median: float
    p20: float
    p80: float
    n: int
    stable: bool
    peak_bytes: int | None = None
    graph: bool = False
    note: str = ""

    @property
    def spread(self) -> float:
        """The distance of the percentiles as a share of the median."""
        return (self.p80 - self.p20) / self.median if self.median else math.inf


@dataclass(frozen=True)
class Timings:
    """The times of those that came to the end, and what the others raised (type and first line)."""

    times: Mapping[str, Timing] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


class Clock(Protocol):
    """Times one call, from an idle device to the end of its work."""

    def time(self, call: Callable[[], Any], before: Callable[[], Any]) -> float:
        """Seconds of `call`; `before` is work of the device that must have ended, and is not counted."""

    def wait(self) -> float:
        """Wait until the device is idle; the host's time then, in seconds."""


class HostClock:
    """For a CPU: calls return when their work is done."""

    def time(self, call: Callable[[], Any], before: Callable[[], Any]) -> float:
        before()
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    def wait(self) -> float:
        return time.perf_counter()


class DeviceClock:
    """Events on the device's stream, CUDA's or HIP's.

    The host issues the call while the device still executes `before`: launches hide behind it as they do behind real
    work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def time(self, call: Callable[[], Any], before: Callable[[], Any]) -> float:
        torch.cuda.synchronize(self._device)
        before()
        self._start.record()
        call()
        self._end.record()
        torch.cuda.synchronize(self._device)
        return float(self._start.elapsed_time(self._end)) / 1e3

    def wait(self) -> float:
        torch.cuda.synchronize(self._device)
        return time.perf_counter()


def measure(
    calls: Mapping[str, Callable[[], Any] | Call],
    *,
    device: torch.device | str,
    budget: Budget = Budget(),
    flush: bool = True,
    graph: bool = False,
    stable_spread: float = STABLE_SPREAD,
    clock: Clock | None = None,
) -> Timings:
    """Time the contestants in interleaved rounds; one that raises leaves the race, and the others go on.

    `flush` writes over the caches before each timed call; without it, inputs that fit are read from the cache.
    `clock` another than the device's own, for tests.
    """
    device = torch.device(device)
    clock = clock or clock_for(device)
    before = flusher(device) if flush else _nothing
    race = {name: _Contestant(call if isinstance(call, Call) else Call(call), graph) for name, call in calls.items()}
    for contestant in race.values():
        contestant.attempt(partial(contestant.warm_up, device, clock, budget))
    number = 0
    while running := [one for one in race.values() if not one.failed and not budget.spent(one.samples)]:
        first = number % len(running)
        for contestant in [*running[first:], *running[:first]]:
            contestant.attempt(partial(contestant.sample, clock, before))
        number += 1
    return Timings(
        {name: one.timing(stable_spread) for name, one in race.items() if not one.failed},
        {name: one.failed for name, one in race.items() if one.failed},
    )


def summarise(samples: Sequence[float], *, stable_spread: float = STABLE_SPREAD, **more: Any) -> Timing:
    """Median and percentiles of times in seconds, at least one; `more` are further fields of the Timing."""
    low, middle, high = (quantile(samples, share) for share in (0.2, 0.5, 0.8))
    stable = len(samples) > 1 and high - low <= stable_spread * middle
    return Timing(middle, low, high, len(samples), stable, **more)


def quantile(samples: Sequence[float], share: float) -> float:
    """The value below which that share lies, linear between neighbours. ValueError for no samples."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    # As a step from the lower neighbour: for equal neighbours it is exactly their value.
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def clock_for(device: torch.device) -> Clock:
    return DeviceClock(device) if device.type == "cuda" else HostClock()


def flusher(device: torch.device) -> Callable[[], Any]:
    """Writes a buffer at least twice as large as the L2 that the device tells of."""
    kind = device.type if device.type != "cuda" else "hip" if torch.version.hip else "cuda"
    told = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    buffer = torch.empty(max(2 * told, FLUSH_BYTES[kind]) // 4, dtype=torch.int32, device=device)
    return lambda: buffer.zero_()


def first_line(error: BaseException) -> str:
    """An exception for a table: its type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _nothing() -> None:
    return None


class _Contestant:
    """One contestant's samples so far."""

    def __init__(self, call: Call, graph: bool) -> None:
        self.call = call
        self.wants_graph = graph
        self.replay: Callable[[], Any] | None = None
        self.note = ""
        self.samples: list[float] = []
        self.peak: int | None = None
        self.failed = ""

    def attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # whatever a contestant raises is its own failure
            self.failed = first_line(error)

    def warm_up(self, device: torch.device, clock: Clock, budget: Budget) -> None:
        self.call.ready()()  # compiles, tunes, makes handles: what it allocates for that is not a call's
        self.peak = peak_bytes(self.call, device)
        begun = clock.wait()
        for done in range(budget.most):
            if done >= budget.warmup and clock.wait() - begun >= budget.warmup_seconds:
                break
            self.call.ready()()
        clock.wait()
        if self.wants_graph:
            self.replay, self.note = captured(self.call, device)

    def sample(self, clock: Clock, before: Callable[[], Any]) -> None:
        self.samples.append(clock.time(self.replay or self.call.ready(), before))

    def timing(self, stable_spread: float) -> Timing:
        return summarise(
            self.samples,
            stable_spread=stable_spread,
            peak_bytes=self.peak,
            graph=self.replay is not None,
            note=self.note,
        )


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Bytes that one call allocates at most beyond what is there when it begins; None where nobody counts them."""
    if device.type != "cuda":
        return None
    ready = call.ready()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    begun = torch.cuda.memory_allocated(device)
    kept = ready()
    torch.cuda.synchronize(device)
    peak = int(torch.cuda.max_memory_allocated(device)) - int(begun)
    del kept
    return peak


def captured(call: Call, device: torch.device) -> tuple[Callable[[], Any] | None, str]:
    """(replay, "") of the call captured as a graph; (None, reason) where it cannot be.

    A backward pass runs on its forward's stream, so preparing happens on the capturing stream too.
    """
    if device.type != "cuda":
        return None, "no graph: a CPU has none"
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    try:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                call.ready()()
            ready = call.ready()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=stream):
            kept = ready()
        torch.cuda.synchronize(device)
        graph.replay()
        torch.cuda.synchronize(device)
    except Exception as error:  # a host sync, an allocation, a library that cannot: eager then
        return None, f"no graph: {first_line(error)}"

    def replay(_held: Any = (ready, kept)) -> None:  # a graph reads and writes memory that must stay theirs
        graph.replay()

    return replay, ""
