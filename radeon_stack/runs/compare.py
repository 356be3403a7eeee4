"""Two benchmark runs compared: ratios, and which of them lie beyond the spread. Pure functions.

A time has become worse when its 20th percentile lies above the 80th percentile that it had, and its median by more than
the margin above the old one; better is the same with the sides exchanged. What an implementation allocates has no
spread, so there the margin decides. Figures of different cards, cases or ways of timing are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from radeon_stack.errors import UsageError
from radeon_stack.figures import Case, case_label, milliseconds, phases_of
from radeon_stack.runs.events import Event, Fact, Measurement
from radeon_stack.runs.measurements import Key, case_key, key_of, measurements_of, rates_of

MARGIN = 0.05  # two runs on one idle card were seen to differ by some percent
RATES_MARGIN = 0.1
CARD = ("name", "arch", "memory", "threads")  # what makes a card the same; the rest is software and may differ
SOFTWARE = ("driver", "torch", "hip", "cuda", "triton", "python", "package", "commit")
Verdict = Literal["worse", "same", "better"]


@dataclass(frozen=True)
class Side:
    """One run: its name, its figures, the card they are of, how they were timed, and the rates of the card itself."""

    name: str
    measurements: Sequence[Measurement]
    card: Mapping[str, Any]
    timing: Mapping[str, Any]
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """A figure on both sides (seconds or bytes), or a state (`figure` "state"); `ratio` is new over old."""

    suite: str
    case: Case
    implementation: str
    figure: str
    old: float | str
    new: float | str
    ratio: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """All changes, and what else is different about the two runs: software by name, implementations on one side."""

    old: str
    new: str
    changes: tuple[Change, ...]
    software: Mapping[str, tuple[Any, Any]]
    one_sided: tuple[str, ...]
    rates: Mapping[str, float]
    """The card's own rates, new over old: far from 1, something else was going on."""

    @property
    def worse(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.verdict == "worse")

    @property
    def better(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.verdict == "better")


def side(name: str, events: Sequence[Event]) -> Side:
    """A run's side of a comparison. UsageError for a run that measured nothing."""
    facts = {event.name: event.value for event in events if isinstance(event, Fact)}
    measurements = measurements_of(events)
    card, timing = facts.get("card"), facts.get("timing")
    if not measurements or not isinstance(card, dict):
        raise UsageError(
            "measured nothing that could be compared",
            where=name,
            remedy="compare runs of a benchmark: radeon-stack run bench-attention",
        )
    return Side(name, measurements, card, timing if isinstance(timing, dict) else {}, rates_of(facts.get("floor")))


def compare(old: Side, new: Side, *, margin: float = MARGIN, common: bool = False) -> Comparison:
    """The comparison. UsageError where it would mean nothing; `common` is content with the cases of both."""
    _require_comparable(old, new, common=common)
    before: dict[Key, Measurement] = {key_of(one): one for one in old.measurements}
    after: dict[Key, Measurement] = {key_of(one): one for one in new.measurements}
    changes = [c for key, one in after.items() if key in before for c in _changes(before[key], one, margin)]
    software = {
        name: (old.card.get(name), new.card.get(name)) for name in SOFTWARE if old.card.get(name) != new.card.get(name)
    }
    names_before, names_after = ({one.implementation for one in of.measurements} for of in (old, new))
    one_sided = tuple(sorted(names_before ^ names_after))
    rates = {name: new.rates[name] / rate for name, rate in old.rates.items() if name in new.rates}
    return Comparison(old.name, new.name, tuple(changes), software, one_sided, rates)


def _require_comparable(old: Side, new: Side, *, common: bool) -> None:
    for name in CARD:
        if old.card.get(name) != new.card.get(name):
            raise UsageError(
                f"{new.name} was measured on another card: {name} {new.card.get(name)}, not {old.card.get(name)}",
                where=old.name,
                remedy="figures of different cards are not compared; run the older one again on this card",
            )
    if old.timing != new.timing:
        names = sorted(n for n in {*old.timing, *new.timing} if old.timing.get(n) != new.timing.get(n))
        raise UsageError(
            f"{new.name} was timed in another way: {', '.join(f'timing.{name}' for name in names)}", where=old.name
        )
    cases_before, cases_after = ({(one.suite, case_key(one.case)) for one in of.measurements} for of in (old, new))
    if not cases_before & cases_after:
        raise UsageError(f"{new.name} has no case of it", where=old.name)
    if cases_before != cases_after and not common:
        odd = next(
            one
            for one in (*old.measurements, *new.measurements)
            if (one.suite, case_key(one.case)) in cases_before ^ cases_after
        )
        raise UsageError(
            f"{len(cases_before ^ cases_after)} cases are in one of the runs alone, such as {case_label(odd.case)}",
            where=f"{old.name}, {new.name}",
            remedy="compare those of both: runs compare --common",
        )


