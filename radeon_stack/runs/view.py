"""Shows events as they come: bars on a terminal, plain lines elsewhere. Texts are untrusted."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from radeon_stack.figures import figure_line
from radeon_stack.runs import events as ev
from radeon_stack.runs.loaded import loaded_text
from radeon_stack.text import even_unheard, one_line, print_line, printable

PLAIN_EVERY_SECONDS = 2.0
WIDE = 110  # columns of a terminal in which bars, all times and a step's figures have room
BELOW = 2  # lines of a terminal that are left free below bars
CTRL_C = 3  # and those left free beside the bars: `^C`, echoed by the terminal, would break a full line in two
ANSWER = 200  # characters of an answer
COLOURS = {"works": "green", "missing": "dim", "not asked": "dim"}  # of an answer; what is bad is red
MEASUREMENT_LENGTH = 240
MEASURED = {"ok": "green", "missing": "dim", "wrong": "red", "crashed": "red", "failed": "red"}
LOADED = {"ok": True, "missing": None, "broken": False}
COUNTED = (
    ("parameters", "parameters"),
    ("quantized_parameters", "in 4 bit"),
    ("quantized_experts", "of them experts'"),
    ("half_parameters", "in 16 bit"),
    ("trainable", "trained"),
)
PADDING = (("padding", "padding"), ("padding_unpacked", "if unpacked"), ("padding_ungrouped", "if ungrouped"))
COUNTS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
PHASES = {"before": "before training", "after": "after training", "merged": "merged and reloaded"}


class View(AbstractContextManager["View"], Protocol):
    """Takes events in order, between `with` and its end."""

    def __call__(self, event: ev.Event) -> None: ...

    def say(self, text: str) -> None:
        """Tell something that is no event, where it stays to be read."""


def view_for(stream: TextIO) -> View:
    """Bars when the stream is a terminal, else lines."""
    return BarView(stream) if stream.isatty() else LineView(stream)


def mark(correct: bool | None) -> str:
    return {True: "✓", False: "✗", None: "·"}[correct]


def metric_text(values: dict[str, float]) -> str:
    """The figures of a step that people watch."""
    parts = []
    for key, label in (("loss", "loss"), ("grad_norm", "grad"), ("learning_rate", "lr"), ("eval_loss", "evaluation")):
        if key in values:
            parts.append(f"{label} {values[key]:.4g}")
    return "  ".join(parts)


def _answer(event: ev.Answered) -> str:
    return printable(event.answer.words())[:ANSWER]


def measurement_text(event: ev.Measurement) -> str:
    """A figure on one line."""
    line = figure_line(event.case, event.implementation, event.state, event.values, event.note)
    return one_line(line, MEASUREMENT_LENGTH)


def model_text(event: ev.Fact) -> str:
    """`model Qwen3MoeForCausalLM: 30.6 B parameters, 29.9 B in 4 bit, …`; "" for another fact. Nothing is trusted."""
    told = event.value
    if event.name != "model" or not isinstance(told, dict):
        return ""
    parts = []
    for key, words in COUNTED:
        count = told.get(key)
        if isinstance(count, int | float) and count > 0:
            parts.append(f"{count_text(count)} {words}")
    return f"model {one_line(str(told.get('class', '')), 60)}: {', '.join(parts)}" if parts else ""


def batches_text(event: ev.Fact) -> str:
    """`batches 1,000 rows in 44 packs: 2.1 % padding, 37 % if unpacked`; "" for another fact. Nothing is trusted."""
    told: dict[str, Any] = event.value if event.name == "batches" and isinstance(event.value, dict) else {}
    counts = [f"{told[key]:,} {key}" for key in ("rows", "packs") if _within(told.get(key), 1 << 50)]
    shares = [f"{100 * told[key]:.2g} % {words}" for key, words in PADDING if _within(told.get(key), 1)]
    return f"batches {' in '.join(counts)}: {', '.join(shares)}" if counts and shares else ""


def _within(value: Any, most: int) -> bool:
    return isinstance(value, int | float) and 0 <= value <= most


def count_text(count: float) -> str:
    """`53.5 M`"""
    unit, name = next(((unit, name) for unit, name in COUNTS if count >= unit), (1.0, ""))
    return f"{count / unit:.3g} {name}".rstrip()


class Bars(Progress):
    """Laid out for the terminal's width at each refresh: figures are whole, and notes have what these leave.

    `wide` and `narrow`: columns of a name. `tall`: more bars than the terminal has lines are shown from the first on
    that has not ended.
    """

    def __init__(self, console: Console, *, wide: int = 22, narrow: int = 14, tall: bool = False) -> None:
        self._terminal = console  # laid out once before Progress has its own
        self._wide = _columns(name=wide, bar=28, elapsed=True)
        self._narrow = _columns(name=narrow, bar=8, elapsed=False)
        self._tall = tall
        super().__init__(console=console, expand=True)

    def get_renderables(self) -> Iterator[RenderableType]:
        width = self._terminal.width
        self.columns = self._wide if width >= WIDE else self._narrow
        yield Constrain(self.make_tasks_table(self._shown()), width - CTRL_C)

    def _shown(self) -> list[Task]:
        tasks, room = self.tasks, max(1, self._terminal.height - BELOW)
        if not self._tall or len(tasks) <= room:
            return tasks
        first = next((at for at, task in enumerate(tasks) if task.stop_time is None), 0)
        first = min(first, len(tasks) - room)
        return tasks[first : first + room]


def _columns(*, name: int, bar: int, elapsed: bool) -> tuple[ProgressColumn, ...]:
    whole = Column(no_wrap=True)
    return (
        TextColumn("{task.description}", table_column=Column(width=name, no_wrap=True)),
        BarColumn(bar_width=bar, table_column=whole),
        MofNCompleteColumn(table_column=whole),
        *((TimeElapsedColumn(table_column=whole),) if elapsed else ()),
        TimeRemainingColumn(compact=True, table_column=whole),
        TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True)),
    )


class BarView:
    """A bar a stage, with time left and the current loss; samples above the bars as they come."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False)
        self._progress = Bars(self._console)
        self._tasks: dict[str, TaskID] = {}
        self._phase = ""

    def __enter__(self) -> BarView:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with even_unheard():
            self._progress.stop()

    def __call__(self, event: ev.Event) -> None:
        if isinstance(event, ev.Progress):
            task = self._task(event.stage)
            self._progress.update(task, total=event.total, completed=event.done)
            if event.note:
                self._progress.update(task, note=escape(one_line(event.note, 40)))
            if event.done >= event.total:
                self._progress.stop_task(task)
        elif isinstance(event, ev.Metric) and "train" in self._tasks:
            self._progress.update(self._tasks["train"], note=escape(metric_text(event.values)))
        elif isinstance(event, ev.Answered):
            self._say(f"[{COLOURS.get(event.answer.verdict, 'red')}]{escape(_answer(event))}[/]")
        elif isinstance(event, ev.Sample):
            if event.phase != self._phase:
                self._phase = event.phase
                name = PHASES.get(event.phase, event.phase)
                self._say(f"[bold]{escape(name)}[/]: {escape(one_line(event.prompt))}")
            colour = {True: "green", False: "red", None: "dim"}[event.correct]
            self._say(f"  [{colour}]{mark(event.correct)}[/] {escape(one_line(event.response))}")
        elif isinstance(event, ev.Loaded):
            colour = {"ok": "green", "missing": "dim"}.get(event.state, "red")
            self._say(f"[{colour}]{mark(LOADED[event.state])}[/] {escape(loaded_text(event))}")
        elif isinstance(event, ev.Measurement):
            colour = MEASURED[event.state]
            self._say(f"[{colour}]{mark(event.state == 'ok')}[/] {escape(measurement_text(event))}")
        elif isinstance(event, ev.Fact) and (told := model_text(event) or batches_text(event)):
            self._say(escape(told))
        elif isinstance(event, ev.Attempt) and event.resumed_step is not None:
            self._say(f"resumed from step {event.resumed_step}")

    def say(self, text: str) -> None:
        self._say(escape(printable(text)))  # above the bars: another's print would be drawn over

    def _task(self, stage: str) -> TaskID:
        if stage not in self._tasks:
            name = escape(one_line(stage, 22))
            self._tasks[stage] = self._progress.add_task(name, total=None, note="")
        return self._tasks[stage]

    def _say(self, markup: str) -> None:
        self._console.print(markup, soft_wrap=True)


