"""Products of layers that are computed again, waiting in the host's memory until then.

A layer's widest products cost as much the second time as the first. Copied to the host while the next layers compute,
and back before they are wanted, they cost a transfer beside the computing. How many of a layer fit is measured: what
the link carries in the time that a layer takes, and fewer if layers then take longer. They are the same bits, so
results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from radeon_stack.kernels.link import Kept, Link

# Nothing writes over what these give, as Liger's RoPE does with queries and keys.
NAMES = ("gate_proj", "up_proj", "gate_up_proj", "o_proj", "v_proj")
ITEM_BYTES = 2
LEAST_ROWS = 1024  # with fewer, a step waits for the host, which would have more to do
MEASURED_PASSES = 3  # of which the quickest counts: in the first ones kernels are compiled and memory is taken
SETTLED_PASSES = 2  # after a decision, before it is judged: the host's memory is taken
LONGER = 1.08  # than without: so much is too much
SHARE_OF_DEVICE = 0.25  # of the memory that a step leaves: of two layers' it is needed at once
KEEP = "radeon_keep"  # a module's attribute in the first pass: who takes its result
GIVEN = "radeon_given"  # and in the second: that result

Pass = dict[nn.Module, Kept]


def keep(module: nn.Module, result: Tensor) -> None:
    """To be called with what a module computed: it is kept, where that was asked for."""
    if (taker := module.__dict__.get(KEEP)) is not None:
        taker(result)


def given(module: nn.Module) -> Tensor | None:
    """What a module computed in the first pass, where it was kept."""
    value: Tensor | None = module.__dict__.get(GIVEN)
    return value


@dataclass(frozen=True)
class Decision:
    """Whose products wait (paths in a layer), seconds that a layer takes a row, and bytes a second of the link."""

    names: tuple[str, ...]
    row_seconds: float
    link: float


class Keeper:
    """Decides which products of a layer wait in the host's memory, and has them there and back."""

    def __init__(self, layers: Sequence[nn.Module], link: Link, heeds: Callable[[nn.Module], bool]) -> None:
        """layers: those that are computed again, in their order. heeds: whether a module calls `keep` and `given`."""
        self.decision: Decision | None = None
        self._first, self._last = layers[0], layers[-1]
        self._link = link
        self._candidates = {layer: candidates(layer, heeds) for layer in layers}
        self._clock = _Clock(len(layers) - 1)
        self._times: list[float] = []
        self._stack: list[Pass] = []

    @contextmanager
    def first_pass(self, layer: nn.Module, hidden: Tensor) -> Iterator[Pass]:
        """While a layer computes for the first time: what it keeps, complete at the end."""
        rows = hidden.numel() // hidden.shape[-1]
        if layer is self._first:
            self._stack.clear()
            self._link.settle()
            self._decide(rows)
        elif layer is self._last:
            self._clock.end()
        kept: Pass = {}
        taken = self._taken(layer) if rows >= LEAST_ROWS else []
        for module in taken:
            module.__dict__[KEEP] = self._taker(kept, module, stays=layer is self._last)
        try:
            yield kept
        finally:
            for module in taken:
                del module.__dict__[KEEP]
        if self._stack and layer is not self._last:  # what the way back wants first stays
            for one in self._stack[-1].values():
                one.let_go()
        self._stack.append(kept)

    @contextmanager
    def second_pass(self, kept: Pass) -> Iterator[None]:
        """While a layer computes again: its modules are given what was kept, and the layer's before it comes."""
        while self._stack and self._stack.pop() is not kept:
            pass
        modules = list(kept)
        for module in modules:  # once: a graph that is gone through again computes them
            module.__dict__[GIVEN] = kept.pop(module).take()
        for one in self._stack[-1].values() if self._stack else ():
            one.fetch()
        try:
            yield
        finally:
            for module in modules:
                module.__dict__.pop(GIVEN, None)

    def close(self) -> Mapping[str, Any]:
        """Give the host its memory back; what there is to tell."""
        told: dict[str, Any] = {"kept": list(self.decision.names) if self.decision else []}
        if told["kept"] and self.decision:
            told |= {"host_bytes": self._link.taken, "link_bytes_per_second": round(self.decision.link)}
        self._link.close()
        self._stack.clear()
        self.decision = Decision((), 0.0, 0.0)
        return told

    def _taker(self, kept: Pass, module: nn.Module, *, stays: bool) -> Callable[[Tensor], None]:
        def take(result: Tensor) -> None:
            one = Kept(self._link, result) if stays else self._link.leave(result)
            if one is not None:
                kept[module] = one

        return take

    def _taken(self, layer: nn.Module) -> list[nn.Module]:
        names = self.decision.names if self.decision else ()
        return [module for name, (module, _) in self._candidates[layer].items() if name in names]

    def _decide(self, rows: int) -> None:
        seconds = self._clock.read()
        if rows >= LEAST_ROWS:
            self._clock.begin(rows)
        if seconds is None:
            return
        self._times.append(seconds)
        if self.decision is None and len(self._times) == MEASURED_PASSES:
            self.decision = self._fitting(rows, min(self._times))
            self._times.clear()
        elif self.decision and len(self._times) > SETTLED_PASSES and seconds > LONGER * self.decision.row_seconds:
            self.decision = replace(self.decision, names=self.decision.names[:-1])
            self._times.clear()

    def _fitting(self, rows: int, seconds: float) -> Decision:
        link = self._link.bytes_per_second()
        room = min(link * seconds, SHARE_OF_DEVICE * device_room(self._link.device) / rows)
        widths = ({name: width for name, (_, width) in layer.items()} for layer in self._candidates.values() if layer)
        widest = max(widths, key=lambda one: sum(one.values()), default={})
        return Decision(fitting(widest, room), seconds, link)


class _Clock:
    """What a layer takes a row in its first pass, between events on the device; of one pass at a time."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._rows = 0
        self._begin: Any = None
        self._end: Any = None

    def begin(self, rows: int) -> None:
        """The first layer begins."""
        if self._begin is None:
            self._begin, self._rows = _now(), rows

    def end(self) -> None:
        """The last layer begins."""
        if self._begin is not None and self._end is None:
            self._end = _now()

    def read(self) -> float | None:
        """Seconds; None where no pass is over."""
        if self._end is None or not self._end.query():
            return None
        seconds = float(self._begin.elapsed_time(self._end)) / 1e3
        self._begin = self._end = None
        return seconds / self._layers / self._rows


def _now() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def candidates(layer: nn.Module, heeds: Callable[[nn.Module], bool]) -> dict[str, tuple[nn.Module, int]]:
    """By their paths in a layer: modules whose products may wait, and the bytes of a row of them."""
    return {
        path: (module, ITEM_BYTES * module.out_features)
        for path, module in layer.named_modules()
        if path.rpartition(".")[2] in NAMES and heeds(module)
    }


def fitting(widths: Mapping[str, int], room: float) -> tuple[str, ...]:
    """The names whose bytes fit together, the widest first."""
    found, left = [], room
    for name, width in sorted(widths.items(), key=lambda one: -one[1]):
        if width <= left:
            found.append(name)
            left -= width
    return tuple(found)


def device_room(device: torch.device) -> int:
    """Bytes that the steps until now left."""
    free, total = torch.cuda.mem_get_info(device)
    mine = torch.cuda.memory_reserved(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)  # older ones do not tell
    allowed = share(device) * total
    return int(min(free + mine, allowed) - torch.cuda.max_memory_allocated(device))
