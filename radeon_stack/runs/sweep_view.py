"""Shows a sweep's members as they go on: a bar for each on a terminal, plain lines elsewhere. Texts are untrusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import TaskID

from radeon_stack.runs import events as ev
from radeon_stack.runs.outcome import Outcome
from radeon_stack.runs.store import State
from radeon_stack.runs.view import Bars, LineView, metric_text
from radeon_stack.text import even_unheard, one_line, printable

WIDEST_NAME = 40
LONGEST_WHY = 100
COLOURS = {State.DONE: "green", State.STOPPED: "yellow"}  # else red


class SweepView(AbstractContextManager["SweepView"], Protocol):
    """Takes the events of members, by their place from 0 on, between `with` and its end."""

    def __call__(self, at: int, event: ev.Event) -> None: ...

    def ended(self, at: int, outcome: Outcome) -> None:
        """That member has ended."""

    def say(self, text: str) -> None:
        """Tell something that is no event, where it stays to be read."""


def sweep_view(stream: TextIO, names: Sequence[str]) -> SweepView:
    """Bars when the stream is a terminal, else lines; `names`: what the members are told apart by."""
    return SweepBars(stream, names) if stream.isatty() else SweepLines(stream, names)


def ending(outcome: Outcome) -> str:
    """`failed: why`, and `stopped while training` without saying it twice."""
    why = one_line(outcome.what, LONGEST_WHY)
    return why if why.startswith(str(outcome.state)) else f"{outcome.state}: {why}" if why else str(outcome.state)


class SweepBars:
    """A bar a member: the steps it has done, the time left, and its stage or loss."""

    def __init__(self, stream: TextIO, names: Sequence[str]) -> None:
        self._console = Console(file=stream, highlight=False)
        self._names = [one_line(name, WIDEST_NAME) for name in names]
        widest = max(map(len, self._names), default=0)
        self._bars = Bars(self._console, wide=max(22, widest), narrow=min(max(14, widest), 30), tall=True)
        self._tasks: list[TaskID] = [
            self._bars.add_task(escape(name), total=None, note="waiting", start=False) for name in self._names
        ]
        self._begun: set[int] = set()
        self._totals: dict[int, float] = {}
        self._losses: dict[int, float] = {}

    def __enter__(self) -> SweepBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with even_unheard():
            self._bars.stop()

    def __call__(self, at: int, event: ev.Event) -> None:
        task = self._tasks[at]
        if at not in self._begun:
            self._begun.add(at)
            self._bars.start_task(task)
        if isinstance(event, ev.Progress):
            if event.stage == "train":
                self._totals[at] = event.total
                self._bars.update(task, total=event.total, completed=event.done)
            else:
                note = f"{event.stage} {event.done:g}/{event.total:g}"
                self._bars.update(task, note=escape(one_line(note, 40)))
        elif isinstance(event, ev.Metric):
            self._losses[at] = event.values.get("loss", self._losses.get(at, math.nan))
            self._bars.update(task, note=escape(metric_text(event.values)))

    def ended(self, at: int, outcome: Outcome) -> None:
        task = self._tasks[at]
        # One that was done before this was begun has told no steps: its bar is full all the same.
        if outcome.state is State.DONE and at not in self._totals:
            self._bars.update(task, total=1, completed=1)
        colour = COLOURS.get(outcome.state, "red")
        loss = f"  loss {self._losses[at]:.4g}" if at in self._losses else ""
        self._bars.update(task, note=f"[{colour}]{escape(ending(outcome))}[/]{loss}")
        self._bars.stop_task(task)

    def say(self, text: str) -> None:
        self._console.print(escape(printable(text)), soft_wrap=True)


class SweepLines:
    """What a run's lines are, with the member's name before each."""

    def __init__(self, stream: TextIO, names: Sequence[str]) -> None:
        self._stream = stream
        self._names = [f"{at}/{len(names)} {one_line(name, WIDEST_NAME)}" for at, name in enumerate(names, 1)]
        self._lines = [LineView(stream) for _ in names]

    def __enter__(self) -> SweepLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with even_unheard():
            self._stream.flush()

    def __call__(self, at: int, event: ev.Event) -> None:
        if line := self._lines[at].line(event):
            print(f"[{self._names[at]}] {line}", file=self._stream, flush=True)

    def ended(self, at: int, outcome: Outcome) -> None:
        print(f"[{self._names[at]}] {ending(outcome)}", file=self._stream, flush=True)

    def say(self, text: str) -> None:
        self._lines[0].say(text)
