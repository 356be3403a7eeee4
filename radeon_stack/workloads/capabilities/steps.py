"""What a question is made of, and what the two sides of its process say to each other. Standard library alone.

A question is a function that yields steps. Each step is announced before it is run: when the process dies, what
killed it is known. The child writes one JSON object a line to a pipe of its own, as libraries print to stdout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

MAX_DETAIL = 500


class MissingError(Exception):
    """What the question is about is not there; the message says what."""


@dataclass(frozen=True)
class Measured:
    """A step's outcome: relative error and what it may be (None: nothing to compare), time in ms, and a remark."""

    error: float | None = None
    tolerance: float | None = None
    milliseconds: float | None = None
    remark: str = ""


@dataclass(frozen=True)
class Step:
    """One thing that can go wrong by itself."""

    name: str
    run: Callable[[], Measured]


@dataclass(frozen=True)
class Question:
    """`run` is `module:function`, called with the seed and `arguments`; it yields steps.

    `imports` are loaded before the question's time begins. `gpu`: there is nothing to ask without one. `cuda`: of
    CUDA alone. `risky`: the named gfx families have been seen to hang the host, so it is asked there by name only.
    `long`: it takes minutes, and is asked by name only.
    """

    name: str
    run: str
    arguments: Mapping[str, str | int] = field(default_factory=dict)
    imports: tuple[str, ...] = ("torch",)
    gpu: bool = False
    cuda: bool = False
    risky: tuple[str, ...] = ()
    long: bool = False


Steps = Iterator[Step]


def shortened(text: str) -> str:
    """A message on one line, cut to what an answer may hold."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_DETAIL else line[: MAX_DETAIL - 1] + "…"
