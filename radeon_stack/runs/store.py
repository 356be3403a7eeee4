"""Run directories: `runs/<id>/` under the home folder, their records, and how to find one again."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from radeon_stack import atomic
from radeon_stack.errors import MachineError, UsageError

HOME_VARIABLE = "RADEON_STACK_HOME"
_ID = re.compile(r"^[0-9]{8}-[0-9]{6}-[a-z0-9-]+$")
_MEMBER = re.compile(r"^(.+)-[1-9][0-9]*$")


class State(StrEnum):
    """Where a run stands. `lost`: it ended and nothing was there to see how."""

    STARTING = "starting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    LOST = "lost"

    @property
    def ended(self) -> bool:
        return self not in (State.STARTING, State.RUNNING)


@dataclass(frozen=True)
class Diagnosis:
    """A known error text that explains a failure; `boot` names the boot in which a GPU faulted, "" without a fault."""

    signature: str
    cause: str
    evidence: str
    boot: str = ""


class Status(BaseModel):
    """`status.json`: replaced as a whole at every change."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    state: State
    recipe: str
    preset: str | None = None
    engine: str
    handle: dict[str, JsonValue] = {}
    launcher: dict[str, int] | None = None  # the process that has it carried out, until its keeper has begun
    keeper: dict[str, int] | None = None  # the process that carries the run out and will record its end
    host: str = ""  # of these processes
    boot: str = ""  # of the machine, in which the attempt was started
    started: float
    ended: float | None = None
    exit_code: int | None = None
    what: str = ""
    where: str = ""
    remedy: str = ""
    diagnosis: Diagnosis | None = None


@dataclass(frozen=True)
class Run:
    """One run directory. Reading never needs the run to be whole or to have ended."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    @property
    def sweep(self) -> Path:
        return self.path / "sweep.json"

    @property
    def is_sweep(self) -> bool:
        """Is it several runs, which have directories of their own beside it?"""
        return self.sweep.is_file()

    def member(self, number: int) -> Run:
        """The run of a sweep with that number, from one on."""
        return Run(self.path.with_name(f"{self.id}-{number}"))

    def read_json(self, path: Path) -> dict[str, JsonValue]:
        """A JSON record of this run, or {} when it is missing or unreadable."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def status(self) -> Status | None:
        """The status record, or None when the run was killed before it had one."""
        try:
            return Status.model_validate_json((self.path / "status.json").read_bytes())
        except (OSError, ValidationError):
            return None

    def write_status(self, status: Status) -> None:
        atomic.write_text(self.path / "status.json", status.model_dump_json(indent=2) + "\n")

    @contextmanager
    def changing(self) -> Iterator[None]:
        """One at a time: the status that is read in here is still the run's when another is written."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks for folders
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def home(environ: dict[str, str] | None = None) -> Path:
    """The home folder: `RADEON_STACK_HOME`, else `radeon-stack` in the XDG data folder."""
    env = os.environ if environ is None else environ
    try:
        if chosen := env.get(HOME_VARIABLE):
            return Path(chosen).expanduser().absolute()
        data = env.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    except RuntimeError as error:  # no such user, or one without a home
        raise UsageError(f"no home folder: {error}", where=HOME_VARIABLE, remedy=f"{HOME_VARIABLE}=DIR") from error
    return Path(data) / "radeon-stack"


@dataclass(frozen=True)
class RunStore:
    """All runs under one home folder."""

    home: Path

    @property
    def folder(self) -> Path:
        return self.home / "runs"

    def new(self, recipe: str) -> Run:
        """A run with an id of its own; nothing is made on disk yet."""
        name = re.sub(r"[^a-z0-9-]+", "-", recipe.lower()).strip("-") or "recipe"
        return Run(self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{secrets.token_hex(2)}")

    def __iter__(self) -> Iterator[Run]:
        """Runs, oldest first."""
        if self.folder.is_dir():
            names = sorted(e.name for e in self.folder.iterdir() if _ID.match(e.name))
            yield from (Run(self.folder / name) for name in names)

    def find(self, wanted: str, *, least: int = 1) -> Run:
        """The run called `last`, or the one whose id is, begins or ends with `wanted`; a sweep before its members.

        `least` characters: any id begins with the empty name that an unset variable gives.
        """
        if len(wanted) < least:
            what = f"'{wanted}' is too little of an id" if wanted else "the name is empty"
            more = f"give {least} characters of it or more" if wanted else "give an id, or last"
            raise UsageError(what, where="RUN", remedy=f"{more}; see: radeon-stack runs list")
        runs = list(self)
        if not runs:
            raise UsageError(
                f"no runs in {self.folder}", remedy="start one: radeon-stack run train-llama --preset demo"
            )
        if wanted == "last":
            return self.sweep_of(runs[-1]) or runs[-1]
        exact = [run for run in runs if run.id == wanted]
        found = exact or [run for run in runs if run.id.startswith(wanted) or run.id.endswith(wanted)]
        found = [run for run in found if self.sweep_of(run) not in found]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(run.id for run in found[:5])
            raise UsageError(f"'{wanted}' fits {len(found)} runs: {names}", remedy="give more of the id")
        near = get_close_matches(wanted, [run.id for run in runs], n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else "see: radeon-stack runs list"
        raise UsageError(f"no run '{wanted}' in {self.folder}", remedy=hint)

    def sweep_of(self, run: Run) -> Run | None:
        """The sweep that a run is a member of, by its name."""
        match = _MEMBER.match(run.id)
        sweep = Run(run.path.with_name(match[1])) if match else None
        return sweep if sweep and sweep.is_sweep else None

    def remove(self, run: Run) -> None:
        """Delete a run directory with everything in it."""
        shutil.rmtree(run.path)


def require_one(run: Run, where: str) -> None:
    """UsageError for a sweep, where a run alone will do."""
    if run.is_sweep:
        remedy = f"name one of its members: {run.member(1).id}"
        raise UsageError(f"{run.id} is a sweep of several runs", where=where, remedy=remedy)


def cannot_write(folder: Path, error: OSError) -> MachineError:
    """The error for a home folder that takes no files."""
    reason = error.strerror or str(error)
    return MachineError(
        f"cannot write there: {reason}",
        where=str(folder),
        remedy=f"free some room or choose another folder: {HOME_VARIABLE}=DIR",
    )
