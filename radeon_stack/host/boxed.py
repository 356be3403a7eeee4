"""Probes that may never come back, each in a child process of its own and within a fixed time.

Not threads: a read that the kernel does not end (a hung GPU's sysfs, a dead NFS server) keeps its whole process from
ending. A child that hangs so is left to init, and we end in time.
"""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

PIECE = 1 << 16


def together(probes: Mapping[str, Callable[[], Any]], seconds: float) -> tuple[dict[str, Any], frozenset[str]]:
    """What each probe gave, and the names of those that were not back in time.

    Probes run side by side; what they return is pickled. One that raises, or gives None, is in neither.
    """
    deadline = time.monotonic() + seconds
    sys.stdout.flush()  # a child must not have a copy of what is not printed yet
    sys.stderr.flush()
    found: dict[str, Any] = {}
    texts = {name: bytearray() for name in probes}
    children: dict[str, int] = {}
    with selectors.DefaultSelector() as waiting:
        for name, work in probes.items():
            children[name], descriptor = _begin(work)
            waiting.register(descriptor, selectors.EVENT_READ, name)
        while waiting.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                piece = os.read(key.fd, PIECE)
                texts[key.data] += piece
                if not piece:
                    waiting.unregister(key.fd)
                    os.close(key.fd)
                    os.waitpid(children.pop(key.data), 0)
                    with suppress(EOFError, pickle.UnpicklingError):
                        found[key.data] = pickle.loads(texts[key.data])  # noqa: S301 - of our own child
        for key in list(waiting.get_map().values()):
            os.close(key.fd)
    for pid in children.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, os.WNOHANG)  # one that hangs in the kernel is reaped by init
    return {name: value for name, value in found.items() if value is not None}, frozenset(children)


def _begin(work: Callable[[], Any]) -> tuple[int, int]:
    """A child at its work, and where its answer is read."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        _work(work, theirs)
    os.close(theirs)
    return pid, ours


def _work(work: Callable[[], Any], answer: int) -> NoReturn:
    try:
        # Whoever reads our output must not wait for a child that stays behind.
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        with os.fdopen(answer, "wb") as pipe:
            pipe.write(pickle.dumps(work()))
    finally:
        # A probe that breaks leaves its facts unknown, and its checks say so.
        os._exit(0)
