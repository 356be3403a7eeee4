"""Faults of others that are known, and what is done about them: `known_issues.toml`, typed and matched.

`doctor` lists those that this machine can meet, `run` puts their mitigations into the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.resources import as_file, files
from typing import Annotated

from pydantic import Field

from radeon_stack.catalog.platforms import EnvName, EnvValue, Names
from radeon_stack.catalog.problems import nearest
from radeon_stack.catalog.tables import Table, read_table, typed
from radeon_stack.catalog.versions import Range, within
from radeon_stack.errors import UsageError

Id = Annotated[str, Field(pattern=r"^RS-KI-\d{3}$")]
Link = Annotated[str, Field(pattern=r"^https://[A-Za-z0-9./#_-]+$")]


class Issue(Table):
    """One fault. What a range leaves open is met by every version; `least_gpus` is how many a run has to use, over at
    least `least_nodes` machines.
    """

    id: Id
    title: str = Field(min_length=1)
    gfx: Names = ()
    rocm: Range = ""
    kernel: Range = ""
    components: dict[str, Range] = Field({}, description="packages of the image, by name")
    least_gpus: int = Field(1, ge=0)
    least_nodes: int = Field(1, ge=1)
    integrated: bool = Field(False, description="only where an integrated GPU is beside a card")
    symptom: str = Field(min_length=1)
    consequence: str = Field(min_length=1)
    env: dict[EnvName, EnvValue] = Field({}, description="what a run sets by itself")
    setting: str = Field("", description="what a person can do, where no variable helps")
    handled: str = Field("", description="what we do about it by ourselves")
    links: Annotated[tuple[Link, ...], Field(strict=False, min_length=1)]
    checked: date
    fixed_in: str = Field("", description="'' : no release with a fix is known")


class IssueFile(Table):
    """The file as a whole."""

    issue: Annotated[tuple[Issue, ...], Field(strict=False)]


@dataclass(frozen=True)
class Setup:
    """What an issue is looked up for; "" and absent: not known."""

    gfx: frozenset[str]
    gpus: int
    rocm: str = ""
    kernel: str = ""
    components: Mapping[str, str] | None = None
    integrated: bool = False
    nodes: int = 1
    """Machines that the GPUs are in."""


@dataclass(frozen=True)
class Mitigation:
    """Variables that an issue asks for."""

    id: str
    env: Mapping[str, str]
    why: str


@cache
def load_issues() -> tuple[Issue, ...]:
    """All issues, in the file's order. UsageError names file and key of a bad entry."""
    with as_file(files("radeon_stack.host") / "known_issues.toml") as path:
        found = typed(IssueFile, read_table(path), path).issue
        twice = {issue.id for issue in found if sum(other.id == issue.id for other in found) > 1}
        if twice:
            raise UsageError(f"{min(twice)} is there twice", where=str(path))
    return found


def met_by(setup: Setup, issues: tuple[Issue, ...] | None = None) -> tuple[Issue, ...]:
    """The issues that this setup can meet. A version that is not known may be a faulty one."""
    return tuple(issue for issue in (load_issues() if issues is None else issues) if _met(issue, setup))


def mitigations(setup: Setup, without: tuple[str, ...] = ()) -> tuple[Mitigation, ...]:
    """What the issues of this setup ask for, but those named in `without`. UsageError when that names no issue."""
    known = [issue.id for issue in load_issues()]
    for name in without:
        if name not in known:
            raise UsageError(f"no known issue '{name}'; {nearest(name, known)}", where="--without")
    asking = (issue for issue in met_by(setup) if issue.env and issue.id not in without)
    return tuple(Mitigation(issue.id, issue.env, issue.title) for issue in asking)


def _met(issue: Issue, setup: Setup) -> bool:
    if issue.gfx and not setup.gfx & set(issue.gfx):
        return False
    if setup.gpus < issue.least_gpus or setup.nodes < issue.least_nodes:
        return False
    if issue.integrated and not setup.integrated:
        return False
    told = [(issue.rocm, setup.rocm), (issue.kernel, setup.kernel)]
    told += [(wanted, (setup.components or {}).get(name, "")) for name, wanted in issue.components.items()]
    return all(within(wanted, found) is not False for wanted, found in told if wanted)
