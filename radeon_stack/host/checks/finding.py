"""What a check finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from radeon_stack.host.facts import Facts

F = TypeVar("F")
"""What is judged: the facts of a machine, or those of a cluster."""


class State(StrEnum):
    """`skipped`: it does not apply here, or its facts are not known; its evidence says which."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Fix:
    """A command that `--fix` may run, safe and reversible, and the one that takes it back; argv lists."""

    run: tuple[str, ...]
    undo: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """A state with its evidence; `remedy` are commands to paste, one a line."""

    state: State
    evidence: str
    remedy: tuple[str, ...] = ()
    fixes: tuple[Fix, ...] = ()


@dataclass(frozen=True)
class Check(Generic[F]):
    """One question about a machine, or about a cluster. Its code is stable: people search for it."""

    code: str
    title: str
    evaluate: Callable[[F], Finding]


def ok(evidence: str) -> Finding:
    return Finding(State.OK, evidence)


def warn(evidence: str, *remedy: str, fixes: tuple[Fix, ...] = ()) -> Finding:
    return Finding(State.WARN, evidence, remedy, fixes)


def fail(evidence: str, *remedy: str, fixes: tuple[Fix, ...] = ()) -> Finding:
    return Finding(State.FAIL, evidence, remedy, fixes)


def skipped(evidence: str) -> Finding:
    return Finding(State.SKIPPED, evidence)


def as_root(facts: Facts, command: str) -> str:
    """The command as this user has to type it."""
    return command if facts.machine.user.uid == 0 else f"sudo {command}"
