"""Which program gives a job on a node its container, or that the Python of the shared file system is taken."""

from __future__ import annotations

from dataclasses import dataclass

from radeon_stack.catalog.problems import nearest
from radeon_stack.errors import MachineError, UsageError
from radeon_stack.host.node_record import NodeRecord
from radeon_stack.text import one_line

VENV = "venv"
"""No container: the Python of the shared file system, as it is."""
# Apptainer first: most clusters have it, it needs no daemon and no range of uids, and an image is one file.
ORDER = ("apptainer", "singularity", "pyxis", "podman")


@dataclass(frozen=True)
class RuntimeChoice:
    """One of ORDER or VENV, and why."""

    name: str
    why: str


def choose_runtime(record: NodeRecord, asked: str | None = None, *, where: str = "--runtime") -> RuntimeChoice:
    """The runtime asked for, else the first of ORDER that can be used on the node, else none.

    UsageError for a name that is none of them, MachineError for one that the node has not.
    """
    if asked is None:
        for name in ORDER:
            if not why_not(record, name):
                return RuntimeChoice(name, f"{_described(record, name)} is on {record.hostname}")
        return RuntimeChoice(VENV, f"{record.hostname} has none of {', '.join(ORDER)}")
    if asked not in (*ORDER, VENV):
        hint = nearest(asked, (*ORDER, VENV))
        raise UsageError(f"'{one_line(asked)}' is no container runtime; {hint}", where=where)
    missing = "" if asked == VENV else why_not(record, asked)
    if missing:
        usable = [name for name in ORDER if not why_not(record, name)]
        raise MachineError(missing, where=where, remedy=f"what can be used there: {', '.join((*usable, VENV))}")
    return RuntimeChoice(asked, "asked for")


def why_not(record: NodeRecord, name: str) -> str:
    """Why a runtime cannot be used on the node; "" when it can."""
    if name == "pyxis":
        enroot = record.runtime("enroot")
        if not record.pyxis:
            return f"srun has no --container-image on {record.hostname}: Slurm's plugin pyxis is not there"
        return enroot.why_not if enroot else f"there is no enroot on {record.hostname}, which pyxis calls"
    found = record.runtime(name)
    if found is None:
        return f"there is no {name} on {record.hostname}"
    return f"{name} on {record.hostname}: {found.why_not}" if found.why_not else ""


def _described(record: NodeRecord, name: str) -> str:
    found = record.runtime("enroot" if name == "pyxis" else name)
    version = found.version if found else ""
    return f"pyxis with enroot {version}".strip() if name == "pyxis" else f"{name} {version}".strip()
