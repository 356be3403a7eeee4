"""The part of a report that shows measurements: a table a suite, and bars a case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from radeon_stack.figures import PHASES, is_stable, milliseconds, of_floor, phases_of
from radeon_stack.runs.charts import Bar, Group, bar_chart
from radeon_stack.runs.events import Measurement
from radeon_stack.runs.measurements import by_case, counted, quickest, rates_of

MAX_ROWS = 5000
SHOWN_CHARTS = 8  # the others are folded away
MAX_CHARTS = 200


@dataclass(frozen=True)
class Cell:
    """A figure, and what stands small below it."""

    text: str
    below: str = ""


@dataclass(frozen=True)
class Row:
    """One implementation in one case; `case` is "" where the row above has it. Without cells, `why_not` says why."""

    case: str
    implementation: str
    about: str
    cells: tuple[Cell, ...]
    state: str = "ok"
    why_not: str = ""


@dataclass(frozen=True)
class Picture:
    """A case's bars."""

    title: str
    svg: str


@dataclass(frozen=True)
class Section:
    """A suite: what it came to, its table and pictures."""

    suite: str
    verdict: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    pictures: tuple[Picture, ...]
    more: tuple[Picture, ...]


def sections(measurements: Sequence[Measurement]) -> list[Section]:
    """A section for each suite that measured something."""
    suites: dict[str, list[Measurement]] = {}
    for one in measurements[:MAX_ROWS]:
        suites.setdefault(one.suite, []).append(one)
    return [_section(suite, found) for suite, found in suites.items()]


def _section(suite: str, measurements: Sequence[Measurement]) -> Section:
    phases = list(dict.fromkeys(phase for one in measurements for phase in phases_of(one.values)))
    pictures = list(_pictures(measurements))[:MAX_CHARTS]
    verdict = "; ".join(filter(None, [counted(measurements), quickest(measurements)]))
    named = [PHASES.get(phase, phase) for phase in phases]
    columns = (*(column for name in named for column in (name, "")), f"MiB at most, {' / '.join(named)}")
    return Section(
        suite,
        verdict,
        columns,
        tuple(_rows(measurements, phases)),
        tuple(pictures[:SHOWN_CHARTS]),
        tuple(pictures[SHOWN_CHARTS:]),
    )


def _rows(measurements: Sequence[Measurement], phases: Sequence[str]) -> Iterator[Row]:
    for (_, label), found in by_case(measurements).items():
        for number, one in enumerate(found):
            case = "" if number else label
            if one.state != "ok":
                yield Row(case, one.implementation, "", (), one.state, one.note or "no reason was told")
                continue
            cells = (*(cell for phase in phases for cell in _cells(one.values, phase)), _peak(one.values, phases))
            about = "; ".join(filter(None, ["" if is_stable(one.values) else "unstable", one.note]))
            yield Row(case, one.implementation, about, cells)


def _cells(values: Mapping[str, float], phase: str) -> Iterator[Cell]:
    rate, difference = values.get(f"{phase}_operations_per_second"), values.get(f"difference_{phase}")
    yield Cell(_time(values, phase), of_floor(values, phase))
    off = "" if difference is None else f"off by {difference:.1e}"
    yield Cell("" if rate is None else f"{rate / 1e12:.3g} TFLOP/s", off)


def _time(values: Mapping[str, float], phase: str) -> str:
    """`7.05 ms ± 1%`: the median, and half the distance of the percentiles."""
    seconds, low, high = (values.get(f"{phase}_seconds{name}") for name in ("", "_p20", "_p80"))
    if seconds is None:
        return ""
    spread = f" ± {(high - low) / 2 / seconds:.0%}" if low and high and seconds > 0 else ""
    return f"{milliseconds(seconds)}{spread}"


def _peak(values: Mapping[str, float], phases: Sequence[str]) -> Cell:
    """What each phase allocates at most."""
    peaks = [values.get(f"{phase}_peak_bytes") for phase in phases]
    return Cell("" if None in peaks else " / ".join(f"{peak / 2**20:.1f}" for peak in peaks if peak is not None))


def _pictures(measurements: Sequence[Measurement]) -> Iterator[Picture]:
    for (_, label), found in by_case(measurements).items():
        timed = [one for one in found if one.state == "ok"]
        groups = [
            Group(
                phase,
                tuple(_bar(one, phase) for one in timed if f"{phase}_seconds" in one.values),
                _floor(timed, phase),
            )
            for phase in dict.fromkeys(phase for one in timed for phase in phases_of(one.values))
        ]
        if groups:
            yield Picture(label, bar_chart(label, groups))


def _bar(one: Measurement, phase: str) -> Bar:
    seconds = one.values[f"{phase}_seconds"]
    floor = f" · {one.values[f'{phase}_of_floor']:.1f}×" if f"{phase}_of_floor" in one.values else ""
    return Bar(one.implementation, seconds, f"{milliseconds(seconds)}{floor}", bool(one.values.get(f"{phase}_stable")))


def _floor(timed: Sequence[Measurement], phase: str) -> float | None:
    return next((one.values[f"{phase}_floor_seconds"] for one in timed if f"{phase}_floor_seconds" in one.values), None)


def tiles(card: Mapping[str, Any], floor: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The card's measured ceilings."""
    found = []
    if isinstance(card.get("name"), str):
        found.append(("card", f"{card['name']} ({card.get('arch', '?')})"))
    for name, rate in rates_of(floor).items():
        if name == "copy":
            found.append(("memory bandwidth, by a copy", f"{rate / 1e9:.0f} GB/s"))
        else:
            found.append((f"{name} matrix rate", f"{rate / 1e12:.4g} TFLOP/s"))
    return found
