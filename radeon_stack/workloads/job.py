"""One workload process: its arguments, its events, how it is stopped and how it ends."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from radeon_stack.errors import Exit, StackError
from radeon_stack.kernels import shipped
from radeon_stack.runs import events as ev
from radeon_stack.workloads.ranks import ALONE, Rank, end_with_the_launcher, lost_another, rank

# Seconds that a process outlives the one it lost: torchrun, which looks every tenth of one, tells of the first that it
# finds ended, and would take this one for the cause.
AFTER_ANOTHER = 1.0
# oneDNN, which multiplies on a CPU: it has found how, and most often has no memory for it. It does not say how much.
ATTEMPT_FILE = "slurm/attempt"  # in the run directory: which attempt is the newest; written by a cluster's job
ONEDNN = "could not create a primitive"


class StopRequested(BaseException):
    """Somebody asked for a clean stop. Not an Exception: no library may swallow it."""

    def __init__(self, stage: str, step: int | None = None) -> None:
        super().__init__(stage)
        self.stage = stage
        self.step = step


class TakenOverError(StackError):
    """Another attempt of this run has begun: what this one still does would be written over what that one does."""

    exit_code = Exit.WORKLOAD

    def __init__(self, run: Path) -> None:
        super().__init__("this attempt has been given up: another has begun", where=str(run))


@dataclass(frozen=True)
class Arguments:
    """Paths as this process sees them; everything else is in the run's `config.json`.

    `model` is "" for a workload that takes none.
    """

    run: Path
    cache: Path
    model: str
    data: Path | None
    resume: bool
    source: Path | None = None
    listen: str = "127.0.0.1"


@dataclass(frozen=True)
class Sizes:
    """What decides how much memory a workload takes, for the day there is not enough: its key, and what to do.

    `short` says how much there was and was not, where that is known.
    """

    where: str = "config"
    remedy: str = "take smaller sizes"
    short: str = ""


@dataclass
class Job:
    """What each step of a workload is handed: arguments, a way to tell, and a way to be stopped."""

    arguments: Arguments
    emit: Callable[[ev.Event], None]
    sizes: Sizes = Sizes()
    stage: str = "starting"
    rank: Rank = ALONE
    advise: Callable[[Exception], Sizes | None] | None = field(default=None, init=False)
    """Sizes that fit, from an error for want of memory; set by a workload that can tell."""
    held: int = field(default=0, init=False)
    """Bytes held between two steps, on the accelerator or else in main memory; 0 before the first."""
    stop_asked: bool = field(default=False, init=False)
    _deferred: bool = field(default=False, init=False)

    @property
    def artifacts(self) -> Path:
        return self.arguments.run / "artifacts"

    def progress(self, stage: str, done: float, total: float, *, unit: str = "", note: str = "") -> None:
        """Tell how far a stage is."""
        self.stage = stage
        self.emit(ev.Progress(stage=stage, done=done, total=total, unit=unit, note=note))

    def fact(self, name: str, value: Any) -> None:
        self.emit(ev.Fact(name=name, value=value))

    def artifact(self, name: str, path: Path) -> None:
        """Tell of a finished output inside the run directory."""
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size
        self.emit(ev.Artifact(name=name, path=str(path.relative_to(self.arguments.run)), bytes=size))

    @contextmanager
    def deferred_stop(self) -> Iterator[None]:
        """Inside, a stop is only noted in `stop_asked`: the step under way is finished and saved first."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def taken_over(self) -> bool:
        """Has a cluster begun this run again elsewhere? A node that it has given up may go on computing."""
        if not self.rank.attempt:
            return False
        try:
            newest = (self.arguments.run / ATTEMPT_FILE).read_text(encoding="ascii").strip()
        except (OSError, ValueError):  # not on a cluster, or its file system does not answer
            return False
        return newest != self.rank.attempt

    def require_own(self) -> None:
        """TakenOverError where this attempt is not the run's newest any more."""
        if self.taken_over():
            raise TakenOverError(self.arguments.run)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        asked_before, self.stop_asked = self.stop_asked, True
        if not self._deferred and not asked_before:
            raise StopRequested(self.stage)


def read_arguments(argv: list[str]) -> Arguments:
    parser = argparse.ArgumentParser(description="a radeon-stack workload; started by `radeon-stack run`")
    parser.add_argument("--run", type=Path, required=True, help="run directory with config.json")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what can be made again")
    parser.add_argument("--model", default="", help="model folder, or package:NAME")
    parser.add_argument("--data", type=Path, help="data file")
    parser.add_argument("--source", type=Path, help="folder of what a run made")
    parser.add_argument("--listen", default=Arguments.listen, help="address for clients, where it has any")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    known = parser.parse_args(argv)
    return Arguments(known.run, known.cache, known.model, known.data, known.resume, known.source, known.listen)


def read_config(run: Path) -> dict[str, Any]:
    """The `config` table of the run's record; `contracts` has its typed model."""
    record = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return dict(record["recipe"]["config"])


