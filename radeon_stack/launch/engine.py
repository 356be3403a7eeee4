"""What an engine is: a few verbs and questions, over a LaunchPlan and a handle that survives us."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import JsonValue

from radeon_stack.errors import UsageError
from radeon_stack.launch.plan import LaunchPlan

Handle = Mapping[str, JsonValue]  # written to status.json, so that another process can take over


@dataclass(frozen=True)
class Beginning:
    """Bytes of `log.txt` and `events.jsonl` that are earlier attempts'."""

    log: int = 0
    events: int = 0


class Engine(Protocol):
    """Carries out a LaunchPlan. Every method but `start` and `render` takes up any run by its handle."""

    name: str
    keeps: bool
    """Does it carry a run on by itself, for any machine to ask after? Else a process of ours keeps it."""
    pause: float
    """Seconds between two questions to it."""

    def files(self, plan: LaunchPlan) -> dict[Path, str]:
        """What has to lie where before the command of `render` is typed."""

    def start(self, plan: LaunchPlan) -> Handle:
        """Start the workload. MachineError or ImageError when the engine cannot."""

    def logs(self, handle: Handle) -> None:
        """See to it that all it prints is in the run's `log.txt`; returns when the workload has ended."""

    def begins(self, handle: Handle) -> Beginning:
        """Where this attempt's part of the run's log and events begins."""

    def alive(self, handle: Handle) -> bool:
        """Is it still there? False too when nothing is known of it any more."""

    def wait(self, handle: Handle) -> int | None:
        """Its exit code once it has ended, with nothing of it left behind; None when that is no longer known."""

    def stop(self, handle: Handle, *, force: bool = False) -> None:
        """Ask it to stop (SIGTERM), or end it (SIGKILL); does not wait."""

    def render(self, plan: LaunchPlan) -> list[str]:
        """The command that a person could type in place of `start`."""

    def standing(self, handle: Handle) -> str:
        """Where it stands, for a person; "" where there is nothing to tell but that it runs."""


def engine_named(name: str) -> Engine:
    """An engine by its name in a plan or status record."""
    from radeon_stack.launch.docker import DockerEngine
    from radeon_stack.launch.local import LocalEngine
    from radeon_stack.launch.slurm import SlurmEngine

    engines: dict[str, Callable[[], Engine]] = {"docker": DockerEngine, "local": LocalEngine, "slurm": SlurmEngine}
    if name not in engines:
        raise UsageError(f"no engine '{name}'; allowed: {', '.join(engines)}")
    return engines[name]()


def noted_beginning(handle: Handle) -> Beginning:
    """As a handle has it: `log_begins`, and `events_begin`, which is put there by whoever starts a run."""
    log, events = handle.get("log_begins", 0), handle.get("events_begin", 0)
    return Beginning(log if isinstance(log, int) else 0, events if isinstance(events, int) else 0)


def secret_values(plan: LaunchPlan) -> dict[str, str]:
    """Values of the plan's secrets, read at the last moment. UsageError for one that is not set."""
    missing = [name for name in plan.secrets if name not in os.environ]
    if missing:
        raise UsageError(f"{missing[0]} is not set", where="secrets", remedy=f"export {missing[0]}=… and run again")
    return {name: os.environ[name] for name in plan.secrets}
