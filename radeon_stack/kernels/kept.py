"""Products of layers that are computed again, waiting until then: in the host's memory, and the smallest on the device.

A layer's widest products cost as much the second time as the first. Copied to the host while the next layers compute,
and back before they are wanted, they cost a transfer beside the computing. How many of a layer fit is measured: what
the link carries in the time that a layer takes, and fewer if layers then take longer. They are the same bits, so
results do not depend on it.

The adapters' own products, x·aᵀ, are as narrow as their rank, and to compute one is to read all of x: of Llama-8B at
rank 64 those of all layers together take what a single layer's widest does. They stay where they are, if a share of the
memory that a step leaves is enough for them.

The way back begins with the last layers, whose products would hardly have left before they are wanted. They stay on the
device, and the link does not bound how many. While the last layer of the model goes back its own are there in any case,
kept or computed again; those of the one before it come on top, as elsewhere those do that are being fetched. Where only
some layers are computed again, which go back later, both may.

Of the very last all that autograd saves may stay, and it is not computed again at all. While it goes back that is there
in any case as well; kept, it is there while the head computes too. The peak is higher for it only where the head takes
more than a layer's way back does beyond what was saved, as tiles of logits do beside few rows, or where layers follow
that are not computed again. So it is bounded as products are: by a share of the room. Eager attention saves more a row
in longer sequences; what was saved of the first ones is taken for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from radeon_stack.kernels.linear import Given
from radeon_stack.kernels.link import Kept, Link

# Nothing writes over what these give, as Liger's RoPE does with queries and keys.
NAMES = ("gate_proj", "up_proj", "gate_up_proj", "o_proj", "v_proj")
ITEM_BYTES = 2
LEAST_ROWS = 1024  # with fewer, a step waits for the host, which would have more to do
MEASURED_PASSES = 3  # of which the quickest counts: in the first ones kernels are compiled and memory is taken
SETTLED_PASSES = 2  # after a decision, before it is judged: the host's memory is taken
LONGER = 1.08  # than without: so much is too much
SHARE_OF_DEVICE = 0.25  # of the memory that a step leaves: of two layers' products it is needed at once
STAYING = 2  # last layers whose products stay on the device
KEEP = "radeon_keep"  # a module's attribute in the first pass: who takes its results
GIVEN = "radeon_given"  # and in the second: what of them was kept

Keep = Callable[[Tensor, Tensor | None], None]


def keep_of(module: nn.Module) -> Keep | None:
    """To be called with what a module computes, and its adapter's small product; None where neither was asked for."""
    taker: Keep | None = module.__dict__.get(KEEP)
    return taker


def given(module: nn.Module) -> Given:
    """What a module computed in the first pass, as far as it was kept."""
    value: Given = module.__dict__.get(GIVEN, Given())
    return value


@dataclass(frozen=True)
class Left:
    """What a module's first pass leaves for its second: its product, and its adapter's, [rows, rank]."""

    product: Kept | None
    u: Tensor | None


Pass = dict[nn.Module, Left]


@dataclass(frozen=True)
class Decision:
    """What waits of a layer."""

    names: tuple[str, ...] = ()
    """Whose products, by their paths in it."""
    last: tuple[str, ...] = ()
    """The same of the last layers, where they stay on the device."""
    adapters: bool = False
    """Whether all adapters' small products, of every layer."""
    graph: bool = False
    """Whether all that autograd saves of the last layer."""
    row_seconds: float = 0.0
    """What a layer took a row without."""
    link: float = 0.0
    """Bytes a second."""
    rows: float = float("inf")
    """Of a pass at most. Of more nothing is kept: what room they leave is not known yet."""


