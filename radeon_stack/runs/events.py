"""Events: what a workload tells, one JSON object a line, appended to `events.jsonl`.

This is the one contract of the host side that workloads import: it needs pydantic and `contracts`, nothing else.
A reader meets files written by a process that may have been killed in the middle of a line, or by a
container it does not trust: a line that is torn, too long or not an event is skipped and counted.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from radeon_stack.contracts.capabilities import Answer

MAX_LINE_BYTES = 1 << 20
MAX_VALUES = 64
Phase = Literal["before", "after", "merged"]
Name = Annotated[str, Field(max_length=64)]
Text = Annotated[str, Field(max_length=1 << 16)]
Whole = Annotated[int, Field(ge=-(1 << 53), le=1 << 53)]
Measured = Literal["ok", "missing", "crashed", "wrong", "failed"]


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")
    time: float = Field(default_factory=time.time, description="seconds since the epoch, UTC")


class Attempt(_Event):
    """The workload began; `resumed_step` is the checkpoint it continues from.

    Of several processes the first to come tells it; `launch` is what torchrun calls this start of them all.
    """

    kind: Literal["attempt"] = "attempt"
    pid: int
    resumed_step: int | None = None
    launch: str = ""


class Progress(_Event):
    """`done` of `total` in a stage (loading, tokenizing, training, merging …)."""

    kind: Literal["progress"] = "progress"
    stage: str
    done: float
    total: float
    unit: str = ""
    note: str = ""


class Metric(_Event):
    """Figures of one optimizer step: loss, grad_norm, learning_rate, epoch …"""

    kind: Literal["metric"] = "metric"
    step: int
    values: dict[str, float]


class Measurement(_Event):
    """What one implementation came to in one case of a benchmark.

    `suite` names the benchmark, `case` what was asked (dtype, sizes …), `values` the figures in SI units; a time comes
    with its spread (`forward_seconds`, `forward_seconds_p20`, `…_p80`). `state` is `missing` where the implementation
    is not there or does not take the case, `wrong` where its numbers are off; `note` has the reason.
    """

    kind: Literal["measurement"] = "measurement"
    suite: Name
    case: dict[Name, Whole | float | bool | Name] = Field(max_length=MAX_VALUES)
    implementation: Name
    state: Measured = "ok"
    values: dict[Name, float] = Field(default={}, max_length=MAX_VALUES)
    note: str = ""


class Answered(_Event):
    """A question about the card was answered."""

    kind: Literal["answer"] = "answer"
    answer: Answer


class Sample(_Event):
    """One sampled response; `correct` is None where no answer was expected.

    `phase` is a `Phase` of training, or who answered: transformers, llama.cpp q8_0 …
    """

    kind: Literal["sample"] = "sample"
    phase: Annotated[str, Field(pattern=r"^[a-z0-9_. ]{1,32}$")]
    index: int
    prompt: str
    response: str
    expected: str | None = None
    correct: bool | None = None


class Turn(BaseModel):
    """A greedy answer; `agrees` is how many of its `tokens` are transformers' before the first that is not."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: Text
    response: Text
    tokens: Annotated[int, Field(ge=0, le=1 << 24)]
    agrees: Annotated[int, Field(ge=0, le=1 << 24)]


class Loaded(_Event):
    """A program loaded what was exported, and answered. `state` is `missing` where the program is not there.

    `values`: right, agreement (shares), first_token, perplexity, perplexity_ratio, tokens_per_second, memory_bytes,
    file_bytes, seconds. `broken` names the limits that do not hold.
    """

    kind: Literal["loaded"] = "loaded"
    loader: Annotated[str, Field(pattern=r"^[a-z0-9_. ]{1,32}$")]
    state: Literal["ok", "broken", "missing"] = "ok"
    program: Name = ""
    values: dict[Name, float] = Field(default={}, max_length=MAX_VALUES)
    turns: Annotated[tuple[Turn, ...], Field(max_length=MAX_VALUES)] = ()
    broken: Annotated[tuple[Text, ...], Field(max_length=MAX_VALUES)] = ()


