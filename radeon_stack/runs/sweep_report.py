"""The sweep's `report.html`: its members side by side, at any moment and however they ended."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radeon_stack import __version__, atomic
from radeon_stack.runs import charts
from radeon_stack.runs.events import metrics_by_step, read_events
from radeon_stack.runs.report import LOG_SPAN, Chart, curve, header, rows, utc
from radeon_stack.runs.store import Run, State
from radeon_stack.runs.sweep import read_sweep, value_text
from radeon_stack.runs.sweep_table import Row, best_of, rows_of, table, verdict

CHARTS = (("loss", "Loss"), ("eval_loss", "Evaluation loss"))
VARIED = "--sweep "
ILL = (State.FAILED, State.LOST, State.STOPPED)


@dataclass(frozen=True)
class Line:
    """A member's row as it is shown; `report` is where its own report will be."""

    number: int
    swatch: str
    cells: tuple[str, ...]
    report: str
    best: bool


@dataclass(frozen=True)
class Failure:
    """Why members did not end well, and which: (name, run) of each that has this very reason."""

    state: str
    what: str
    where: str
    remedy: str
    members: tuple[tuple[str, str], ...]


def write_sweep_report(sweep: Run) -> Path:
    """Write the sweep's report, whole; returns its path. UsageError when its record is damaged."""
    atomic.write_text(sweep.report, render_sweep(sweep))
    return sweep.report


def render_sweep(sweep: Run) -> str:
    """The report's HTML. Everything in it is untrusted text and escaped; it holds no script and loads nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("sweep.html.j2").render(**contents(sweep))


def contents(sweep: Run) -> dict[str, Any]:
    """All that the template shows."""
    record, members = read_sweep(sweep), rows_of(sweep)
    status, told = sweep.status(), table(members, record.keys)
    first = sweep.member(1)
    plan = first.read_json(first.plan).get("fields")
    return {
        "run": sweep.id,
        "status": status,
        "state": str(status.state) if status else "lost",
        "verdict": verdict(members),
        "header": header(status, plan if isinstance(plan, dict) else {}, {}),
        "columns": told.columns,
        "lines": list(_lines(members, told.cells)),
        "charts": list(_charts(sweep, members)),
        "varied": {
            key: ", ".join(dict.fromkeys(value_text(member.values[key]) for member in record.members))
            for key in record.keys
        },
        "given": given_beside(first),
        "failures": list(_failures(sweep, members)),
        "version": __version__,
        "written": utc(time.time()),
    }


def given_beside(run: Run) -> list[tuple[str, str, str]]:
    """(key, value, who set it) of what was given to every member beside the recipe and its preset."""
    config = run.read_json(run.config)
    origin = config.get("origin")
    values = {key: value_text(value) for key, value in rows(config.get("recipe"))}
    return [
        (key.removeprefix("config."), values[key], where)
        for key, where in (origin.items() if isinstance(origin, dict) else ())
        if isinstance(where, str) and where.startswith("--") and not where.startswith(VARIED) and key in values
    ]


def _lines(members: Sequence[Row], cells: Sequence[tuple[str, ...]]) -> Iterator[Line]:
    best = best_of(members)
    for at, (one, texts) in enumerate(zip(members, cells, strict=True)):
        yield Line(at + 1, charts.swatch(at), texts, f"../{one.run}/report.html", one is best)


def _charts(sweep: Run, members: Sequence[Row]) -> Iterator[Chart]:
    best = best_of(members)
    metrics = [metrics_by_step(read_events(sweep.member(at).events)) for at, _ in enumerate(members, 1)]
    for name, title in CHARTS:
        curves = [
            charts.Curve(one.label, curve(found, name), strong=one is best)
            for one, found in zip(members, metrics, strict=True)
        ]
        if name != "loss" and not any(one.points for one in curves):
            continue
        yield Chart(title, charts.curves_chart(title, curves))
        positive = [y for one in curves for _, y in one.points if y > 0 and math.isfinite(y)]
        if positive and max(positive) > LOG_SPAN * min(positive):
            yield Chart(f"{title}, logarithmic", charts.curves_chart(f"{title}, logarithmic", curves, log=True))


def _failures(sweep: Run, members: Sequence[Row]) -> Iterator[Failure]:
    found: dict[tuple[str, str, str, str], list[tuple[str, str]]] = {}
    for number, one in enumerate(members, 1):
        status = sweep.member(number).status()
        if status is not None and status.state in ILL:
            why = (one.state, status.what, status.where, status.remedy)
            found.setdefault(why, []).append((one.label, one.run))
    for why, these in found.items():
        yield Failure(*why, tuple(these))
