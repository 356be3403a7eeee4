"""Calls in processes of their own: a compiler that aborts, hangs or runs away ends one call, not the others."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
TAIL = 4000  # characters of what a child printed that are read: Triton prints a whole module when a pass fails


class NoResultError(Exception):
    """A call that ended without a result, and why."""


@dataclass
class _Child:
    index: int
    process: Any
    results: Connection
    printed: Path
    deadline: float


def call_apart(
    calls: Sequence[Callable[[], T]], *, at_once: int = 2, seconds: float = 300.0
) -> Generator[tuple[int, T | NoResultError], None, None]:
    """Make each call in a forked process, so many at once; results come with their index as they are ready.

    What a call prints is not seen, but the end of it is told when the call fails. A call longer than `seconds` is
    killed. Forked, not spawned: the children take over modules that are loaded, and calls that cannot be pickled.
    """
    waiting = list(enumerate(calls))
    running: list[_Child] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    index, call = waiting.pop(0)
                    running.append(_start(index, call, Path(folder, str(index)), seconds))
                left = max(0.0, min(child.deadline for child in running) - time.monotonic())
                wait([child.results for child in running], timeout=left)
                for child in [child for child in running if child.results.poll() or time.monotonic() > child.deadline]:
                    running.remove(child)
                    yield child.index, _end(child, seconds)
        finally:
            for child in running:
                child.process.kill()
                child.process.join()


def _start(index: int, call: Callable[[], T], printed: Path, seconds: float) -> _Child:
    context = get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    process = context.Process(target=_child, args=(call, sending, printed))
    process.start()
    sending.close()
    return _Child(index, process, receiving, printed, time.monotonic() + seconds)


def _child(call: Callable[[], T], sending: Connection, printed: Path) -> None:
    faulthandler.disable()  # a caller's would tell of a crash in the caller's own output
    output = os.open(printed, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        result: T | NoResultError = call()
    except Exception as error:  # whatever a compiler may raise
        result = NoResultError(_told(error))
    sending.send(result)
    sending.close()


def _told(error: BaseException) -> str:
    """What went wrong first, without the source that compilers quote between place and reason."""
    while error.__cause__:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    text = " … ".join(lines) if len(lines) < 3 else f"{lines[0]} … {lines[-1]}"
    return f"{type(error).__name__}: {text[:TAIL]}"


def _end(child: _Child, seconds: float) -> Any:
    """Its result, or why there is none: the pipe's end is reached by a result, by death, or not in time."""
    try:
        if not child.results.poll():
            child.process.kill()
            return NoResultError(f"did not end within {seconds:.0f} s")
        result = child.results.recv()
        return NoResultError(f"{result}{_last_line(child.printed)}") if isinstance(result, NoResultError) else result
    except EOFError:
        child.process.join()
        return NoResultError(_death(child.process.exitcode) + _last_line(child.printed))
    finally:
        child.results.close()
        child.process.join()


def _death(code: int) -> str:
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"crashed: {signal.Signals(-code).name}"
    except ValueError:
        return f"crashed: signal {-code}"


def _last_line(printed: Path) -> str:
    """What it said last that names an error, else what it said last."""
    try:
        text = printed.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text[-TAIL:].splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower() or "assert" in line.lower()] or lines
    return f" ({told[-1][:300]})" if told else ""
