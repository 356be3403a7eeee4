"""Slurm's own commands, and what they say of a job: asked with a time limit, told as ours when they fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from radeon_stack.errors import MachineError
from radeon_stack.text import one_line

# Slurm's commands wait MessageTimeout (10 s by default) for a controller, and try the next one of those there are.
SECONDS = 40.0
WHERE = "--engine slurm"
GONE = ("Invalid job id", "not found", "Job/step already completing or completed", "No such process")
# Of JOB STATE CODES in squeue(1): those in which something of the job is or will be on a node.
GOING = frozenset(
    (
        *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"),
        *("RESIZING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
    )
)
# Of a job's variables, should we be in one: what says which cluster, and on whose account.
KEPT_VARIABLES = ("SLURM_CONF", "SLURM_ACCOUNT", "SLURM_QOS", "SLURM_RESERVATION", "SLURM_CLUSTERS")
ID = re.compile(r"[0-9]+(_[0-9]+)?")


class ControllerError(MachineError):
    """slurmctld does not answer: what it was asked is not known, and may be known again in a minute."""


class UnknownJobError(MachineError):
    """The controller knows no such job, or not any more."""


@dataclass(frozen=True)
class Job:
    """What the controller says of a job: its state in Slurm's words, why it waits, and how often it was begun anew."""

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0
    exit_code: int | None = None
    preempted: bool = False

    @property
    def going(self) -> bool:
        return self.state in GOING

    @property
    def pending(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING")


def asked(command: Sequence[str], seconds: float = SECONDS, variables: Mapping[str, str] | None = None) -> str:
    """What one of Slurm's commands prints, with other variables than ours where some are given.

    MachineError when it is not there or refuses.

    ControllerError when nothing answers it, UnknownJobError when the job it names has gone.
    """
    if shutil.which(command[0]) is None:
        raise MachineError(
            f"there is no {command[0]} here",
            where=WHERE,
            remedy="submit from a login node of the cluster, or install Slurm's client (Debian: slurm-client)",
        )
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is for us,
            env=variables,
        )
    except subprocess.TimeoutExpired as error:
        raise ControllerError(
            f"{command[0]} says nothing within {seconds:g} s", where=WHERE, remedy="is slurmctld up? scontrol ping"
        ) from error
    except OSError as error:
        raise MachineError(f"cannot start {command[0]}: {error.strerror}", where=WHERE) from error
    if done.returncode == 0:
        return done.stdout
    # Of a task of an array that was called off, scontrol says on stdout that it is not there.
    said = one_line(" ".join((done.stderr.strip() or done.stdout).split()) or f"it ended with {done.returncode}", 300)
    if any(words in said for words in GONE):
        raise UnknownJobError(said, where=WHERE)
    if "Unable to contact slurm controller" in said or "Connection refused" in said or "timed out" in said.lower():
        raise ControllerError(f"{command[0]}: {said}", where=WHERE, remedy="is slurmctld up? scontrol ping")
    raise MachineError(f"{command[0]}: {said}", where=WHERE)


def job(name: str) -> Job | None:
    """What there is to know of a job, by its id or `ARRAY_TASK`; None when the controller has forgotten it."""
    try:
        text = asked(["scontrol", "--oneliner", "show", "job", name])
    except UnknownJobError:
        return None
    return parse_job(text)


def parse_job(text: str) -> Job | None:
    """The first job of what `scontrol --oneliner show job` prints."""
    line = next((line for line in text.splitlines() if line.startswith("JobId=")), None)
    if line is None:
        return None
    told = dict(word.split("=", 1) for word in line.split() if "=" in word)
    code, _, number = told.get("ExitCode", "").partition(":")
    ended = code.isdigit() and number.isdigit()
    return Job(
        id=told["JobId"],
        state=told.get("JobState", "").split(",")[0],
        reason="" if told.get("Reason") in (None, "None") else told["Reason"],
        nodes="" if told.get("NodeList") in (None, "(null)") else told["NodeList"],
        restarts=int(told["Restarts"]) if told.get("Restarts", "").isdigit() else 0,
        exit_code=(int(code) or (128 + int(number) if int(number) else 0)) if ended else None,
        preempted=told.get("PreemptTime", "None") != "None",
    )


def environment() -> dict[str, str]:
    """This process's variables without those that Slurm's commands take for options: a job's that we may be in, and
    sbatch's, which would count for more than what a script asks for."""
    ours = ("SLURM_", "SBATCH_")
    return {name: text for name, text in os.environ.items() if not name.startswith(ours) or name in KEPT_VARIABLES}
