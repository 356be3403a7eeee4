"""A suite from its cases to its figures. Runs in the parent: no device is touched here.

Every implementation first proves itself in a child of its own, on every case: that it is there, survives, and is right.
Those that did are timed together, interleaved, in one further child. Where that one crashes, the case's implementations
are timed once more, each in its own child, and the figures say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from radeon_stack.errors import MachineError, UsageError, WorkloadError
from radeon_stack.figures import Case, case_label
from radeon_stack.workloads.bench import isolate
from radeon_stack.workloads.bench.suite import Suite

DO = "radeon_stack.workloads.bench.work:do"
ALONE = "timed alone: together they crashed"


@dataclass(frozen=True)
class Figure:
    """What one implementation came to in one case; `values` in SI units."""

    suite: str
    case: Case
    implementation: str
    state: str
    values: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Settings:
    """How a race is run. `device` "" takes the GPU where there is one; `seconds` is the time one task may take."""

    device: str = ""
    seed: int = 0
    budget: Mapping[str, Any] = field(default_factory=dict)
    flush: bool = True
    graph: bool = False
    seconds: float = 300.0

    def task(self, do: str, **more: Any) -> dict[str, Any]:
        return {"do": do, "device": self.device, "seed": self.seed, **more}


@dataclass(frozen=True)
class Ground:
    """The card that all figures are of, and its floor, as plain data."""

    card: Mapping[str, Any]
    floor: Mapping[str, Any]


Tell = Callable[[Figure], None]
Progress = Callable[[str, int, int, str], None]


def look(settings: Settings, dtypes: Sequence[str]) -> Ground:
    """The card and its floor. MachineError where a GPU is asked for and torch has none, WorkloadError for more."""
    answer = _one(settings.task("card", dtypes=list(dtypes)), settings)
    if answer.state == "ok" and not answer.value:
        raise MachineError("torch sees no GPU", where="config.device", remedy="see: radeon-stack doctor")
    if answer.state != "ok":
        raise WorkloadError(f"the card cannot be looked at: {answer.note}", where=settings.device or "device")
    return Ground(answer.value["card"], answer.value["floor"])


def with_clocks_after(ground: Ground, settings: Settings) -> Ground:
    """The ground with the card's state now, at the end."""
    answer = _one(settings.task("state"), settings)
    clocks = {**ground.card.get("clocks", {}), "after": dict(answer.value)}
    return replace(ground, card={**ground.card, "clocks": clocks})


def chosen(suites: Sequence[Suite], wanted: Sequence[str] | None) -> dict[str, list[str]]:
    """Each suite's implementations among the wanted names, all for None. UsageError for a name that none has."""
    known = list(dict.fromkeys(name for suite in suites for name in suite.implementations))
    for name in wanted or ():
        if name not in known:
            raise UsageError(
                f"no implementation '{name}' in {', '.join(suite.name for suite in suites)}",
                where="config.implementations",
                remedy=f"there are {', '.join(known)}",
            )
    return {s.name: [name for name in s.implementations if wanted is None or name in wanted] for s in suites}


def race(
    suite: Suite,
    cases: Sequence[Case],
    names: Sequence[str],
    settings: Settings,
    ground: Ground,
    *,
    tell: Tell,
    progress: Progress,
) -> list[Figure]:
    """Prove and time; each figure is told as soon as it is known. All figures, in the order of cases and names."""
    found: dict[tuple[int, str], Figure] = {}
    prove, total = f"{suite.name}: prove", len(names) * len(cases)
    for at, name in enumerate(names):
        progress(prove, at * len(cases), total, name)
        for number, figure in enumerate(proofs(suite, cases, name, settings)):
            # An implementation that is right is told with its times; the rest is known by now.
            found[number, name] = figure
            if figure.state != "ok":
                tell(figure)
            progress(prove, at * len(cases) + number + 1, total, name)
    fit = [[found[n, name] for name in names if found[n, name].state == "ok"] for n in range(len(cases))]
    timed = [number for number, figures in enumerate(fit) if figures]
    together = [_time_task(suite, fit[number], settings, ground) for number in timed]
    for at, answer in enumerate(isolate.answers(DO, together, seconds=settings.seconds)):
        number = timed[at]
        for figure in _timed(suite, fit[number], answer, settings, ground):
            found[number, figure.implementation] = figure
            tell(figure)
        progress(f"{suite.name}: time", at + 1, len(timed), case_label(cases[number]))
    return [found[number, name] for number in range(len(cases)) for name in names]


def proofs(suite: Suite, cases: Sequence[Case], name: str, settings: Settings) -> Iterator[Figure]:
    """What an implementation came to in each case, before any timing."""
    tasks = [settings.task("prove", suite=suite.address, case=dict(case), implementation=name) for case in cases]
    given = isolate.answers(DO, tasks, seconds=settings.seconds)
    for case, answer in zip(cases, given, strict=True):
        if answer.state == "ok":
            yield Figure(suite.name, case, name, **answer.value)
        else:
            yield Figure(suite.name, case, name, answer.state, note=answer.note)


def _timed(
    suite: Suite, figures: Sequence[Figure], answer: isolate.Answer, settings: Settings, ground: Ground
) -> Iterator[Figure]:
    """A case's figures with their times; each timed alone where the child of all came to grief."""
    for figure in figures:
        note = ""
        if answer.state == "ok":
            told = answer.value[figure.implementation]
        else:
            note = ALONE if len(figures) > 1 else ""
            alone = answer
            if len(figures) > 1:
                alone = _one(_time_task(suite, [figure], settings, ground), settings)
            if alone.state != "ok":
                how = f"right when it ran alone, then timed: {alone.note}"
                yield replace(figure, state=alone.state, note=_joined(how, figure.note))
                continue
            told = alone.value[figure.implementation]
        if told["failed"]:
            how = f"right when it ran alone, then timed: {told['failed']}"
            yield replace(figure, state="failed", note=_joined(how, figure.note))
        else:
            values = {**figure.values, **told["values"]}
            yield replace(figure, values=values, note=_joined(figure.note, note, *told["notes"]))


def _time_task(suite: Suite, figures: Sequence[Figure], settings: Settings, ground: Ground) -> dict[str, Any]:
    return settings.task(
        "time",
        suite=suite.address,
        case=dict(figures[0].case),
        implementations=[figure.implementation for figure in figures],
        budget=dict(settings.budget),
        flush=settings.flush,
        graph=settings.graph,
        floor=dict(ground.floor),
    )


def _one(task: isolate.Task, settings: Settings) -> isolate.Answer:
    return next(iter(list(isolate.answers(DO, [task], seconds=settings.seconds))))


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def as_record(ground: Ground, figures: Sequence[Figure]) -> dict[str, Any]:
    """All of it as plain data, for a JSON file."""
    return {**asdict(ground), "figures": [asdict(figure) for figure in figures]}
