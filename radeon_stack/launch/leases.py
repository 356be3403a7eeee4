"""One run has a card at a time: a lock per GPU, held by who keeps the run, and gone when that dies.

A workload outlives its keeper that was killed: then the run that the lock file names still has the card until it ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from radeon_stack.errors import MachineError
from radeon_stack.host.gpus import Gpu
from radeon_stack.launch.plan import LaunchPlan

# Of the machine, not of a user: two people do not share a card unknowingly. Debian, Ubuntu: for everyone to write.
MACHINE_WIDE = Path("/run/lock")
LONGEST = 4096
PATIENCE_SECONDS, POLL_SECONDS = 1.0, 0.05  # who only asks for the owner holds the lock for a moment too
GoingOn = Callable[[Path], bool]
"""Does the workload of the run in that folder still go on?"""


def lease_folder(home: Path) -> Path:
    """`RADEON_STACK_LEASES`, else the machine's, else one below our own folder."""
    told = os.environ.get("RADEON_STACK_LEASES")
    if told:
        return Path(told)
    return MACHINE_WIDE if os.access(MACHINE_WIDE, os.W_OK | os.X_OK) else home / "leases"


def lease_name(gpu: Gpu) -> str:
    """What a GPU is told apart by: its PCI address, and its number when it is a partition."""
    return gpu.pci if gpu.partition is None else f"{gpu.pci}/{gpu.partition}"


def busy(gpus: tuple[Gpu, ...], folder: Path, going_on: GoingOn) -> dict[int, str]:
    """Who has which GPU, by its index."""
    owners = {gpu.index: owner(lease_name(gpu), folder, going_on) for gpu in gpus if gpu.pci}
    return {index: name for index, name in owners.items() if name}


def owner(name: str, folder: Path, going_on: GoingOn) -> str:
    """Who has this GPU, "" when nobody does."""
    descriptor = _open(_path(name, folder), create=False)
    if descriptor is None:
        return ""
    try:
        if not _locked(descriptor, 0):
            return _told(descriptor) or "another user's run"
        return _left_behind(descriptor, going_on)
    finally:
        os.close(descriptor)


@contextmanager
def leased(plan: LaunchPlan, folder: Path, going_on: GoingOn) -> Iterator[None]:
    """Hold the plan's GPUs. MachineError when another run has one."""
    with ExitStack() as held:
        for name in () if plan.shared else plan.gpus:
            held.enter_context(_lease(name, plan, folder, going_on))
        yield


@contextmanager
def _lease(name: str, plan: LaunchPlan, folder: Path, going_on: GoingOn) -> Iterator[None]:
    descriptor = _open(_path(name, folder), create=True)
    if descriptor is None:
        raise MachineError(f"cannot lock GPU {name}", where=str(folder), remedy="set RADEON_STACK_LEASES to a folder")
    try:
        if _locked(descriptor, PATIENCE_SECONDS):
            other = _left_behind(descriptor, going_on)
        else:
            other = _told(descriptor) or "another user's run"
        if other and other != plan.run_id:
            raise MachineError(
                f"GPU {name} is in use by {other}", where="--gpus", remedy="wait for it, or share it: --share"
            )
        _tell(descriptor, plan)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int, seconds: float) -> bool:
    """Try to have the lock for so long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)


def _path(name: str, folder: Path) -> Path:
    return folder / f"radeon-stack-{name.replace('/', '-')}.lock"


def _open(path: Path, *, create: bool) -> int | None:
    """The lock file: to write when it is ours, else to read, which is enough for a lock."""
    common = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    for flags in (os.O_RDWR, os.O_RDONLY, *((os.O_RDWR | os.O_CREAT | os.O_EXCL,) if create else ())):
        try:
            if flags & os.O_CREAT:
                path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, flags | common, 0o644)
        except OSError:
            continue
    return None


def _record(descriptor: int) -> dict[str, str]:
    """What the file tells; nothing when another user wrote it: what it names would be acted upon."""
    if os.fstat(descriptor).st_uid != os.getuid():
        return {}
    try:
        told = json.loads(os.pread(descriptor, LONGEST, 0))
        run, folder = str(told["run"]), str(told["dir"])
        return {} if "\0" in folder else {"run": run, "dir": folder}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _told(descriptor: int) -> str:
    return _record(descriptor).get("run", "")


def _left_behind(descriptor: int, going_on: GoingOn) -> str:
    """The run that the file names, when its workload is still there though its keeper is not."""
    told = _record(descriptor)
    return told["run"] if told and going_on(Path(told["dir"])) else ""


def _tell(descriptor: int, plan: LaunchPlan) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"run": plan.run_id, "dir": plan.run_dir}).encode(), 0)
    except OSError:
        return  # another user's file: the lock itself is what counts