class Fact(_Event):
    """Something worth a section of the report: arguments, versions, statistics."""

    kind: Literal["fact"] = "fact"
    name: str
    value: JsonValue


class Artifact(_Event):
    """A finished output, whole under its final name; `path` is relative to the run directory."""

    kind: Literal["artifact"] = "artifact"
    name: str
    path: str
    bytes: int = 0


class Result(_Event):
    """The workload reached its end."""

    kind: Literal["result"] = "result"
    values: dict[str, JsonValue]


class Error(_Event):
    """The workload failed and knows why."""

    kind: Literal["error"] = "error"
    what: str
    where: str = ""
    remedy: str = ""
    exit_code: int


class Stopped(_Event):
    """The workload was asked to stop and did, cleanly; `step` is what it saved."""

    kind: Literal["stopped"] = "stopped"
    stage: str
    step: int | None = None


Event = (
    Attempt | Progress | Metric | Measurement | Answered | Sample | Loaded | Fact | Artifact | Result | Error | Stopped
)
_ADAPTER: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


class EventWriter:
    """Appends events to a file; one `write` a line, so that readers never see two lines mixed.

    A writer at a time: on NFS two nodes that append at once write over each other. Its locks want a descriptor that
    writes: flock(2), "NFS details".
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._alone = False
        if _ends_torn(path):
            os.write(self._fd, b"\n")

    def __call__(self, event: Event) -> None:
        """Append one event. OSError when the disk is full."""
        with self.alone():
            os.write(self._fd, event.model_dump_json().encode() + b"\n")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process appends; where a file system has no locks it may."""
        if self._alone:
            yield
            return
        try:
            with suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_EX)
            self._alone = True
            yield
        finally:
            self._alone = False
            with suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._fd)


def parse(line: bytes) -> Event | None:
    """The event on a line, or None for anything that is not one."""
    if len(line) > MAX_LINE_BYTES:
        return None
    try:
        return _ADAPTER.validate_json(line)
    except ValidationError:
        return None


@dataclass
class EventReader:
    """Reads what was appended since the last call; keeps a torn last line for the next one."""

    path: Path
    offset: int = 0
    skipped: int = 0
    _rest: bytes = field(default=b"", repr=False)

    def poll(self) -> Iterator[Event]:
        """Events that are whole by now; nothing when the file does not exist yet."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.offset)
                while block := stream.read(MAX_LINE_BYTES):
                    self.offset += len(block)
                    *lines, rest = (self._rest + block).split(b"\n")
                    self._rest = rest[: MAX_LINE_BYTES + 1]  # an endless line is dropped, not gathered
                    yield from self._parsed(lines)
        except FileNotFoundError:
            return

    def finish(self) -> Iterator[Event]:
        """The rest, the last line included even when no newline ends it."""
        yield from self.poll()
        rest, self._rest = self._rest, b""
        yield from self._parsed([rest])

    def _parsed(self, lines: Iterable[bytes]) -> Iterator[Event]:
        for line in lines:
            if not line.strip():
                continue
            event = parse(line)
            if event is None:
                self.skipped += 1
            else:
                yield event


def read_events(path: Path) -> list[Event]:
    """Every readable event of a file, in order."""
    return list(EventReader(path).finish())


def metrics_by_step(events: Iterable[Event]) -> dict[int, dict[str, float]]:
    """Figures a step, in step order, of training and evaluation; what a resumed attempt tells again counts."""
    latest: dict[int, dict[str, float]] = {}
    for event in events:
        if isinstance(event, Metric):
            latest.setdefault(event.step, {}).update(event.values)
    return dict(sorted(latest.items()))


def _ends_torn(path: Path) -> bool:
    with path.open("rb") as stream:
        if stream.seek(0, os.SEEK_END) == 0:
            return False
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) != b"\n"
