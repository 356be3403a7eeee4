"""A failed run's log against the known error texts; and what a GPU fault means for starting again."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from typing import Any

from radeon_stack.errors import MachineError, StackError
from radeon_stack.host.machine import boot_id
from radeon_stack.host.signatures import causes, diagnose
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.runs.outcome import Outcome
from radeon_stack.runs.store import Diagnosis, Run, State, Status

NEXT_ORDER = 1  # added to the seed of the data's order: a fault comes again at the same step of the same order
LOG = "log.txt"
SEED = "config.train.data_seed"


def explained(outcome: Outcome, run: Run, *, boot: str, begins: int = 0) -> Outcome:
    """The outcome with the cause that the run's log shows nearest, when one is known.

    `boot` in which the attempt was started, `begins` where its part of the log begins: earlier attempts' are before.
    """
    try:
        with run.log.open("rb") as stream:
            stream.seek(begins)
            found = causes(diagnose(stream))
    except OSError:
        return outcome
    if not found:
        return outcome
    known = found[0].signature
    fault = any(match.signature.fault for match in found)
    diagnosis = Diagnosis(known.id, known.cause, found[0].line, boot if fault else "")
    if outcome.where not in ("", LOG) and not fault:
        # The workload knew itself what was wrong and where: that is nearer than what its log looks like.
        return replace(outcome, diagnosis=diagnosis)
    return replace(outcome, what=known.title, where=LOG, remedy=known.remedy_for(run.id), diagnosis=diagnosis)


def refused(error: StackError, run: Run) -> Outcome:
    """The outcome of a run that its engine did not start; the error is given the remedy that its text has."""
    found = causes(diagnose(BytesIO(error.what.encode())))
    diagnosis = Diagnosis(found[0].signature.id, found[0].signature.cause, found[0].line) if found else None
    if found and not error.remedy:
        error.remedy = found[0].signature.remedy_for(run.id)
    return Outcome(State.FAILED, error.exit_code, error.what, error.where, error.remedy, diagnosis)


def require_reboot(status: Status | None, *, anyway: bool) -> None:
    """MachineError while the boot lasts in which this run's GPU faulted: starting again has hung whole machines."""
    diagnosis = status.diagnosis if status else None
    if diagnosis and diagnosis.boot and diagnosis.boot == boot_id(Sysroot()) and not anyway:
        raise MachineError(
            f"this run ended in a GPU fault ({diagnosis.signature}), and the machine has not been rebooted since",
            where="--resume",
            remedy="reboot, then continue; or take the risk: --after-fault",
        )


def with_other_order(record: dict[str, Any], status: Status | None) -> dict[str, Any]:
    """The record of a run with another order of its data, when it ended in a GPU fault; else as it is."""
    train = record.get("recipe", {}).get("config", {}).get("train", {})
    if not (status and status.diagnosis and status.diagnosis.boot) or not isinstance(train.get("data_seed"), int):
        return record
    train = train | {"data_seed": (train["data_seed"] + NEXT_ORDER) % (1 << 32)}
    config = record["recipe"]["config"] | {"train": train}
    return record | {"recipe": record["recipe"] | {"config": config}}