def carry_out(
    argv: list[str],
    work: Callable[[Job], dict[str, Any]],
    sizes: Sizes = Sizes(),
    resumed_step: Callable[[Job], int | None] = lambda job: None,
) -> int:
    """Run a workload from its first event, the attempt, to its last one; returns the process's exit code."""
    arguments = read_arguments(argv)
    shipped.use()
    here, write = rank(), ev.EventWriter(arguments.run / "events.jsonl")
    job = Job(arguments, write if here.first else _silent, sizes, rank=here)
    if not here.alone:
        end_with_the_launcher()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, job.on_signal)
    try:
        _begin(job, write, resumed_step(job))
        job.emit(ev.Result(values=work(job)))
        return Exit.OK
    except StopRequested as stop:
        job._deferred = True  # from here on nothing keeps it from telling how it ended
        told = ev.Stopped(stage=stop.stage, step=stop.step)
        if told.step is not None:  # agreed upon by all
            job.emit(told)
        else:
            _tell_first(job, write, told)
        return Exit.INTERRUPTED
    except TakenOverError as error:
        print(f"radeon-stack: {error.what}", file=sys.stderr, flush=True)  # nothing in its events: they are another's
        return Exit.WORKLOAD
    except Exception as error:
        job._deferred = True
        traceback.print_exc()
        sys.stderr.flush()
        failure = _failure(error, job)
        _tell_first(job, write, failure)
        if not here.alone and lost_another(error):
            time.sleep(AFTER_ANOTHER)
        return failure.exit_code


def _silent(event: ev.Event) -> None:
    pass


def _begin(job: Job, write: ev.EventWriter, resumed_step: int | None) -> None:
    """Tell of this attempt, unless another process of it did: no process's end may come before its beginning."""
    with _told_so_far(job, write) as told:
        begun = {event.launch for event in told if isinstance(event, ev.Attempt)}
        if job.rank.launch not in begun:
            write(ev.Attempt(pid=os.getpid(), resumed_step=resumed_step, launch=job.rank.launch))


def _tell_first(job: Job, write: ev.EventWriter, event: ev.Error | ev.Stopped) -> None:
    """Tell how this process ended, unless another one of this attempt did: then this one ended because of it."""
    with _told_so_far(job, write) as told:
        ended = False
        for earlier in told:
            ended = isinstance(earlier, ev.Error | ev.Stopped) or (ended and not isinstance(earlier, ev.Attempt))
        if not ended:
            write(event)


@contextmanager
def _told_so_far(job: Job, write: ev.EventWriter) -> Iterator[list[ev.Event]]:
    """What all processes have told, while none of them tells more; nothing of one that is alone."""
    if job.rank.alone:
        yield []
        return
    with write.alone():
        yield ev.read_events(job.arguments.run / "events.jsonl")


def _failure(error: Exception, job: Job) -> ev.Error:
    """The error event of an exception: known ones in our words, others in theirs."""
    if isinstance(error, StackError):
        return ev.Error(what=error.what, where=error.where, remedy=error.remedy, exit_code=error.exit_code)
    if not job.rank.alone and lost_another(error):
        return ev.Error(
            what=f"another of the run's {job.rank.count} processes ended while {job.stage}",
            where="log.txt",
            remedy="see why: radeon-stack runs logs RUN; then continue: radeon-stack run --resume RUN",
            exit_code=Exit.WORKLOAD,
        )
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in str(error):
        free = os.statvfs(job.artifacts)
        return ev.Error(
            what=f"the disk is full while {job.stage} ({free.f_bavail * free.f_frsize >> 20} MiB left)",
            where=str(job.arguments.run),
            remedy="free some room, then continue: radeon-stack run --resume RUN",
            exit_code=Exit.WORKLOAD,
        )
    if _wants_memory(error):
        sizes = (job.advise(error) if job.advise else None) or job.sizes
        return ev.Error(
            what=f"out of memory while {job.stage}: {sizes.short or _words(error)}",
            where=sizes.where,
            remedy=sizes.remedy,
            exit_code=Exit.WORKLOAD,
        )
    return ev.Error(
        what=f"{type(error).__name__} while {job.stage}: {_words(error)}",
        where="log.txt",
        remedy="the whole traceback: radeon-stack runs logs RUN",
        exit_code=Exit.WORKLOAD,
    )


def _wants_memory(error: Exception) -> bool:
    """Python's, numpy's and torch's errors; torch has none of its own for main memory."""
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError", "_ArrayMemoryError"):
        return True
    told = str(error)[:1000]
    known = "out of memory" in told or "can't allocate memory: you tried" in told or told.strip() == ONEDNN
    return isinstance(error, RuntimeError) and known


def _words(error: BaseException) -> str:
    """What it says, in a line: the reason often stands in the second."""
    return " ".join(str(error).split())[:300] or "no message"
