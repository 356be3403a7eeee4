"""How did a run end? Judged from its exit code and its last events, by pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from radeon_stack.errors import Exit, about_run
from radeon_stack.runs.events import Error, Event, Result, Stopped
from radeon_stack.runs.store import Diagnosis, State, Status

FORCED = (137, -9)  # SIGKILL, as docker and as subprocess tell it
# SIGTERM, SIGINT, or on a cluster SIGUSR1, before the workload could take note of it
TERMINATED = (143, -15, 130, -2, 138)
# What to do when an expectation does not hold, where it is not about training.
REMEDIES = {
    "wrong": "see the report for which; do not use it on this card",
    "works": "see the report for which; do not train with this image on this card",
}
WORKLOAD_CODES = (Exit.USAGE, Exit.MACHINE, Exit.WORKLOAD, Exit.CHECK)


@dataclass(frozen=True)
class Outcome:
    """The end of a run: its state, our exit code, and for a failure what, where and what to do."""

    state: State
    exit_code: int
    what: str = ""
    where: str = ""
    remedy: str = ""
    diagnosis: Diagnosis | None = None


def recorded(status: Status) -> Outcome:
    """The outcome that an ended run's status holds."""
    return Outcome(status.state, status.exit_code or 0, status.what, status.where, status.remedy, status.diagnosis)


def closed(status: Status, outcome: Outcome, at: float) -> Status:
    """The status with its run's end."""
    return status.model_copy(
        update={
            "state": outcome.state,
            "ended": at,
            "exit_code": int(outcome.exit_code),
            "what": outcome.what,
            "where": outcome.where,
            "remedy": outcome.remedy,
            "diagnosis": outcome.diagnosis,
        }
    )


def judge(exit_code: int | None, events: Iterable[Event], expect: Mapping[str, Any], *, run: str) -> Outcome:
    """The outcome of an ended attempt of the run with that id. `exit_code` None: nobody was there to see it."""
    last = _last_word(events)
    if isinstance(last, Stopped):
        saved = f", saved at step {last.step}" if last.step is not None else ""
        return Outcome(
            State.STOPPED,
            Exit.INTERRUPTED,
            f"stopped while {last.stage}{saved}",
            remedy=f"continue: radeon-stack run --resume {run}",
        )
    if isinstance(last, Error):
        code = last.exit_code if last.exit_code in WORKLOAD_CODES else Exit.WORKLOAD
        return Outcome(State.FAILED, code, last.what, last.where, about_run(last.remedy, run))
    if isinstance(last, Result) and exit_code in (0, None):
        return _expected(last.values, expect)
    if exit_code is None:
        return Outcome(
            State.LOST,
            Exit.WORKLOAD,
            "the workload is gone and left no result",
            remedy=f"continue from the last checkpoint: radeon-stack run --resume {run}",
        )
    if exit_code == Exit.IMAGE:  # of a cluster's job, before the workload
        return Outcome(
            State.FAILED,
            Exit.IMAGE,
            "the image could not be made for this site",
            "log.txt",
            f"see why: radeon-stack runs logs {run}",
        )
    if exit_code in TERMINATED:
        return Outcome(State.STOPPED, Exit.INTERRUPTED, "stopped before it had begun", remedy="run it again")
    if exit_code in FORCED:
        return Outcome(
            State.FAILED,
            Exit.WORKLOAD,
            "the workload was killed (SIGKILL): by somebody, or for want of memory",
            "",
            f"look at dmesg for 'oom'; then continue from the last checkpoint: radeon-stack run --resume {run}",
        )
    return Outcome(
        State.FAILED,
        Exit.WORKLOAD,
        f"the workload ended with exit code {exit_code} and said no reason",
        "log.txt",
        f"see: radeon-stack runs logs {run}",
    )


def _last_word(events: Iterable[Event]) -> Event | None:
    """The result, error or stop of the last attempt, if it had one."""
    word: Event | None = None
    for event in events:
        if event.kind == "attempt":
            word = None
        elif isinstance(event, Result | Error | Stopped):
            word = event
    return word


def _expected(values: Mapping[str, Any], expect: Mapping[str, Any]) -> Outcome:
    """Compare the result with the recipe's `expect` table; a figure that was not measured is not judged."""
    for key, bound in expect.items():
        name, _, side = key.rpartition("_")
        found = values.get(name)
        if bound is None or not isinstance(found, int | float):
            continue
        if (side == "min" and found < bound) or (side == "max" and not found <= bound):
            least = "at least" if side == "min" else "at most"
            return Outcome(
                State.FAILED,
                Exit.CHECK,
                f"{name} is {found:g}, {least} {bound:g} was expected",
                f"expect.{key}",
                REMEDIES.get(
                    name, "see the report; more steps or another learning rate may be needed (--set train.steps=…)"
                ),
            )
    return Outcome(State.DONE, Exit.OK)
