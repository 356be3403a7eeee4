"""A sweep's members compared: a row each, and which came out best. Pure but for `rows_of`, which reads the records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import JsonValue

from radeon_stack.runs.events import Event, Progress, metrics_by_step, read_events
from radeon_stack.runs.store import Run, State, Status
from radeon_stack.runs.summary import last_result
from radeon_stack.runs.sweep import LONGEST_VALUE, Member, Sweep, label, read_sweep, value_text
from radeon_stack.text import one_line

WAITING = "waiting"
LONGEST_WHY = 160


@dataclass(frozen=True)
class Row:
    """What a member was given and what it has come to. None: not measured, or not yet."""

    run: str
    values: Mapping[str, JsonValue]
    state: str
    steps: int | None = None
    total: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    right_after: int | None = None
    right_merged: int | None = None
    samples: int | None = None
    seconds: float | None = None
    what: str = ""

    @property
    def label(self) -> str:
        return label(self.values)

    @property
    def done(self) -> bool:
        return self.state == State.DONE


def rows_of(sweep: Run) -> list[Row]:
    """A row for each member, from its records as they stand. UsageError when the sweep's own is damaged."""
    record = read_sweep(sweep)
    runs = [sweep.member(number) for number, _ in enumerate(record.members, 1)]
    return [
        row(member, run.status(), read_events(run.events)) for member, run in zip(record.members, runs, strict=True)
    ]


def row(member: Member, status: Status | None, events: Sequence[Event]) -> Row:
    """A member's row."""
    metrics, result = metrics_by_step(events), last_result(list(events))
    losses = {step: values["loss"] for step, values in metrics.items() if "loss" in values}
    evaluated = [values["eval_loss"] for values in metrics.values() if math.isfinite(values.get("eval_loss", math.nan))]
    totals = [event.total for event in events if isinstance(event, Progress) and event.stage == "train"]
    last = next(reversed(losses.values()), None)
    return Row(
        run=member.run,
        values=member.values,
        state=state_of(status),
        steps=max(losses, default=None),
        total=int(totals[-1]) if totals and math.isfinite(totals[-1]) else None,
        loss=_figure(result.get("final_loss"), last),
        eval_loss=_figure(result.get("best_eval_loss"), min(evaluated, default=None)),
        right_after=_count(result.get("correct_after")),
        right_merged=_count(result.get("correct_merged")),
        samples=_count(result.get("samples")),
        seconds=_figure(result.get("train_seconds"), None),
        what=one_line(status.what, LONGEST_WHY) if status else "",
    )


def state_of(status: Status | None) -> str:
    """A member's state; `waiting` until somebody begins it."""
    if status is None:
        return str(State.LOST)
    return WAITING if status.state is State.STARTING and status.keeper is None else str(status.state)


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Those with a loss, the best first: done ones before others, by evaluation loss, else by final loss."""
    known = [one for one in rows if judged_by(one) is not None]
    evaluated = any(one.eval_loss is not None for one in known)
    return sorted(known, key=lambda one: (not one.done, evaluated and one.eval_loss is None, judged_by(one)))


def best_of(rows: Sequence[Row]) -> Row | None:
    """The best of those that are done."""
    return next((one for one in ranked(rows) if one.done), None)


def judged_by(row: Row) -> float | None:
    """The loss that decides: that of the evaluations, where there were any. One that is not finite is none."""
    loss = row.loss if row.eval_loss is None else row.eval_loss
    return loss if loss is not None and math.isfinite(loss) else None


def verdict(rows: Sequence[Row]) -> str:
    """The sweep in a sentence."""
    counts = ", ".join(f"{count} {state}" for state, count in counted(rows).items())
    best = best_of(rows)
    if best is None:
        return f"{len(rows)} members: {counts}."
    return f"{len(rows)} members: {counts}. Best: {best.label}, {by_what(best)} {judged_by(best):.4g}."


def by_what(row: Row) -> str:
    return "final loss" if row.eval_loss is None else "evaluation loss"


def counted(rows: Sequence[Row]) -> dict[str, int]:
    """How many members are in which state, in the order of the first of each."""
    states = [one.state for one in rows]
    return {state: states.count(state) for state in dict.fromkeys(states)}


@dataclass(frozen=True)
class Table:
    """Columns by name, and a row of texts for each member."""

    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]


def table(rows: Sequence[Row], keys: Sequence[str]) -> Table:
    """The comparison as texts: the values first, then the figures that some member has."""
    figures: dict[str, list[str]] = {
        "steps": [_steps(one) for one in rows],
        "final loss": ["" if one.loss is None else f"{one.loss:.4g}" for one in rows],
        "eval loss": ["" if one.eval_loss is None else f"{one.eval_loss:.4g}" for one in rows],
        "right after": [_right(one.right_after, one.samples) for one in rows],
        "right merged": [_right(one.right_merged, one.samples) for one in rows],
        "training": ["" if one.seconds is None else f"{one.seconds:.1f} s" for one in rows],
    }
    columns = [
        *((one_line(key, LONGEST_VALUE), [value_text(one.values.get(key)) for one in rows]) for key in keys),
        *((name, texts) for name, texts in figures.items() if any(texts)),
        ("state", [one.state for one in rows]),
    ]
    return Table(tuple(name for name, _ in columns), tuple(zip(*(texts for _, texts in columns), strict=True)))


def table_lines(rows: Sequence[Row], sweep: Sweep) -> list[str]:
    """The comparison for a terminal; the best has a mark. Below it stand reasons, each with the members it is of."""
    told = table(rows, sweep.keys)
    best = best_of(rows)
    lines = [("", *told.columns)]
    reasons: dict[str, list[str]] = {}
    for one, cells in zip(rows, told.cells, strict=True):
        number = one.run.rpartition("-")[2]
        lines.append((f"{'★' if one is best else ' '} {number}", *cells))
        if one.what:
            reasons.setdefault(one.what, []).append(number)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return [*shown, *(f"  {', '.join(numbers)}: {what}" for what, numbers in reasons.items())]


def as_data(rows: Sequence[Row]) -> dict[str, Any]:
    """For `--json`."""
    best = best_of(rows)
    return {
        "best": best.run if best else None,
        "by": by_what(best) if best else None,
        "rows": [asdict(one) for one in rows],
    }


def _steps(row: Row) -> str:
    if row.steps is None:
        return ""
    return f"{row.steps}" if row.total in (None, row.steps) else f"{row.steps}/{row.total}"


def _right(count: int | None, samples: int | None) -> str:
    return "" if count is None else f"{count}/{'?' if samples is None else samples}"


def _figure(told: Any, otherwise: float | None) -> float | None:
    return float(told) if isinstance(told, int | float) and not isinstance(told, bool) else otherwise


def _count(told: Any) -> int | None:
    return told if isinstance(told, int) and not isinstance(told, bool) else None
