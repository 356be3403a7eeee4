"""Versions and ranges of them: ROCm's, the kernel's, a package's.

Numbers are compared as numbers, since ROCm goes 7.2 → 7.9 (previews of a new build system) → 7.14 → 10, and a missing
patch number is 0: `7.2` is `7.2.0`. A range that ends before 7.9 leaves the new line out; nothing does so by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

_NUMBER = re.compile(r"\d+(?:\.\d+)*")
_CLAUSE = re.compile(r"(>=|<=|>|<|==)(\d+(?:\.\d+){0,3})")
LENGTH = 4


def version(text: str) -> tuple[int, ...] | None:
    """The leading numbers of a version: (6, 18, 0, 0) of `6.18.0-rc3-amd64`; None when it begins with none."""
    match = _NUMBER.match(text.strip().removeprefix("v"))
    if match is None or len(match[0]) > 40:
        return None
    numbers = [int(number) for number in match[0].split(".")][:LENGTH]
    return (*numbers, *(0 for _ in range(LENGTH - len(numbers))))


@dataclass(frozen=True)
class Clause:
    """One comparison: `>=7.2`. `==7.2` means every patch of it."""

    sign: str
    bound: tuple[int, ...]
    given: int
    """How many of its numbers were written down."""

    def holds(self, found: tuple[int, ...]) -> bool:
        bound = self.bound
        if self.sign == "==":
            return found[: self.given] == bound[: self.given]
        return {">=": found >= bound, "<=": found <= bound, ">": found > bound, "<": found < bound}[self.sign]


def clauses(text: str) -> tuple[Clause, ...]:
    """The comparisons of `>=7.2 <7.9`, all of which have to hold. ValueError for anything else."""
    found = []
    for word in text.split():
        match = _CLAUSE.fullmatch(word)
        bound = version(match[2]) if match else None
        if match is None or bound is None:
            raise ValueError("a range of versions, such as '>=7.2 <7.9' or '==7.1.1'")
        found.append(Clause(match[1], bound, match[2].count(".") + 1))
    return tuple(found)


def within(text: str, found: str) -> bool | None:
    """Is this version in that range? None when it is no version."""
    numbers = version(found)
    return None if numbers is None else all(clause.holds(numbers) for clause in clauses(text))


def _checked(text: str) -> str:
    clauses(text)
    return text


Range = Annotated[str, AfterValidator(_checked)]
