"""`sweep.json`: which runs belong together, what each was given, and what they came to as one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from radeon_stack import atomic
from radeon_stack.errors import Exit, UsageError
from radeon_stack.runs.outcome import Outcome
from radeon_stack.runs.store import Run, State
from radeon_stack.text import one_line

MOST_MEMBERS, MOST_KEYS = 1024, 16
LONGEST_VALUE = 60
Key = Annotated[str, Field(min_length=1, max_length=256)]


class Member(BaseModel):
    """A run of a sweep, and its values by key."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")

    run: str
    values: dict[Key, JsonValue]


class Sweep(BaseModel):
    """The record: written once, before the first member begins."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")

    keys: Annotated[tuple[Key, ...], Field(min_length=1, max_length=MOST_KEYS)]
    members: Annotated[tuple[Member, ...], Field(min_length=1, max_length=MOST_MEMBERS)]

    @model_validator(mode="after")
    def _whole(self) -> Sweep:
        for member in self.members:
            if set(member.values) != set(self.keys):
                raise ValueError(f"{member.run} has no value for each key")
        return self


def read_sweep(run: Run) -> Sweep:
    """The sweep's record. UsageError for one that is damaged, or names runs that are not its own."""
    try:
        found = Sweep.model_validate_json(run.sweep.read_bytes())
    except (OSError, ValidationError) as error:
        raise UsageError(
            "sweep.json is missing or damaged",
            where=str(run.path),
            remedy="its members are runs still; see: radeon-stack runs list --all",
        ) from error
    for number, member in enumerate(found.members, 1):
        if member.run != run.member(number).id:  # who removes or stops a sweep goes by these names
            raise UsageError(
                f"sweep.json is damaged: it names {one_line(member.run)!r}, not {run.member(number).id}",
                where=str(run.path),
            )
    return found


def write_sweep(run: Run, sweep: Sweep) -> None:
    """Write the record, whole."""
    atomic.write_text(run.sweep, sweep.model_dump_json(indent=2) + "\n")


def members_of(run: Run) -> list[Run]:
    """The sweep's runs, in their order."""
    return [run.member(number) for number, _ in enumerate(read_sweep(run).members, 1)]


def value_text(value: Any) -> str:
    """`0.0001`, `["q_proj"]`, `assistant`."""
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), LONGEST_VALUE)


def label(values: Mapping[str, JsonValue]) -> str:
    """`learning_rate=0.0001 r=8`: keys by their last part, unless two are alike in it."""
    last = [key.rpartition(".")[2] for key in values]
    names = [name if last.count(name) == 1 else key for name, key in zip(last, values, strict=True)]
    shown = [one_line(name, LONGEST_VALUE) for name in names]
    return " ".join(f"{name}={value_text(value)}" for name, value in zip(shown, values.values(), strict=True))


def judge_sweep(run: Run, ends: Sequence[tuple[Member, Outcome]], *, interrupted: bool = False) -> Outcome:
    """The sweep's outcome from its members', in their order: the first that is not done gives the exit code.

    `interrupted`: the sweep as a whole was, so that it is not about any member.
    """
    open_ = [(member, outcome) for member, outcome in ends if outcome.state is not State.DONE]
    if not open_:
        return Outcome(State.DONE, Exit.OK)
    failed = [(member, outcome) for member, outcome in open_ if outcome.state is not State.STOPPED]
    member, first = (open_ if interrupted or not failed else failed)[0]
    twice = first.what.startswith(str(first.state))
    why = first.what if twice else f"{first.state}: {first.what}" if first.what else str(first.state)
    return Outcome(
        State.STOPPED if interrupted or not failed else State.FAILED,
        Exit.INTERRUPTED if interrupted else open_[0][1].exit_code,
        f"{len(open_)} of {len(ends)} members not done; {member.run} ({label(member.values)}) {why}",
        remedy=f"continue those: radeon-stack run --resume {run.id}",
    )
