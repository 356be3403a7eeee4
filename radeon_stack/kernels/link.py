"""The way between a device's memory and the host's, on a stream of its own. On a CPU its copies are plain ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from radeon_stack.kernels.sizes import next_power

PROBE_BYTES = 64 << 20


class Link:
    """Copies to the host and back, beside what computes. `limit`: bytes of the host's memory that it may take."""

    def __init__(self, device: torch.device, limit: int) -> None:
        self.device, self.limit = device, limit
        self.taken = 0  # bytes
        self._runtime = getattr(torch, device.type)
        self._pins = device.type != "cpu"
        self._stream = self._runtime.Stream()
        self._free: list[Tensor] = []

    def leave(self, tensor: Tensor) -> Kept | None:
        """Send it to the host. None where that has no room."""
        room = self._take(tensor.nbytes)
        if room is None:
            return None
        self._stream.wait_stream(self.computing())
        with self._runtime.stream(self._stream):
            _bytes(room, tensor.nbytes).copy_(_bytes(tensor, tensor.nbytes), non_blocking=True)
        return Kept(self, tensor, room, self._mark())

    def fetch(self, room: Tensor, value: Tensor) -> Any:
        """Fill `value` with what lies in the host's memory; the event after which it is there."""
        self._stream.wait_stream(self.computing())  # who had that memory before may be at work on it
        with self._runtime.stream(self._stream):
            _bytes(value, value.nbytes).copy_(_bytes(room, value.nbytes), non_blocking=True)
        return self._mark()

    def computing(self) -> Any:
        """The stream that computes."""
        return self._runtime.current_stream()

    def free(self, room: Tensor) -> None:
        """For the next: whatever still reads it does so on this stream, before the next comes."""
        self._free.append(room)

    def settle(self) -> None:
        """Nothing that computes from here on overtakes a copy that is under way."""
        self.computing().wait_stream(self._stream)

    def bytes_per_second(self) -> float:
        """What it carries to the host, measured now; waits for the device."""
        there = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=self.device)
        room = self._pinned(PROBE_BYTES)
        if room is None:
            return 0.0
        with self._runtime.stream(self._stream):
            room.copy_(there, non_blocking=True)  # the first is slower
            begin = self._mark(timed=True)
            room.copy_(there, non_blocking=True)
            end = self._mark(timed=True)
        end.synchronize()
        return PROBE_BYTES / (float(begin.elapsed_time(end)) / 1e3)

    def close(self) -> None:
        """Give the host its memory back, once all copies are made."""
        if self._pins:
            self._stream.synchronize()
        self._free.clear()
        # torch keeps what was pinned for the next who asks; it says no other way to have it give that back.
        if self._pins and (give_back := getattr(torch._C, "_host_emptyCache", None)):
            give_back()

    def _take(self, size: int) -> Tensor | None:
        fitting = [room for room in self._free if room.nbytes >= size]
        if fitting:
            best = min(fitting, key=lambda room: room.nbytes)
            self._free = [room for room in self._free if room is not best]
            return best
        whole = next_power(size) if self._pins else size  # what torch takes for it
        room = self._pinned(size) if self.taken + whole <= self.limit else None
        if room is None:
            self.limit = self.taken
        else:
            self.taken += whole
        return room

    def _pinned(self, size: int) -> Tensor | None:
        """Bytes of the host's that a copy engine may reach; None where the driver refuses them."""
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pins)
        except RuntimeError:
            return None

    def _mark(self, *, timed: bool = False) -> Any:
        event = self._runtime.Event(enable_timing=True) if timed else self._runtime.Event()
        event.record(self._stream)
        return event


class Kept:
    """A tensor that is on its way to the host, there, or on its way back."""

    def __init__(self, link: Link, value: Tensor, room: Tensor | None = None, left: Any = None) -> None:
        """room: where it goes to in the host's memory, complete after the event `left`; None: it stays where it is."""
        self._link, self._room, self._left = link, room, left
        self._value: Tensor | None = value
        self._shape, self._dtype = value.shape, value.dtype
        self._back: Any = None

    def let_go(self) -> None:
        """The device's memory can be had by others, once the copy is made."""
        if self._room is not None:
            self._link.computing().wait_event(self._left)
            self._value = None

    def fetch(self) -> None:
        """Have it come back."""
        if self._value is None and self._room is not None:
            self._value = torch.empty(self._shape, dtype=self._dtype, device=self._link.device)
            self._back = self._link.fetch(self._room, self._value)

    def take(self) -> Tensor:
        """It, on the device; once."""
        self.fetch()
        value = self._value
        if value is None:
            raise RuntimeError("taken before")
        self._end()
        return value

    def _end(self) -> None:
        if self._back is not None:
            self._link.computing().wait_event(self._back)
        if self._room is not None:
            self._link.free(self._room)
        self._value = self._room = self._back = None

    def __del__(self) -> None:  # of a graph that nobody went back through
        self._end()


def _bytes(tensor: Tensor, size: int) -> Tensor:
    return tensor.view(-1).view(torch.uint8)[:size]
