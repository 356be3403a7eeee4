"""What a suite is: cases, implementations, a truth to compare them with, and the work that a case cannot do without.

Everything else (processes, timing, floors, events) is the room's. A suite is one file with one object of this shape;
`SUITES` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from radeon_stack.figures import Case
from radeon_stack.workloads.bench.timing import Call

SUITES = {name: f"radeon_stack.workloads.bench.{name}:SUITE" for name in ("attention", "gating", "ffn", "linear")}


class Missing(Exception):  # noqa: N818  # not an error: an answer
    """An implementation is not there, or does not take the case; the text says which, and why."""


@dataclass(frozen=True)
class Work:
    """The least that must be done: bytes moved (each input read once, each output written once) and operations.

    A multiply-add is two operations; `dtype` is torch's name for it (`bfloat16`), whose matrix rate is the ceiling.
    `tokens` are those that pass through, where a rate of them says something.
    """

    bytes: float
    operations: float
    dtype: str
    tokens: int = 0


@dataclass(frozen=True)
class Built:
    """An implementation, ready for one case.

    `results` runs it once and gives each result by its name (`out`, `dq` …), laid out as the truth is; `calls` are
    what is timed, by phase (`forward`, `backward`). `values` are further figures, `note` says what exactly it is.
    `work` is its own least work where that is not the case's (weights in 4 bit are fewer bytes), and `exact` the
    setting whose truth it is held to where it does not have the shared one's weights (they were quantised). `timed`
    is false where its times would say nothing (interpreted kernels).
    """

    results: Callable[[], Mapping[str, Any]]
    calls: Mapping[str, Call]
    note: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    work: Mapping[str, Work] = field(default_factory=dict)
    exact: Any = None
    timed: bool = True


class Suite(Protocol):
    """A benchmark."""

    @property
    def name(self) -> str: ...

    @property
    def address(self) -> str:
        """`module:attribute`, by which a child process finds it."""

    @property
    def implementations(self) -> Sequence[str]:
        """Their names, in the order of the table."""

    @property
    def results(self) -> Mapping[str, str]:
        """The phase that each result belongs to: `{"out": "forward", "dq": "backward"}`."""

    def cases(self, config: Any) -> list[Case]:
        """The cases of a configuration (`contracts.bench`)."""

    def dtype(self, case: Case) -> str:
        """torch's name of the dtype whose matrix rate bounds the case."""

    def work(self, case: Case) -> Mapping[str, Work]:
        """The least work of each phase."""

    def setting(self, case: Case, device: Any, seed: int) -> Any:
        """Inputs of a case, drawn anew from the seed; all implementations share them."""

    def build(self, name: str, setting: Any) -> Built:
        """An implementation for these inputs. Missing when it is not there or does not take them."""

    def truth(self, setting: Any) -> tuple[Mapping[str, Any], str]:
        """The results in float64, of the whole or of a part, and what part ("" for the whole)."""

    def part(self, setting: Any, results: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of an implementation's results that `truth` is the truth of."""

    def limit(self, case: Case) -> float:
        """The relative difference from the truth above which a result is wrong."""


def find_suite(address: str) -> Suite:
    """The suite at `module:attribute`."""
    module, _, attribute = address.partition(":")
    suite: Suite = getattr(import_module(module), attribute)
    return suite
