"""The parent: a process for each question. They import side by side, and use the card one after the other.

The next children import while one answers, so that a question costs its own time; what is measured is never measured
beside another question's work.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from radeon_stack.contracts.capabilities import Answer
from radeon_stack.workloads.capabilities.steps import Question, shortened
from radeon_stack.workloads.faults import tells_of_a_fault

IMPORT_SECONDS = 180  # ROCm's libraries from a cold disk
DEATH_SECONDS = 5  # a process that outlives SIGKILL for so long is held by the driver
MOST_AHEAD = 3  # each holds torch in memory
MAX_LINE = 1 << 16
MAX_STDERR = 1 << 16
SEVERITY = ("crashed", "timed out", "wrong", "failed", "missing", "works")
AFTER_A_FAULT = "the GPU faulted in an earlier question; reboot before it is used again"
HELD = "a process that would not die holds the GPU; reboot"


def answers(questions: Sequence[Question], *, seconds: int, seed: int, ahead: int | None = None) -> Iterator[Answer]:
    """Each question's answer, in order. After a GPU fault nothing more is asked: it has hung whole machines."""
    waiting, started = deque(questions), deque[_Child]()
    ahead = ahead or max(1, min(MOST_AHEAD, (os.cpu_count() or 2) // 2))
    stopped = ""
    try:
        while waiting or started:
            while waiting and len(started) <= ahead and not stopped:
                started.append(_Child(waiting.popleft(), seconds, seed))
            if stopped:
                left = [child.question for child in started] + list(waiting)
                yield from (Answer(question=one.name, verdict="not asked", detail=stopped) for one in left)
                return
            child = started[0]
            told = child.answer()
            started.popleft()
            yield told
            stopped = AFTER_A_FAULT if child.faulted else HELD if child.held else ""
    finally:
        for child in started:
            child.end()


def overall(parts: Sequence[Mapping[str, Any]]) -> str:
    """The verdict of a question: the worst of its steps'."""
    found = {part["verdict"] for part in parts}
    return next((verdict for verdict in SEVERITY if verdict in found), "failed")


class _Child:
    """One process, in a session of its own: it is ended with all that it started."""

    def __init__(self, question: Question, seconds: int, seed: int) -> None:
        self.question = question
        self.faulted = self.held = False
        self._seconds = seconds
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (read after the process has ended)
        pipe, far = os.pipe()
        asked = {
            "run": question.run,
            "arguments": dict(question.arguments),
            "imports": list(question.imports),
            "seed": seed,
        }
        module = "radeon_stack.workloads.capabilities"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, "--answer", str(far), str(seconds), json.dumps(asked)],
                stdin=subprocess.PIPE,
                stdout=self._errors,
                stderr=self._errors,
                env={**os.environ, "PYTHONFAULTHANDLER": "1"},
                pass_fds=[far],
                start_new_session=True,
            )
        finally:
            os.close(far)
        self._lines = _Lines(pipe)

    def answer(self) -> Answer:
        """Have it answer, and end it."""
        name = self.question.name
        parts: list[dict[str, Any]] = []
        begun, end = "", None
        started = time.monotonic()
        limit: float = IMPORT_SECONDS
        late = False
        while True:
            line = self._lines.next(started + limit - time.monotonic())
            if not isinstance(line, dict):
                late = line == "late"
                break
            if "ready" in line:
                started, limit = time.monotonic(), self._seconds
                with suppress(OSError):
                    self._go()
            elif "begin" in line:
                begun = str(line["begin"])
            elif "done" in line:
                parts.append(line["done"])
                begun = ""
            elif "end" in line and end is None:
                end = line
        took = time.monotonic() - started
        code = self.end()
        self._replay(name)
        if end is not None and end["end"]:
            verdict, detail = end["end"], end.get("detail", "")
        else:
            if end is None:
                parts.append({"name": begun or "start", **self._death(late, limit, code)})
            verdict = overall(parts)
            said = next((part for part in parts if part["verdict"] == verdict and verdict != "works"), {})
            detail = shortened(f"{said['name']}: {said['detail']}") if said.get("detail") else ""
        self.faulted = self.faulted or tells_of_a_fault(detail)
        told = {"question": name, "verdict": verdict, "detail": detail, "seconds": took, "parts": parts}
        return Answer.model_validate(told)

    def end(self) -> int | None:
        """End it and all that it started; its exit code, None when it would not die."""
        if self._lines.open:
            self._kill()
        code = self._exit_code()
        if code is None:  # done, and stuck on its way out
            self._kill()
            code = self._exit_code()
            self.held = code is None
        self._kill()  # what it left behind
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        self._lines.close()
        return code

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _exit_code(self) -> int | None:
        try:
            return self._process.wait(DEATH_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def _go(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(b"go\n")
            self._process.stdin.flush()

    def _death(self, late: bool, limit: float, code: int | None) -> dict[str, str]:
        if late:
            return {"verdict": "timed out", "detail": f"no answer in {limit:g} s"}
        how = _signal_name(code) if code is not None and code < 0 else f"exit code {code}"
        last = self._last_words()
        return {"verdict": "crashed", "detail": shortened(how + (f": {last}" if last else ""))}

    def _last_words(self) -> str:
        """The last line on stderr above Python's own report of the crash."""
        before = self._stderr().partition("Fatal Python error")[0].strip().splitlines()
        return before[-1] if before else ""

    def _stderr(self) -> str:
        if self._errors.closed:
            return ""
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - MAX_STDERR))
        return self._errors.read().decode(errors="replace")

    def _replay(self, name: str) -> None:
        """What it printed goes into the run's log; a fault of the GPU is read from it."""
        text = self._stderr()
        self.faulted = tells_of_a_fault(text)
        if text.strip():
            print(f"--- {name}\n{text.rstrip()}", file=sys.stderr, flush=True)


class _Lines:
    """JSON objects from a pipe, each awaited for a limited time."""

    def __init__(self, pipe: int) -> None:
        self.open = True
        self._pipe = pipe
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)

    def next(self, seconds: float) -> dict[str, Any] | Literal["late", "closed"]:
        """The next line; `late` when none came in time, `closed` when none will come."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            if len(self._rest) > MAX_LINE or not self._selector.select(max(0.0, deadline - time.monotonic())):
                return "late"
            block = os.read(self._pipe, 4096)
            if not block:
                self.open = False
                return "closed"
            self._rest += block
        line, _, self._rest = self._rest.partition(b"\n")
        found = json.loads(line)
        return found if isinstance(found, dict) else {}

    def close(self) -> None:
        if self._pipe >= 0:
            self._selector.close()
            os.close(self._pipe)
            self._pipe = -1


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
