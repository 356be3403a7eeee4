"""Work that may take its process down: done in children, one after the other, each task answered whatever happens.

A child is given a list of tasks and does them in order, so that torch is imported once. When it dies (SIGSEGV, an abort
in a driver, out of memory) or is silent for too long, the task it was at is answered so, and a new child goes on with
the next. This process never touches the device: nothing that happens there can end it. Only after a GPU's memory fault
nothing more is done.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from radeon_stack.errors import WorkloadError
from radeon_stack.text import one_line
from radeon_stack.workloads import faults

POLL_SECONDS = 0.02
LAST_LINES = 4
LINE_LENGTH = 200
TAIL_BYTES = 64 << 10
FAULT, BEFORE_FAULT = "Fatal Python error", 2
# Of what Python tells around a stack, that is no news; `^^^^` is what it draws below a line of code.
NO_NEWS = ("Extension modules:", "<no Python frame>", "Current thread", "Thread 0x", "^^^", "~~~")

Task = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What became of a task: its `value` when `ok`; else `note` says how the child ended and what it said last."""

    state: Literal["ok", "failed", "crashed"]
    value: Mapping[str, Any]
    note: str = ""


def answers(function: str, tasks: Sequence[Task], *, seconds: float) -> Iterator[Answer]:
    """An answer to each task, in order, as they come. `function` is `module:name`, called with a task in a child.

    `seconds` is the time a task may take; the first one of a child has that time for the imports too. WorkloadError
    after the answer of a task at which the GPU faulted.
    """
    with tempfile.TemporaryDirectory(prefix="radeon-stack-") as folder:
        done = 0
        while done < len(tasks):
            with _Child(function, tasks[done:], Path(folder)) as child:
                begun_any = False
                for answer in child.answers(seconds):
                    begun_any = begun_any or child.begun >= 0
                    done += 1
                    yield answer
                    if answer.state != "ok" and child.faulted(answer):
                        raise WorkloadError(f"the GPU faulted: {answer.note}", where="GPU", remedy=faults.REMEDY)
            if not begun_any:
                # It never came to its first task: nor would the next one.
                yield from [answer] * (len(tasks) - done)
                return


class _Child:
    """One child process with the tasks it was given."""

    def __init__(self, function: str, tasks: Sequence[Task], folder: Path) -> None:
        self._tasks = tasks
        self._asked, self._answered, self._said = (folder / name for name in ("tasks.json", "answers.jsonl", "said"))
        self._asked.write_text(json.dumps(list(tasks)))
        self._answered.write_bytes(b"")
        self._said.write_bytes(b"")
        self._command = [sys.executable, "-m", __name__, function, str(self._asked), str(self._answered)]
        self._offset = 0
        self.begun = -1

    def __enter__(self) -> _Child:
        with self._said.open("ab") as said:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**os.environ, "PYTHONFAULTHANDLER": "1"},
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        sys.stderr.write(self._tail())
        sys.stderr.flush()

    def answers(self, seconds: float) -> Iterator[Answer]:
        """Answers until all are given, or the child is at its end: the task that it was at is answered last."""
        given, heard = 0, time.monotonic()
        while given < len(self._tasks):
            ended = self._process.poll() is not None  # asked before reading: what it wrote at last is read
            for line in self._lines():
                heard = time.monotonic()
                if "begin" in line:
                    self.begun = int(line["begin"])
                else:
                    given += 1
                    yield Answer(line["state"], line["value"], line["note"])
            if given == len(self._tasks):
                return
            if ended:
                yield Answer("crashed", {}, self._last_words(how_it_ended(self._process.returncode)))
                return
            if time.monotonic() - heard > seconds:
                self._process.kill()
                self._process.wait()
                yield Answer("crashed", {}, self._last_words(f"timeout: silent for {seconds:g} s"))
                return
            time.sleep(POLL_SECONDS)

    def faulted(self, answer: Answer) -> bool:
        """Whether what ended this task was a fault of the GPU's."""
        return faults.tells_of_a_fault(answer.note) or faults.tells_of_a_fault(self._tail())

    def _lines(self) -> Iterator[dict[str, Any]]:
        with self._answered.open("rb") as stream:
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)

    def _tail(self) -> str:
        with self._said.open("rb") as stream:
            stream.seek(max(0, self._said.stat().st_size - TAIL_BYTES))
            return stream.read().decode(errors="replace")

    def _last_words(self, how: str) -> str:
        last = last_words(self._tail())
        return f"{how}: {' | '.join(last)}" if last else how


def last_words(text: str) -> list[str]:
    """What a process said at its end: its last lines, or those about the fault that ended it and where it was."""
    lines = [line for line in (one_line(line, LINE_LENGTH) for line in text.splitlines()) if line]
    lines = [line for line in lines if not line.startswith(NO_NEWS)]
    faults = [number for number, line in enumerate(lines) if line.startswith(FAULT)]
    if not faults:
        return lines[-LAST_LINES:]
    return lines[max(0, faults[-1] - BEFORE_FAULT) :][: BEFORE_FAULT + LAST_LINES]


def how_it_ended(code: int) -> str:
    """A process's end in words: the signal's name, or its exit code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def main(argv: Sequence[str]) -> int:
    """The child's side: do the tasks, one line when one begins and one when it has ended."""
    function, asked, answered = argv
    tasks = json.loads(Path(asked).read_text())
    with open(answered, "ab", buffering=0) as stream:
        module, _, name = function.partition(":")
        do = getattr(import_module(module), name)
        for number, task in enumerate(tasks):
            stream.write(json.dumps({"begin": number}).encode() + b"\n")
            state, value, note = "ok", {}, ""
            try:
                value = do(task)
            except Exception as error:  # told to the one who asked; the next task may well succeed
                state, note = "failed", f"{type(error).__name__}: {one_line(str(error), 300)}"
            stream.write(json.dumps({"state": state, "value": value, "note": note}).encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
