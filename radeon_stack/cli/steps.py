"""Shows a build's steps: a line with its time for each, and on a terminal what runs now."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from radeon_stack.images.progress import Step
from radeon_stack.text import one_line

MARKS = {"done": "✓", "cached": "=", "failed": "✗", "running": "…", "note": "·"}


@contextmanager
def step_view(stream: TextIO) -> Iterator[Callable[[Step], None]]:
    """Lines on any stream; on a terminal the running steps below them, each with its time so far."""
    if not stream.isatty():
        yield lambda step: _line(stream, step)
        return
    running: dict[str, float] = {}
    console = Console(file=stream, highlight=False)
    with Live(console=console, refresh_per_second=8, transient=True, get_renderable=lambda: _Running(running)):

        def tell(step: Step) -> None:
            if step.state == "running":
                running[step.title] = time.monotonic()
                return
            running.pop(step.title, None)
            console.print(Text(_text(step), style={"failed": "red", "cached": "dim"}.get(step.state, "")))

        yield tell


class _Running:
    """What runs now, drawn anew at every refresh."""

    def __init__(self, running: dict[str, float]) -> None:
        self._running = running

    def __rich__(self) -> Text:
        now = time.monotonic()
        frame = str(Spinner("dots").render(now))
        return Text("\n").join(
            Text(f"{frame} {one_line(title)}  {now - since:.0f} s", style="cyan")
            for title, since in list(self._running.items())
        )


def _line(stream: TextIO, step: Step) -> None:
    if step.state != "running":
        print(_text(step), file=stream, flush=True)


def _text(step: Step) -> str:
    seconds = f"  {step.seconds:.1f} s" if step.state == "done" else "  cached" if step.state == "cached" else ""
    return f"{MARKS[step.state]} {one_line(step.title)}{seconds}"
