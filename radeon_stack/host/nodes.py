"""What a partition's nodes are: one of them is asked, by a job of a minute at most, and its answer kept for a week."""

from __future__ import annotations

import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import radeon_stack
from radeon_stack import atomic
from radeon_stack.errors import MachineError
from radeon_stack.host import slurm
from radeon_stack.host.cluster import Cluster, Partition
from radeon_stack.host.node import BUNDLE, RECORD
from radeon_stack.host.node_record import NodeRecord, read_record
from radeon_stack.host.shared_folder import NOT_SHARED, NOT_WRITABLE, REMEDY, offered
from radeon_stack.text import one_line

FOLDER = "cluster"
KEPT_SECONDS = 7 * 24 * 3600
MINUTES = 2  # of the job
SLACK_SECONDS = 30  # for its prologue, and for srun to end
JOB_NAME = "radeon-stack-look"
BUSY = (
    "Requested nodes are busy",
    "Immediate execution impossible",
    "configuration not available now",
    "Job allocation",
)
NO_PYTHON = re.compile(r"execve\(\):|No module named|Permission denied|can't find '__main__'")


class NodeError(MachineError):
    """A node could not be asked."""


class BusyError(NodeError):
    """None was free in time."""


class SharingError(NodeError):
    """It does not see the submit host's folder."""


class PythonError(NodeError):
    """It does not run the submit host's Python."""


@dataclass(frozen=True)
class NodeFacts:
    """A bundle of the node's facts, for `host.bundle.opened`, and its record; when that was asked, in Unix seconds."""

    machine: Path
    record: NodeRecord
    asked: float


def node_of(
    home: Path,
    cluster: Cluster,
    partition: Partition,
    gpus_per_node: int = 0,
    *,
    anew: bool = False,
    wait_seconds: int = 60,
    options: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> NodeFacts:
    """A node of the partition, as it was within the last week, else as it is now; `options` are more words for srun;
    `say` hears when one is asked.

    MachineError when none is free within so many seconds, or when it does not see this Python or the home folder.
    """
    folder = home.absolute() / FOLDER / safe(cluster.name)
    kept = None if anew else kept_facts(folder, safe(partition.name), gpus_per_node)
    if kept is not None:
        return kept
    say(f"asking a node of partition {partition.name} what it is; its answer is kept for a week")
    token = secrets.token_hex(8)
    # Names of this question alone: NFS remembers for a while that a name was not there.
    name = f"{safe(partition.name)}.{token}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with offered(folder, name, token):
            words = command(partition, folder, name, token, gpus_per_node, wait_seconds, options)
            _ask(words, partition, folder, wait_seconds)
        return _kept(folder, name, safe(partition.name))
    except OSError as error:
        raise MachineError(f"cannot be written: {error.strerror}", where=str(folder), remedy=REMEDY) from error
    finally:
        for end in (BUNDLE, RECORD):
            with suppress(OSError):
                (folder / f"{name}{end}").unlink()


def _kept(folder: Path, told: str, name: str) -> NodeFacts:
    """What a node has just told, under the names by which it is kept."""
    ended = time.time()
    record = read_record(folder / f"{told}{RECORD}")
    if record is None:
        raise SharingError("the node wrote its answer, and it is not here", where=str(folder), remedy=REMEDY)
    # Its last word and srun's end are a moment apart: what is more than that is its clock.
    shared = record.shared.model_copy(update={"clock_offset": round(record.written - ended, 1)})
    record = record.model_copy(update={"shared": shared})
    os.replace(folder / f"{told}{BUNDLE}", folder / f"{name}{BUNDLE}")
    file = folder / f"{name}{RECORD}"
    atomic.write_text(file, record.model_dump_json(indent=1))
    return NodeFacts(folder / f"{name}{BUNDLE}", record, file.stat().st_mtime)


def kept_facts(folder: Path, name: str, gpus_per_node: int) -> NodeFacts | None:
    """What is known from before, when it still answers the question: of this Python, with GPUs or without."""
    file, machine = folder / f"{name}{RECORD}", folder / f"{name}{BUNDLE}"
    try:
        asked = file.stat().st_mtime
        record = read_record(file)
    except (OSError, MachineError):  # a damaged one is asked for anew
        return None
    fresh = time.time() - asked < KEPT_SECONDS and machine.is_file()
    if record is None or not fresh or record.python != sys.executable:
        return None
    return NodeFacts(machine, record, asked) if bool(record.gpus_asked) == bool(gpus_per_node) else None


def command(
    partition: Partition,
    folder: Path,
    name: str,
    token: str,
    gpus_per_node: int,
    wait_seconds: int,
    options: Sequence[str] = (),
) -> list[str]:
    """srun's words. `--chdir=/`: this folder need not be there on the node."""
    gpus = [f"--gpus-per-node={gpus_per_node}"] if gpus_per_node else []
    limit = min(MINUTES, partition.max_minutes or MINUTES)
    return [
        *("srun", f"--partition={partition.name}", "--nodes=1", "--ntasks=1", f"--time={limit}"),
        *(f"--immediate={wait_seconds}", f"--job-name={JOB_NAME}", "--export=ALL", "--chdir=/", *gpus, *options),
        *(sys.executable, "-m", "radeon_stack.host.node", "--to", str(folder)),
        *("--name", name, "--token", token, "--gpus", str(gpus_per_node)),
    ]


def environment() -> dict[str, str]:
    """Variables of the job: this package is found as it is here, and no words of our own job are taken for options."""
    kept = slurm.environment()
    places = [str(Path(radeon_stack.__file__).absolute().parents[1]), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(places)}


def safe(name: str) -> str:
    """A cluster's or partition's name as a file's."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:100] or "_"


def _ask(words: Sequence[str], partition: Partition, folder: Path, wait_seconds: int) -> None:
    try:
        slurm.asked(words, wait_seconds + MINUTES * 60 + SLACK_SECONDS, environment())
    except slurm.ControllerError:
        raise
    except MachineError as error:
        raise told(error, partition, folder, wait_seconds) from error


def told(error: MachineError, partition: Partition, folder: Path, wait_seconds: int) -> NodeError:
    """srun's words as ours."""
    where = f"partition {partition.name}"
    if any(words in error.what for words in BUSY):
        return BusyError(
            f"no node was free within {wait_seconds} s",
            where=where,
            remedy=f"wait until one is (sinfo --partition={partition.name}; squeue), or name another one: --partition",
        )
    if NOT_SHARED in error.what:
        return SharingError(NOT_SHARED, where=f"{folder}, {where}", remedy=REMEDY)
    if NOT_WRITABLE in error.what:
        return SharingError(one_line(error.what, 200), where=where, remedy=REMEDY)
    if NO_PYTHON.search(error.what):
        return PythonError(
            f"this Python ({sys.executable}) does not run on the node: {error.what}",
            where=where,
            remedy="install radeon-stack into an environment on a file system that all nodes see",
        )
    if "generic resource" in error.what or "node configuration is not available" in error.what:
        remedy = "no node has that, or the cluster counts no GPUs as gres: radeon-stack doctor --engine slurm"
        return NodeError(error.what, where=where, remedy=remedy)
    return NodeError(error.what, where=where, remedy=error.remedy)
