"""Signals that ask us to end: counted while something is kept, in place of dying of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interrupts:
    """How often we were asked."""

    count: int = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # A closed terminal is told by the kernel and by its shell: that is one wish, not two.
        if number != signal.SIGHUP or not self.count:
            self.count += 1


@contextmanager
def interrupted() -> Iterator[Interrupts]:
    """Counts SIGINT, SIGTERM and SIGHUP instead of dying of them; under nohup SIGHUP stays ignored.

    Within another one it is that one's counter: what a sweep is asked, its member is, and none of it falls between two.
    """
    outer = signal.getsignal(signal.SIGINT)
    if isinstance(outer, Interrupts):
        yield outer
        return
    counter = Interrupts()
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = (signal.SIGINT, signal.SIGTERM, *(() if nohup else (signal.SIGHUP,)))
    old = {number: signal.signal(number, counter) for number in numbers}
    try:
        yield counter
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
