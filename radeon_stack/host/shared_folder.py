"""A folder of two machines: one writes a token into it and keeps it locked, the other says what it sees of that."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from radeon_stack.errors import MachineError
from radeon_stack.host.node_record import Shared
from radeon_stack.host.sysroot import Sysroot

ENDING = ".token"
LONGEST = 4096
NOT_SHARED = "is not the submit host's folder on this node"
NOT_WRITABLE = "cannot be written on this node"
REMEDY = "it has to lie on a file system that all nodes see: RADEON_STACK_HOME=DIR"


@contextmanager
def offered(folder: Path, name: str, token: str) -> Iterator[None]:
    """Keep a token in the file `<name>.token`, exclusively locked."""
    file = folder / f"{name}{ENDING}"
    with file.open("x", encoding="ascii") as stream:
        try:
            stream.write(token)
            stream.flush()
            os.fsync(stream.fileno())
            with suppress(OSError):  # where there are no locks at all, the node tells so too
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield
        finally:
            with suppress(OSError):
                file.unlink()


def examine_shared(folder: Path, name: str, token: str) -> Shared:
    """The folder as it is seen here. MachineError when it is another one, or may not be written."""
    file = folder / f"{name}{ENDING}"
    try:
        with file.open(encoding="ascii", errors="replace") as stream:
            same = stream.read(LONGEST) == token
    except OSError:
        same = False
    if not same:
        raise MachineError(NOT_SHARED, where=str(folder), remedy=REMEDY)
    try:
        offset = _mtime_offset(folder)
    except OSError as error:
        raise MachineError(f"{NOT_WRITABLE}: {error.strerror}", where=str(folder), remedy=REMEDY) from error
    return Shared(
        writable=True,
        locks=_locks(file),
        free=_free(folder),
        kind=kind_of(folder, Sysroot().text("/proc/self/mounts") or ""),
        mtime_offset=offset,
    )


def kind_of(folder: Path, mounts: str) -> str:
    """The file system's kind: `nfs4`, `lustre`, `ext4`; the last of the longest mount points counts, as in proc(5)."""
    real, found, longest = os.path.realpath(folder), "", -1
    for line in mounts.splitlines():
        words = line.split()
        point = words[1].replace("\\040", " ") if len(words) > 2 else ""
        if point and len(point) >= longest and (Path(real).is_relative_to(point)):
            found, longest = words[2], len(point)
    return found


def _locks(file: Path) -> str:
    """Why locks do not hold between machines, "" when they do: that file is locked by the submit host."""
    try:
        with file.open("r+b") as stream:  # NFS makes it a lock on bytes, which wants a file open for writing
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ""
    except OSError as error:
        return f"flock: {error.strerror}"
    return "flock does not see the lock of another machine"


def _mtime_offset(folder: Path) -> float:
    """Our clock less that of the file system."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".node.") as stream:
        before = time.time()
        stream.write(b".")
        stream.flush()
        os.fsync(stream.fileno())
        # Half way between before and after is when the server has most likely seen it.
        return (before + time.time()) / 2 - os.fstat(stream.fileno()).st_mtime


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
