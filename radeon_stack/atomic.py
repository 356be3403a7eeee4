"""Outputs that appear under their final name only when whole, also after `kill -9` or a power cut."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"
MANY = 1000  # files: one by one, those of a Python environment take half a minute; all that the machine has, a second


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Replace `path` by `text` in one step: a reader sees the old record or the new one."""
    write_bytes(path, text.encode(), mode=mode)


def write_bytes(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `data` in one step."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, mode)  # until here it was its owner's alone
        os.replace(name, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say where it is
        raise


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Fill the yielded `<path>.partial`; on leaving without an error it becomes `path`.

    What an earlier attempt left half-done is cleared first, and a failed attempt clears up after
    itself (a full disk needs the room to say so). An existing `path` is replaced, never mixed with.
    """
    partial = path.with_name(path.name + PARTIAL)
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync_tree(partial)
        if path.exists():
            # A directory cannot be replaced in one step: the old one leaves its name first.
            old = path.with_name(path.name + ".old" + PARTIAL)
            _remove(old)
            os.rename(path, old)
            os.rename(partial, path)
            _remove(old)
        else:
            os.rename(partial, path)
        _sync(path.parent)
    except BaseException:
        _remove(partial)
        raise


def _sync_tree(root: Path) -> None:
    entries = list(root.rglob("*"))
    if len(entries) > MANY:
        os.sync()
        return
    for entry in entries:
        _sync(entry)
    _sync(root)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