def _changes(old: Measurement, new: Measurement, margin: float) -> Iterator[Change]:
    if "ok" not in (old.state, new.state):
        return
    if old.state != new.state:
        verdict: Verdict = "better" if new.state == "ok" else "worse"
        yield Change(new.suite, new.case, new.implementation, "state", old.state, new.state, None, verdict)
        return
    for name in _figures(new.values):
        before, after = _span(old.values, name), _span(new.values, name)
        if before and after:
            ratio = after[1] / before[1]
            if math.isfinite(ratio) and ratio > 0:
                verdict = _verdict(before, after, margin)
                yield Change(new.suite, new.case, new.implementation, name, before[1], after[1], ratio, verdict)


def _figures(values: Mapping[str, float]) -> list[str]:
    return [f"{phase}_{figure}" for phase in phases_of(values) for figure in ("seconds", "peak_bytes")]


def _span(values: Mapping[str, float], name: str) -> tuple[float, float, float] | None:
    """(20th percentile, median, 80th percentile); the value itself thrice where it has no spread."""
    value = values.get(name)
    if value is None or not (math.isfinite(value) and value > 0):
        return None
    low, high = values.get(f"{name}_p20", value), values.get(f"{name}_p80", value)
    return (low, value, high) if 0 < low <= value <= high < math.inf else None


def _verdict(before: tuple[float, float, float], after: tuple[float, float, float], margin: float) -> Verdict:
    if after[0] > before[2] and after[1] > before[1] * (1 + margin):
        return "worse"
    if before[0] > after[2] and before[1] > after[1] * (1 + margin):
        return "better"
    return "same"


def lines(comparison: Comparison) -> list[str]:
    """For a person: what became worse and better, and how much stayed."""
    told = [f"{comparison.new} against {comparison.old}"]
    told += [f"  {name}: {old} → {new}" for name, (old, new) in comparison.software.items()]
    for name, ratio in comparison.rates.items():
        if abs(math.log(ratio)) > math.log1p(RATES_MARGIN):
            told.append(f"  the card itself: {name} rate {ratio:.2f}× (its clocks, its heat, or somebody else on it)")
    if comparison.one_sided:
        told.append(f"  in one of them alone: {', '.join(comparison.one_sided)}")
    for mark, changes in (("✗", comparison.worse), ("✓", comparison.better)):
        ordered = sorted(changes, key=lambda change: -abs(math.log(change.ratio or math.inf)))
        told += [f"{mark} {change_line(change)}" for change in ordered]
    counts = f"{len(comparison.worse)} worse, {len(comparison.better)} better"
    same = [change.ratio for change in comparison.changes if change.verdict == "same" and change.ratio]
    span = f" ({min(same):.2f}× to {max(same):.2f}×)" if same else ""
    told.append(f"{counts}, {len(same)} the same within their spread{span}")
    return [text.replace("\n", " ") for text in told]


def change_line(change: Change) -> str:
    """`bf16 b4 s2048 h32 d128 | flash_attn | backward_seconds 12.10 ms → 70.68 ms, 5.84×`."""
    if isinstance(change.old, str) or isinstance(change.new, str):
        told = f"{change.old} → {change.new}"
    elif change.figure.endswith("_seconds"):
        told = f"{change.figure.removesuffix('_seconds')} {milliseconds(change.old)} → {milliseconds(change.new)}"
    else:
        told = f"{change.figure} {change.old / 2**20:.1f} MiB → {change.new / 2**20:.1f} MiB"
    ratio = f", {change.ratio:.2f}×" if change.ratio else ""
    return f"{case_label(change.case)} | {change.implementation} | {told}{ratio}"


def as_data(comparison: Comparison) -> dict[str, Any]:
    """For `--json`."""
    return {
        "old": comparison.old,
        "new": comparison.new,
        "worse": len(comparison.worse),
        "better": len(comparison.better),
        "software": {name: {"old": old, "new": new} for name, (old, new) in comparison.software.items()},
        "one_sided": list(comparison.one_sided),
        "rates": dict(comparison.rates),
        "changes": [{**vars(change), "case": dict(change.case)} for change in comparison.changes],
    }
