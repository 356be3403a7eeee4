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
from dataclasses import dataclass
from typing import Any, NoReturn

PIECE = 1 << 16
LONGEST_REASON = 200


@dataclass(frozen=True)
class Answers:
    """What the probes gave, by their names; those that were not back in time; and why others broke."""

    found: Mapping[str, Any]
    late: frozenset[str]
    broken: Mapping[str, str]


def together(probes: Mapping[str, Callable[[], Any]], seconds: float) -> Answers:
    """Run the probes side by side for so long at most. What they return is pickled; None is no answer."""
    deadline = time.monotonic() + seconds
    sys.stdout.flush()  # a child must not have a copy of what is not printed yet
    sys.stderr.flush()
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
        for key in list(waiting.get_map().values()):
            os.close(key.fd)
    for pid in children.values():
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # with what it has started
        os.waitpid(pid, os.WNOHANG)  # one that hangs in the kernel is reaped by init
    ended = {name: _answer(text) for name, text in texts.items() if name not in children}
    return Answers(
        {name: value for name, (value, why) in ended.items() if not why and value is not None},
        frozenset(children),
        {name: why for name, (_, why) in ended.items() if why},
    )


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
        os.setsid()
        # Whoever reads our output must not wait for a child that stays behind.
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        try:
            told = pickle.dumps((work(), ""))
        except Exception as error:  # its facts stay unknown, and its checks say why
            told = pickle.dumps((None, f"{type(error).__name__}: {error}"[:LONGEST_REASON]))
        with os.fdopen(answer, "wb") as pipe:
            pipe.write(told)
    finally:
        os._exit(0)


def _answer(text: bytearray) -> tuple[Any, str]:
    try:
        value, why = pickle.loads(text)  # noqa: S301 - of our own child
    except (EOFError, pickle.UnpicklingError, ValueError, TypeError):
        return None, "it ended without an answer"
    return value, str(why)
