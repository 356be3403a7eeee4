"""Short runs of a tiny model on the cluster, and what is asked of them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from radeon_stack.host import slurm
from radeon_stack.runs import events as ev
from radeon_stack.runs.store import Run
from tests.conftest import wait_for

STEPS = 120
BETWEEN = STEPS // 4  # where something happens


def arguments(model: Path, data: Path, nodes: int, passes: int, *sets: str, steps: int = STEPS) -> list[str]:
    """A run on so many nodes, with so many passes of each a step."""
    values = [
        *(f"train.gradient_accumulation={passes}", f"train.steps={steps}", "train.checkpoint_every=10"),
        *("train.learning_rate=0.003", "data.max_length=64", "samples.count=1", "samples.max_new_tokens=4"),
        *("export.merge=false", "expect.right_after_min=0.0", "resources.memory=2GiB", *sets),
    ]
    options = [part for value in values for part in ("--set", value)]
    preset = ("--preset", "demo", "--model", str(model), "--data", str(data), "--json")
    return ["run", "train-llama", *preset, "--engine", "slurm", "--nodes", str(nodes), "--time", "20m", *options]


def job_of(run: Run) -> str:
    """The id of the run's job, once it has one."""

    def known() -> str | None:
        status = run.status()
        return str(status.handle["job"]) if status and status.handle else None

    return str(wait_for(known, what="the run's job"))


def job(run: Run) -> slurm.Job:
    found = slurm.job(job_of(run))
    assert found is not None
    return found


def attempts(run: Run) -> list[ev.Attempt]:
    return [event for event in ev.read_events(run.events) if isinstance(event, ev.Attempt)]


def curve(run: Run) -> dict[int, float]:
    """Losses by step; of a step that was done twice, the last."""
    told = ev.metrics_by_step(ev.read_events(run.events))
    return {step: values["loss"] for step, values in told.items() if "loss" in values}


def taught_in_order(run: Run) -> list[int]:
    """The steps as they were told, those done twice with them."""
    return [e.step for e in ev.read_events(run.events) if isinstance(e, ev.Metric) and "loss" in e.values]


def processes_of(run: Run) -> dict[int, str]:
    """Processes that work for a run, by their pid: those that have its directory among their words."""
    return {pid: words for pid, words in commands() if str(run.path) in words and "radeon_stack.workloads" in words}


def commands() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                yield int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue


def node_of(pid: int) -> str:
    """The node that a process is on, as Slurm has told it."""
    return variable(pid, "SLURMD_NODENAME")


def variable(pid: int, name: str) -> str:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return ""
    for entry in entries:
        if entry.startswith(f"{name}=".encode()):
            return entry.decode().partition("=")[2]
    return ""


@contextmanager
def held(run: Run) -> Iterator[None]:
    """Its training processes stand still in the middle of a step until SIGTERM waits for one of them: Slurm looks at a
    job's time every half minute only, and takes a while to miss a node."""
    pids = [pid for pid, words in processes_of(run).items() if "workloads.finetune" in words and rank_of(pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
        wait_for(lambda: any(map(is_asked, pids)), what="that one is asked to stop", seconds=120)
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def is_asked(pid: int) -> bool:
    """Does SIGTERM wait to be taken? proc(5), status: ShdPnd."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pending = int(next(line for line in lines if line.startswith("ShdPnd:")).split()[1], 16)
    return bool(pending >> (signal.SIGTERM - 1) & 1)


def rank_of(pid: int) -> str:
    return variable(pid, "RANK")


def asked(*words: Any) -> str:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True).stdout
