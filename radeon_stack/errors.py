"""The errors a person sees: what is wrong, where, and what to do about it."""

from __future__ import annotations

import re
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes; scripts rely on them."""

    OK = 0
    USAGE = 2
    MACHINE = 3
    BUILD = 4
    IMAGE = 5
    WORKLOAD = 6
    CHECK = 7
    INTERRUPTED = 130


class StackError(Exception):
    """An expected failure, told in one line and ended with its own exit code."""

    exit_code: Exit = Exit.WORKLOAD

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}; {self.remedy}" if self.remedy else line


def about_run(remedy: str, run: str) -> str:
    """A remedy with the run's id: where it was written that was not known, and it says RUN."""
    return re.sub(r"(?<=--resume )RUN\b|(?<=runs logs )RUN\b", lambda _: run, remedy)


class UsageError(StackError):
    """A bad recipe, a bad value, a name that does not exist."""

    exit_code = Exit.USAGE


class MachineError(StackError):
    """This machine cannot do it."""

    exit_code = Exit.MACHINE


class BuildError(StackError):
    """An image did not build."""

    exit_code = Exit.BUILD


class ImageError(StackError):
    """An image cannot be had."""

    exit_code = Exit.IMAGE


class WorkloadError(StackError):
    """The workload failed."""

    exit_code = Exit.WORKLOAD


class CheckError(StackError):
    """A check or a comparison did not hold."""

    exit_code = Exit.CHECK