class LineView:
    """One line a step, and a line every couple of seconds for the other stages."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last: dict[str, float] = {}
        self._total_steps: float = 0

    def __enter__(self) -> LineView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with even_unheard():
            self._stream.flush()

    def __call__(self, event: ev.Event) -> None:
        line = self.line(event)
        if line:
            print(line, file=self._stream, flush=True)

    def say(self, text: str) -> None:
        print_line(text, sys.stderr)

    def line(self, event: ev.Event) -> str:
        """What is told of an event; "" for nothing."""
        if isinstance(event, ev.Progress):
            return self._progress_line(event)
        if isinstance(event, ev.Metric):
            total = f"/{self._total_steps:g}" if self._total_steps else ""
            return f"step {event.step}{total}  {metric_text(event.values)}"
        if isinstance(event, ev.Answered):
            return _answer(event)
        if isinstance(event, ev.Measurement):
            return measurement_text(event)
        if isinstance(event, ev.Loaded):
            return f"{mark(LOADED[event.state])} {loaded_text(event)}"
        if isinstance(event, ev.Sample):
            return f"{event.phase:<7} {mark(event.correct)} {one_line(event.response)}"
        if isinstance(event, ev.Attempt) and event.resumed_step is not None:
            return f"resumed from step {event.resumed_step}"
        if isinstance(event, ev.Fact):
            return model_text(event) or batches_text(event)
        if isinstance(event, ev.Artifact):
            return f"wrote {one_line(event.path)}"
        return ""

    def _progress_line(self, event: ev.Progress) -> str:
        if event.stage == "train":
            self._total_steps = event.total
            return ""  # the step lines tell it
        if event.stage == "questions":
            return ""  # so do the answers
        now = time.monotonic()
        first = event.stage not in self._last
        if first or event.done >= event.total or now - self._last[event.stage] > PLAIN_EVERY_SECONDS:
            self._last[event.stage] = now
            return f"{one_line(event.stage, 40)} {event.done:g}/{event.total:g} {one_line(event.note, 60)}".rstrip()
        return ""
