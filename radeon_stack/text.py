"""Untrusted text on a terminal: logs, models, labels, sysfs and bundles must not drive it."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

GONE = (errno.EPIPE, errno.EIO)  # of a pipe whose reader ended, of a terminal that was closed


def printable(text: str) -> str:
    """Text without control and direction characters."""
    return "".join(char if char.isprintable() or char == "\n" else "�" for char in text)


def one_line(text: str, limit: int = 100) -> str:
    """On one line of so many characters at most."""
    line = " ".join(printable(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Print it, made harmless."""
    print(printable(text), file=stream or sys.stdout)


def print_wrapped(text: str) -> None:
    """Print a line, made harmless; on a terminal that is too narrow it goes on, indented, at a word."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(
            printable(text), width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
    print_line(text)


def prepare_streams() -> None:
    """What a stdout or stderr that is not UTF-8 cannot tell becomes a question mark; a closed one leads nowhere."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - for as long as we live
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - for as long as we live
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def even_unheard() -> Iterator[None]:
    """Print what can be printed: a reader that has gone does not keep us from what follows."""
    try:
        yield
    except OSError as error:
        if error.errno not in GONE:
            raise
    finally:
        silence_unheard()


def silence_unheard() -> None:
    """What a stdout or stderr without a reader still gets, at the interpreter's exit too, goes nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno not in GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
