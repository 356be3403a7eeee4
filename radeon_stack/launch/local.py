"""The local engine: a child process in this Python, in a process group of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from radeon_stack.errors import MachineError
from radeon_stack.host.processes import Process
from radeon_stack.launch.engine import Beginning, Handle, noted_beginning, secret_values
from radeon_stack.launch.plan import LaunchPlan

POLL_SECONDS = 0.05


class LocalEngine:
    """Processes outlive us when we are killed: they print to a file, and are found again by pid and start time."""

    name = "local"
    keeps = False
    pause = 0.1

    def __init__(self) -> None:
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def files(self, plan: LaunchPlan) -> dict[Path, str]:
        return {}

    def start(self, plan: LaunchPlan) -> Handle:
        environment = {name: text for name, text in os.environ.items() if name not in plan.unset}
        environment |= dict(plan.env) | secret_values(plan)
        with (Path(plan.run_dir) / "log.txt").open("ab") as log:
            begins = log.tell()
            try:
                child = subprocess.Popen(
                    plan.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise MachineError(
                    f"cannot start {plan.command[0]}: {error.strerror}", where="--engine local"
                ) from error
        self._children[child.pid] = child
        process = Process.of(child.pid)
        return {"pid": child.pid, "started": process.started if process else 0, "log_begins": begins}

    def logs(self, handle: Handle) -> None:
        # Its output goes straight to log.txt, also when nobody is attached.
        child = self._children.get(_process(handle).pid)
        if child is not None:
            child.wait()
        while self.alive(handle):
            time.sleep(POLL_SECONDS)

    def begins(self, handle: Handle) -> Beginning:
        return noted_beginning(handle)

    def alive(self, handle: Handle) -> bool:
        process = _process(handle)
        child = self._children.get(process.pid)
        return process.alive if child is None else child.poll() is None

    def wait(self, handle: Handle) -> int | None:
        self.logs(handle)
        pid = _process(handle).pid
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # helpers that it left behind
        child = self._children.pop(pid, None)
        return None if child is None else child.wait()

    def stop(self, handle: Handle, *, force: bool = False) -> None:
        if self.alive(handle):
            with suppress(ProcessLookupError):
                if force:
                    os.killpg(_process(handle).pid, signal.SIGKILL)
                else:
                    os.kill(_process(handle).pid, signal.SIGTERM)

    def render(self, plan: LaunchPlan) -> list[str]:
        unset = [part for name in plan.unset for part in ("-u", name)]
        return ["env", *unset, *(f"{name}={value}" for name, value in plan.env), *plan.command]

    def standing(self, handle: Handle) -> str:
        return ""


def _process(handle: Handle) -> Process:
    pid, started = handle.get("pid"), handle.get("started")
    if not isinstance(pid, int) or pid <= 1 or not isinstance(started, int):
        raise MachineError("the run's status names no process", where="status.json: handle")
    return Process(pid, started)
