"""Untrusted text on a terminal: logs, models, labels, sysfs and bundles must not drive it."""

from __future__ import annotations

import sys
from typing import TextIO


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
