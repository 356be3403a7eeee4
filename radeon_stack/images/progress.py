"""BuildKit's plain progress, read into steps with their times."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

LINE = re.compile(r"^#(\d+) (.*)$")
STEP = re.compile(r"^\[(?P<stage>[^\]]*?)\s*(?P<count>\d+/\d+)?\] (?P<text>.*)$")
OUTPUT = re.compile(r"^\d+\.\d+ (.*)$")
DONE = re.compile(r"^DONE (\d+(?:\.\d+)?)s$")
TELLING = re.compile(
    r"^(?:[\w.]*(?:Error|Exception)|ERROR|error|fatal|verify|E)\s?: *+(?!metadata-generation-failed|subprocess)(.+)"
)
CAUSE = re.compile(r"^(?:cause|Caused by): (.+)")  # as uv tells them, the deepest last
TITLE_LENGTH = 68


@dataclass(frozen=True)
class Step:
    """A step that began or ended; `seconds` once it is done. A `note` is no step: something to know about them."""

    title: str
    state: Literal["running", "done", "cached", "failed", "note"]
    seconds: float = 0.0


class Steps:
    """Takes lines as they come and tells each step once it begins and once it ends.

    The builder's own doings (`[internal] …`) are not told. `failed` and `reason` are those of the first failure.
    """

    def __init__(self, tell: Callable[[Step], None]) -> None:
        self._tell = tell
        self._titles: dict[str, str] = {}
        self._last_output: dict[str, str] = {}
        self._telling: dict[str, str] = {}
        self._spoken = ""
        self._running: set[str] = set()
        self.finished: list[Step] = []
        self.failed = ""
        self._why = ""

    @property
    def reason(self) -> str:
        """Why it failed, as far as was told."""
        return self._why or self._spoken

    def feed(self, line: str) -> None:
        """Read one line."""
        match = LINE.match(line)
        if match is None:
            if line.strip() and not line.startswith(("-", " >")):
                self._spoken = line.strip()
            return
        number, text = match.groups()
        if step := STEP.match(text):
            self._begin(number, step)
        elif output := OUTPUT.match(text):
            self._hear(number, output[1].strip())
        elif done := DONE.match(text):
            self._end(number, Step(self._titles.get(number, ""), "done", float(done[1])))
        elif text == "CACHED":
            self._end(number, Step(self._titles.get(number, ""), "cached"))
        elif text.startswith("ERROR"):
            self._fail(number, text)

    def _begin(self, number: str, step: re.Match[str]) -> None:
        stage = step["stage"]
        if stage == "internal":
            return
        if number not in self._titles:
            self._titles[number] = _title(stage, step["text"])
        if number not in self._running:
            self._running.add(number)
            self._tell(Step(self._titles[number], "running"))

    def _end(self, number: str, step: Step) -> None:
        if number in self._running:
            self._running.discard(number)
            self.finished.append(step)
            self._tell(step)

    def _hear(self, number: str, text: str) -> None:
        # The last line is seldom the reason: compilers and pip say goodbye after it.
        if TELLING.match(text):
            self._telling[number] = text
        elif text:
            self._last_output[number] = text

    def _fail(self, number: str, text: str) -> None:
        step = Step(self._titles.get(number, "the build"), "failed")
        self._end(number, step)
        if not self.failed:
            self.failed = step.title
            self._why = self._telling.get(number) or self._last_output.get(number) or text.removeprefix("ERROR: ")


def reason(lines: Iterable[str]) -> str:
    """Why a program failed, from what it printed.

    That is the last line that tells of an error, with the deepest cause told after it; else the last line there is.
    """
    told = cause = last = ""
    for line in filter(None, map(str.strip, lines)):
        last = line
        if TELLING.match(line):
            told, cause = line, ""
        elif told and (match := CAUSE.match(line)):
            cause = match[1]
    return f"{told}: {cause}" if cause else told or last or "it said nothing"


def _title(stage: str, text: str) -> str:
    words = re.sub(r"--mount=\S+ ", "", " ".join(text.split()))
    title = f"{stage} · {words}"
    return title if len(title) <= TITLE_LENGTH else title[: TITLE_LENGTH - 1] + "…"
