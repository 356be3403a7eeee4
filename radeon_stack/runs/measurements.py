"""The figures of a benchmark run: its measurements in order, and what they come to in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from radeon_stack.figures import Case, case_label, phases_of
from radeon_stack.runs.events import Event, Measurement

STATES = ("ok", "missing", "wrong", "crashed", "failed")
LARGEST = 1e30  # a rate beyond is no rate
Key = tuple[str, str, str]


def key_of(one: Measurement) -> Key:
    """(suite, case, implementation); the case as it is written, without its order."""
    return one.suite, case_key(one.case), one.implementation


def case_key(case: Case) -> str:
    return repr(sorted((name, str(value)) for name, value in case.items()))


def measurements_of(events: Iterable[Event]) -> list[Measurement]:
    """The last word on each case and implementation; by case, the quickest first."""
    latest = {key_of(event): event for event in events if isinstance(event, Measurement)}
    return sorted(latest.values(), key=lambda one: (one.suite, _natural(one.case), STATES.index(one.state), _time(one)))


def by_case(measurements: Sequence[Measurement]) -> dict[tuple[str, str], list[Measurement]]:
    """(suite, the case's label) → its measurements."""
    found: dict[tuple[str, str], list[Measurement]] = {}
    for one in measurements:
        found.setdefault((one.suite, case_label(one.case)), []).append(one)
    return found


def counted(measurements: Sequence[Measurement]) -> str:
    """`16 of 56 measured, 39 missing, 1 crashed`; "" for none."""
    if not measurements:
        return ""
    states = Counter[str](one.state for one in measurements)
    rest = "".join(f", {states[state]} {state}" for state in STATES[1:] if states[state])
    return f"{states['ok']} of {len(measurements)} measured{rest}"


def quickest(measurements: Sequence[Measurement]) -> str:
    """`quickest in 6 of 8 cases: sdpa_flash`, all phases together; "" where nothing was compared."""
    cases = [[one for one in found if one.state == "ok"] for found in by_case(measurements).values()]
    raced = [found for found in cases if len(found) > 1]
    if not raced:
        return ""
    winners = Counter(min(found, key=_time).implementation for found in raced)
    name, count = winners.most_common(1)[0]
    return f"quickest in {count} of {len(raced)} cases: {name}"


def rates_of(floor: Any) -> dict[str, float]:
    """A floor's `copy` bandwidth (bytes/s) and matrix rates (operations/s) by dtype, those that are numbers."""
    if not isinstance(floor, dict):
        return {}
    matrix = floor.get("matrix")
    rates = {"copy": floor.get("bandwidth"), **(matrix if isinstance(matrix, dict) else {})}
    return {name: float(rate) for name, rate in rates.items() if isinstance(rate, int | float) and 0 < rate < LARGEST}


def as_data(one: Measurement) -> dict[str, Any]:
    """A measurement for a JSON listing."""
    return one.model_dump(include={"suite", "case", "implementation", "state", "values", "note"})


def _time(one: Measurement) -> float:
    """Seconds of all phases together, for sorting: nan comes last."""
    total = sum(one.values[f"{phase}_seconds"] for phase in phases_of(one.values))
    return total if total == total and total > 0 else float("inf")


def _natural(case: Mapping[str, Any]) -> list[tuple[str, int, float, str]]:
    """Numbers by their size, words by their letters."""
    return [
        (name, 1, 0.0, value) if isinstance(value, str) else (name, 0, float(value), "") for name, value in case.items()
    ]
