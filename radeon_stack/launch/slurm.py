"""The slurm engine: a job that a cluster carries on by itself, wherever it was submitted."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from radeon_stack import atomic
from radeon_stack.errors import MachineError
from radeon_stack.host import slurm
from radeon_stack.launch.engine import Beginning, Handle, noted_beginning, secret_values
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.sbatch import ATTEMPT, BEGINS, ENDED, IN_VAIN_NOTE, SCRIPT, job_name, script

LOOK_SECONDS = 0.2  # at the run's own folder
ASK_SECONDS = (2.0, 15.0)  # the controller: soon at first, then as often as clusters like it
CANCELLED, KILLED = 143, 137  # as a shell tells SIGTERM and SIGKILL


class SlurmEngine:
    """Jobs. What one prints goes to the run's log by itself, and it notes its exit code in the run's folder."""

    name = "slurm"
    keeps = True
    pause = 5.0

    def files(self, plan: LaunchPlan) -> dict[Path, str]:
        return {Path(plan.run_dir) / SCRIPT: script(plan)}

    def start(self, plan: LaunchPlan) -> Handle:
        secret_values(plan)  # that they are set; the job has our environment
        return {**prepared(plan, self), "job": submitted(Path(plan.run_dir) / SCRIPT, plan.run_id)}

    def logs(self, handle: Handle) -> None:
        pause = ASK_SECONDS[0]
        while True:
            noted, deadline = _ended(handle), time.monotonic() + pause
            with suppress(MachineError):  # nobody answers, or not what was asked: the job goes on, and so do we
                if not self.alive(handle):
                    return
            while time.monotonic() < deadline and _ended(handle) == noted:
                time.sleep(LOOK_SECONDS)
            pause = min(2 * pause, ASK_SECONDS[1])

    def begins(self, handle: Handle) -> Beginning:
        try:  # of the newest attempt of the job
            log, events = (Path(str(handle["dir"])) / BEGINS).read_text(encoding="ascii").split()
            return Beginning(int(log), int(events))
        except (OSError, ValueError):
            return noted_beginning(handle)

    def alive(self, handle: Handle) -> bool:
        ended = _ended(handle)
        job = slurm.job(_id(handle))
        if job is None or not job.going:
            return False
        # What has noted its end may be an attempt that the controller has given up meanwhile.
        return ended is None or job.pending or job.restarts > ended.restarts

    def wait(self, handle: Handle) -> int | None:
        self.logs(handle)
        if (ended := _ended(handle)) is not None:
            return ended.code
        job = slurm.job(_id(handle))
        if job is None:  # what was called off before it began is forgotten at once
            return None if (Path(str(handle["dir"])) / ATTEMPT).exists() else CANCELLED
        if job.state in ("CANCELLED", "DEADLINE", "TIMEOUT", "PREEMPTED"):
            return KILLED if (Path(str(handle["dir"])) / ATTEMPT).exists() else CANCELLED
        if job.state in ("NODE_FAIL", "BOOT_FAIL"):
            return None
        return KILLED if job.state == "OUT_OF_MEMORY" else job.exit_code

    def stop(self, handle: Handle, *, force: bool = False) -> None:
        name = _id(handle)
        job = slurm.job(name)
        if job is None or not job.going:
            return
        try:
            if force and not job.pending:
                slurm.asked(["scancel", "--full", "--signal=KILL", name])
            if force or job.pending:
                slurm.asked(["scancel", name])
            else:
                # The script asks its processes; scancel alone would leave them KillWait to save, 30 s by default.
                slurm.asked(["scancel", "--batch", "--signal=USR2", name])
        except slurm.ControllerError:
            raise
        except MachineError:  # it has ended meanwhile: scancel says that in many ways, and in some by its code alone
            if _going(name):
                raise

    def render(self, plan: LaunchPlan) -> list[str]:
        return ["sbatch", str(Path(plan.run_dir) / SCRIPT)]

    def standing(self, handle: Handle) -> str:
        """Where its job stands, for a person."""
        name = _id(handle)
        job = slurm.job(name)
        if job is None:
            return f"Slurm knows no job {name} any more"
        begun = f", begun {job.restarts + 1} times" if job.restarts else ""
        if job.pending:
            return f"job {name} waits in the queue ({job.reason or job.state}){begun}"
        return f"job {name}: {job.state}" + (f" on {job.nodes}" if job.nodes else "") + begun


def prepared(plan: LaunchPlan, engine: SlurmEngine) -> dict[str, JsonValue]:
    """Write what the job is started from; returns what its handle has beside the job."""
    folder = Path(plan.run_dir)
    for place, text in engine.files(plan).items():
        place.parent.mkdir(exist_ok=True)
        atomic.write_text(place, text)
    for noted in (ATTEMPT, ENDED, BEGINS, IN_VAIN_NOTE):
        (folder / noted).unlink(missing_ok=True)
    return {"dir": str(folder), "log_begins": _size(folder / "log.txt")}


def submitted(script: Path, run: str) -> str:
    """The id of the job that a script, of a run or sweep of that id, has become."""
    try:
        told = slurm.asked(["sbatch", "--parsable", str(script)], variables=slurm.environment())
    except slurm.ControllerError:
        # It may have taken the job, and only its answer be lost: then that is the run's, and no other is.
        told = slurm.asked(["squeue", "--noheader", f"--name={job_name(run)}", "--format=%F"])
        if not told.strip():
            raise
    name = told.strip().splitlines()[0].partition(";")[0].strip()
    if not slurm.ID.fullmatch(name):
        raise MachineError(f"sbatch gave no job: {name[:100]!r}", where=slurm.WHERE)
    return name


@dataclass(frozen=True)
class _End:
    """What an attempt has noted when it ended: which one, and its exit code."""

    restarts: int
    code: int


def _ended(handle: Handle) -> _End | None:
    try:
        attempt, code = (Path(str(handle["dir"])) / ENDED).read_text(encoding="ascii").split()
        return _End(int(attempt.rpartition(".")[2]), int(code))
    except (OSError, ValueError):
        return None


def _going(name: str) -> bool:
    job = slurm.job(name)
    return job is not None and job.going


def _id(handle: Handle) -> str:
    name = str(handle.get("job", ""))
    if not slurm.ID.fullmatch(name):
        raise MachineError("the run's status names no job", where="status.json: handle")
    return name


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
