"""The files of a thing: one file, a folder, a wheel, an exported container. None is written under a member's name.

A file that is not on disk by itself is spooled into an anonymous temporary file, and only when its first bytes say
that it is worth it. Archives are hostile: names, sizes and ratios are bounded.
"""

from __future__ import annotations

import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from radeon_stack.errors import UsageError

MEMBERS_LIMIT = 200_000
MEMBER_LIMIT = 8 << 30  # bytes; the largest ROCm library is 2 GiB
TOTAL_LIMIT = 64 << 30
RATIO_LIMIT, RATIO_FROM = 1000, 64 << 20
HEAD = 32
CHUNK = 1 << 20

Opener = Callable[[], AbstractContextManager[IO[bytes]]]


@dataclass(frozen=True)
class Entry:
    """A file: its name there, its bytes, its first bytes, and a way to open it for seeking."""

    name: str
    size: int
    head: bytes
    open: Opener


def entries(path: Path) -> Iterator[Entry]:
    """The files of a folder's tree, a wheel or a tar, or the file itself. UsageError when it cannot be read."""
    if path.is_dir():
        yield from folder(path)
    elif not path.is_file():
        raise UsageError("there is no such file", where=str(path))
    elif zipfile.is_zipfile(path):
        yield from wheel(path)
    elif tarfile.is_tarfile(path):
        with path.open("rb") as stream:
            yield from tar(stream, str(path))
    else:
        yield _on_disk(path, path.name)


def folder(root: Path) -> Iterator[Entry]:
    """All regular files below a folder, sorted; links are not followed."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield _on_disk(path, str(path.relative_to(root)))


def wheel(path: Path) -> Iterator[Entry]:
    """The files of a wheel or zip. UsageError for one that lies or would write elsewhere."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(members, path)
            for member in members:
                if member.is_dir():
                    continue
                with archive.open(member) as stream:
                    head = stream.read(HEAD)
                yield Entry(member.filename, member.file_size, head, _zip_opener(archive, member, path))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError) as error:
        raise UsageError(f"a damaged archive: {str(error)[:200]}", where=str(path)) from error


def tar(stream: IO[bytes], where: str) -> Iterator[Entry]:
    """The regular files of a tar, in one pass: each entry is opened before the next is asked for."""
    total = 0
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for count, member in enumerate(archive):
                if count > 10 * MEMBERS_LIMIT:
                    raise UsageError("too many files", where=where)
                if not member.isreg():
                    continue
                total += member.size
                if member.size > MEMBER_LIMIT or total > TOTAL_LIMIT:
                    raise UsageError("more bytes than any image of ours has", where=f"{where}: {member.name[:200]}")
                source = archive.extractfile(member)
                if source is None:
                    continue
                head = source.read(HEAD)
                yield Entry(member.name, member.size, head, _tar_opener(source, head, member, where))
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        raise UsageError(f"a damaged archive: {str(error)[:200]}", where=where) from error


def _on_disk(path: Path, name: str) -> Entry:
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD)
        return Entry(name, path.stat().st_size, head, lambda: path.open("rb"))
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _check_members(members: list[zipfile.ZipInfo], path: Path) -> None:
    if len(members) > MEMBERS_LIMIT:
        raise UsageError(f"more than {MEMBERS_LIMIT} members", where=str(path))
    seen: set[str] = set()
    total = 0
    for member in members:
        name, total = member.filename, total + member.file_size
        where = f"{path}: {name[:200]!r}"
        if name in seen:
            raise UsageError("two members of the same name", where=where)
        seen.add(name)
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or parts[0].startswith("/") or ".." in parts or ":" in parts[0] or "\0" in name:
            raise UsageError("a member that would be written elsewhere", where=where)
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UsageError("a member that is a link", where=where)
        if member.flag_bits & 1:
            raise UsageError("an encrypted member", where=where)
        ratio = member.file_size / max(member.compress_size, 1)
        if member.file_size > MEMBER_LIMIT or (member.file_size > RATIO_FROM and ratio > RATIO_LIMIT):
            raise UsageError("a member that unpacks to far more than it is", where=where)
    if total > TOTAL_LIMIT:
        raise UsageError("members that unpack to far more than any wheel has", where=str(path))


def _zip_opener(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path
) -> Callable[..., AbstractContextManager[IO[bytes]]]:
    @contextmanager
    def opened() -> Iterator[IO[bytes]]:
        with archive.open(member) as source, tempfile.TemporaryFile() as spool:
            _spool(source, spool, member.file_size, f"{path}: {member.filename}")
            yield spool

    return opened


def _tar_opener(
    source: IO[bytes], head: bytes, member: tarfile.TarInfo, where: str
) -> Callable[..., AbstractContextManager[IO[bytes]]]:
    @contextmanager
    def opened() -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile() as spool:
            spool.write(head)
            _spool(source, spool, member.size - len(head), f"{where}: {member.name}")
            yield spool

    return opened


def _spool(source: IO[bytes], spool: IO[bytes], size: int, where: str) -> None:
    """Copy exactly the bytes that were said."""
    left = size
    while left > 0 and (chunk := source.read(min(CHUNK, left))):
        spool.write(chunk)
        left -= len(chunk)
    if left:
        raise UsageError("a member that is shorter than it says", where=where)
    spool.flush()
    spool.seek(0)