class Keeper:
    """Decides which products of a layer wait in the host's memory, and has them there and back."""

    def __init__(self, layers: Sequence[nn.Module], link: Link, heeds: Callable[[nn.Module], bool]) -> None:
        """layers: those that are computed again, in their order. heeds: whether a module does `keep_of` and `given`."""
        self.decision: Decision | None = None
        self._first, self._last, self._staying = layers[0], layers[-1], layers[-STAYING:]
        self._link = link
        self._modules = {layer: heeding(layer, heeds) for layer in layers}
        self._clock = _Clock(len(layers) - 1)
        self._times: list[float] = []
        self._stack: list[Pass] = []
        self._most = 0  # rows of a pass until now
        self._saved = float("inf")  # bytes a row of the last layer, by autograd

    @contextmanager
    def first_pass(self, layer: nn.Module, hidden: Tensor) -> Iterator[Pass]:
        """While a layer computes for the first time: what it keeps, complete at the end."""
        rows = count_rows(hidden)
        if layer is self._first:
            self._stack.clear()
            self._link.settle()
            self._decide(rows)
        elif layer is self._last:
            self._clock.end()
        kept: Pass = {}
        takers = self._takers(layer, kept, self._decided(rows))
        for module, taker in takers.items():
            module.__dict__[KEEP] = taker
        try:
            yield kept
        finally:
            for module in takers:
                del module.__dict__[KEEP]
        for one in products(self._stack[-1]) if self._stack else ():
            one.let_go()
        self._stack.append(kept)

    @contextmanager
    def second_pass(self, kept: Pass) -> Iterator[None]:
        """While a layer computes again: its modules are given what was kept, and the layer's before it comes."""
        while self._stack and self._stack.pop() is not kept:
            pass
        modules = list(kept)
        for module in modules:  # once: a graph that is gone through again computes them
            left = kept.pop(module)
            module.__dict__[GIVEN] = Given(left.product.take() if left.product is not None else None, left.u)
        for one in products(self._stack[-1]) if self._stack else ():
            one.fetch()
        try:
            yield
        finally:
            for module in modules:
                module.__dict__.pop(GIVEN, None)

    def notice(self, layer: nn.Module, saved: float) -> None:
        """What autograd saves of a layer, in bytes a row."""
        if layer is self._last:
            self._saved = saved

    def keeps_all(self, layer: nn.Module, hidden: Tensor) -> bool:
        """Whether all that autograd saves of a layer stays, so that it need not be computed again."""
        return layer is self._last and self._decided(count_rows(hidden)).graph

    def close(self) -> Mapping[str, Any]:
        """Give the host its memory back; what there is to tell."""
        decision, self.decision = self.decision or Decision(), Decision()
        told = {
            "kept": list(decision.names),
            "last": list(decision.last),
            "adapters": decision.adapters,
            "graph": decision.graph,
        }
        if decision.names:
            told |= {"host_bytes": self._link.taken, "link_bytes_per_second": round(decision.link)}
        self._link.close()
        self._stack.clear()
        return told

    def _decided(self, rows: int) -> Decision:
        """For a pass of so many."""
        decision = self.decision
        return decision if decision is not None and LEAST_ROWS <= rows <= decision.rows else Decision()

    def _takers(self, layer: nn.Module, kept: Pass, decision: Decision) -> dict[nn.Module, Keep]:
        stays = layer in self._staying
        names, leave = (decision.last, partial(Kept, self._link)) if stays else (decision.names, self._link.leave)

        def take(module: nn.Module, waits: bool, product: Tensor, u: Tensor | None) -> None:
            kept[module] = Left(leave(product) if waits else None, u if decision.adapters else None)

        return {
            module: partial(take, module, path in names)
            for path, module in self._modules[layer].items()
            if decision.adapters or path in names
        }

    def _decide(self, rows: int) -> None:
        seconds = self._clock.read()
        if self.decision and self._most > self.decision.rows:  # now it is known
            self.decision = self._fitting(self._most, self.decision.row_seconds)
        if rows >= max(LEAST_ROWS, self._most / 2):  # of fewer a row takes longer
            self._clock.begin(rows)
        most, self._most = self._most, max(self._most, rows)
        if seconds is None:
            return
        self._times.append(seconds)
        if self.decision is None and len(self._times) == MEASURED_PASSES:
            self.decision = self._fitting(most, min(self._times))
            self._times.clear()
        elif self.decision and len(self._times) > SETTLED_PASSES and seconds > LONGER * self.decision.row_seconds:
            self.decision = replace(self.decision, names=self.decision.names[:-1])
            self._times.clear()

    def _fitting(self, rows: int, seconds: float) -> Decision:
        """For passes of up to `rows`, the most until now: of what the largest left, a share."""
        link, room = self._link.bytes_per_second(), device_room(self._link.device) / rows
        layers = self._modules.values()
        small = sum(ITEM_BYTES * module.rank for layer in layers for module in layer.values())
        adapters = small <= SHARE_OF_DEVICE * room
        room = SHARE_OF_DEVICE * (room - small * adapters)
        widest = max(map(candidates, layers), key=lambda one: sum(one.values()))
        names = fitting(widest, min(link * seconds, room))
        return Decision(names, fitting(widest, room), adapters, self._saved <= room, seconds, link, rows)


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


def count_rows(hidden: Tensor) -> int:
    """Of […, columns]."""
    return hidden.numel() // hidden.shape[-1]


def heeding(layer: nn.Module, heeds: Callable[[nn.Module], bool]) -> dict[str, Any]:
    """By their paths in a layer, the modules of which something may wait."""
    return {path: module for path, module in layer.named_modules() if heeds(module)}


def candidates(modules: Mapping[str, Any]) -> dict[str, int]:
    """Of these, by their paths, those whose products may wait: the bytes of a row."""
    return {
        path: ITEM_BYTES * module.out_features for path, module in modules.items() if path.rpartition(".")[2] in NAMES
    }


def products(kept: Pass) -> list[Kept]:
    """Those that wait."""
    return [left.product for left in kept.values() if left.product is not None]


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
