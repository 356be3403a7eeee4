"""Who watches a run: those who look, and what they are told beside its events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from radeon_stack.errors import StackError
from radeon_stack.launch.engine import engine_named
from radeon_stack.runs.events import Event
from radeon_stack.runs.store import Run

POLL_SECONDS = 0.1
Watcher = Callable[[Event], None]
Speaker = Callable[[str], None]


def standing_of(run: Run) -> str:
    """Where a run stands with its engine; "" where there is nothing to tell, or nobody to tell it."""
    status = run.status()
    try:
        return engine_named(status.engine).standing(status.handle) if status and status.handle else ""
    except StackError as error:
        return error.what


class Standing:
    """Says where a run stands with its engine, whenever that is something new."""

    def __init__(self, run: Run, say: Speaker) -> None:
        self._run, self._say = run, say
        self._last = ""
        self._asked = float("-inf")

    def __call__(self) -> None:
        status = self._run.status()
        if status is None or not status.handle:
            return
        engine = engine_named(status.engine)
        if not engine.keeps or time.monotonic() - self._asked < engine.pause:
            return
        self._asked = time.monotonic()
        told = standing_of(self._run)
        if told != self._last:
            self._last = told
            self._say(told)


class Pump:
    """Runs a blocking call in a thread. An error of the engine's shows up again in the calls that follow."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except StackError:
            return

    def running(self) -> bool:
        self._thread.join(POLL_SECONDS)
        return self._thread.is_alive()


class Audience:
    """Who watches a run. One that cannot be told is told nothing more: the run is kept all the same."""

    def __init__(self, watch: Watcher, say: Speaker) -> None:
        self._watch: Watcher | None = watch
        self._say: Speaker | None = say

    def show(self, event: Event) -> None:
        try:
            if self._watch:
                self._watch(event)
        except OSError:  # its pipe or terminal has gone: nobody looks
            self._watch = None
        except Exception as error:
            self._watch = None
            self.say(f"cannot show the run's progress any more ({type(error).__name__}: {error}); it goes on")

    def say(self, text: str) -> None:
        try:
            if self._say:
                self._say(text)
        except Exception:
            self._say = None
