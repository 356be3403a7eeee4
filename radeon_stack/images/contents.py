"""What is in an image: its files in one pass over its flat file system, by layer, by package and by gfx."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from radeon_stack.codeobjects.report import Audit, AuditedFile, look
from radeon_stack.codeobjects.sources import Entry, tar
from radeon_stack.codeobjects.trim import Removal, removals
from radeon_stack.errors import UsageError
from radeon_stack.host.engines import client

EXPORT_SECONDS = 3600
LIST_LIMIT = 32 << 20
_RECORD = re.compile(r"^(?P<site>.*site-packages)/(?P<name>[^/]+?)-[^/-]+\.dist-info/RECORD$")
_DPKG = re.compile(r"^var/lib/dpkg/info/(?P<name>[^/:]+)(?::\w+)?\.list$")
_USER_MERGED = ("bin", "sbin", "lib", "lib64")


@dataclass(frozen=True)
class Contents:
    """Files by path in bytes, whose package each is, and which have code for GPUs."""

    files: dict[str, int]
    owners: dict[str, str]
    audited: tuple[AuditedFile, ...]

    @property
    def by_package(self) -> dict[str, int]:
        """Bytes by package, largest first; what no package owns is `(no package)`."""
        found: dict[str, int] = {}
        for path, size in self.files.items():
            owner = self.owners.get(path, "(no package)")
            found[owner] = found.get(owner, 0) + size
        return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))

    @property
    def by_gfx(self) -> dict[str, int]:
        """Bytes of code by gfx, largest first."""
        return Audit(self.audited).totals

    def removable(self, gfx: str, rocm_short: str) -> list[Removal]:
        return removals(self.files.items(), gfx, rocm_short)


@contextmanager
def exported(image: Any) -> Iterator[IO[bytes]]:
    """The image's flat file system as a tar, streamed from the engine."""
    container = client(timeout=EXPORT_SECONDS).containers.create(image.id, command=["true"])
    try:
        yield io.BufferedReader(_Chunks(container.export()), 1 << 20)
    finally:
        container.remove(force=True)


def read_contents(entries: Iterable[Entry]) -> Contents:
    """Every file looked into once."""
    files: dict[str, int] = {}
    owners: dict[str, str] = {}
    audited: list[AuditedFile] = []
    for entry in entries:
        name = entry.name.removeprefix("./")
        files[name] = entry.size
        if entry.size <= LIST_LIMIT:
            owners.update(_owned(name, entry))
        with suppress(UsageError):  # a file that is broken takes its room all the same; `image audit` tells it
            if (found := look(entry)) is not None:
                audited.append(found)
    return Contents(files, owners, tuple(audited))


def image_contents(image: Any) -> Contents:
    with exported(image) as stream:
        return read_contents(tar(stream, str(image.id)))


def layers(image: Any) -> list[tuple[int, str]]:
    """(bytes, what made it), from the lowest; those without a byte are left out."""
    history = [(int(step["Size"]), _instruction(str(step.get("CreatedBy", "")))) for step in reversed(image.history())]
    return [(size, text) for size, text in history if size]


class _Chunks(io.RawIOBase):
    """An iterator of bytes as a readable stream."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            try:
                self._rest = next(self._chunks)
            except StopIteration:
                return 0
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _owned(name: str, entry: Entry) -> dict[str, str]:
    """The paths that a package's own list claims."""
    if match := _RECORD.match(name):
        text = _text(entry)
        rows = csv.reader(io.StringIO(text))
        paths = (_normal(f"{match['site']}/{row[0]}") for row in rows if row)
        return dict.fromkeys(paths, match["name"].lower().replace("_", "-"))
    if match := _DPKG.match(name):
        found = {}
        for line in _text(entry).splitlines():
            path = line.lstrip("/")
            found[path] = f"{match['name']} (debian)"
            if path.split("/", 1)[0] in _USER_MERGED:
                found[f"usr/{path}"] = found[path]
        return found
    return {}


def _text(entry: Entry) -> str:
    with entry.open() as stream:
        return stream.read().decode("utf-8", errors="replace")


def _normal(path: str) -> str:
    parts: list[str] = []
    for part in PurePosixPath(path).parts:
        if part == "..":
            parts = parts[:-1]
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _instruction(created_by: str) -> str:
    text = re.sub(r"--mount=\S+ ", "", " ".join(created_by.split()))
    return text.removeprefix("/bin/sh -c #(nop) ").removesuffix(" # buildkit") or "(imported)"
