"""SHA256SUMS: what vouches for a folder's files later. Also read by `sha256sum --check SHA256SUMS`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from radeon_stack import atomic
from radeon_stack.errors import CheckError
from radeon_stack.text import one_line

SUMS = "SHA256SUMS"
MAX_LINES = 10_000
MAX_BYTES = 4 << 20
NAME = r"[^/\\\0\n]{1,255}"
LINE = re.compile(rf"([0-9a-f]{{64}}) [ *]({NAME})")
AGAIN = "copy the folder again, or make it anew"


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the sums of a folder's own files, by name.

    `known` has those that were taken while a file was written: it is not read again. CheckError for a name that a line
    cannot hold.
    """
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and file.name != SUMS)
    if odd := [name for name in names if not re.fullmatch(NAME, name)]:
        raise CheckError(f"cannot be summed under its name: {one_line(odd[0])}", where=str(folder), remedy="rename it")
    sums = {name: (known or {}).get(name) or sum_of(folder / name) for name in names}
    atomic.write_text(folder / SUMS, "".join(f"{found}  {name}\n" for name, found in sums.items()))


def require_sums(folder: Path) -> bool:
    """Read every file that the folder's sums name; False for a folder without sums: nothing vouches for it.

    CheckError with the first file that is not there or not the one that was written. Others beside them do not matter.
    """
    file = folder / SUMS
    if not file.is_file():
        return False
    for name, told in _read(file).items():
        if not (folder / name).is_file():
            raise CheckError(f"{name} is not there", where=str(folder), remedy=AGAIN)
        if sum_of(folder / name) != told:
            raise CheckError(f"{name} is not as it was written: its sum differs", where=str(folder), remedy=AGAIN)
    return True


def sums_of(folder: Path) -> dict[str, str]:
    """The sums that a folder has written down, by file; {} where it has none."""
    file = folder / SUMS
    return _read(file) if file.is_file() else {}


def sum_of(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_summed(file: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write the parts one after the other; the SHA-256 of them all, as they were before any disk had them."""
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for part in parts:
            stream.write(part)
            digest.update(part)
    return digest.hexdigest()


def _read(file: Path) -> dict[str, str]:
    """Name → sum. What coreutils would unescape is refused, as is a path."""
    with file.open("rb") as stream:
        text = stream.read(MAX_BYTES + 1)
    lines = text.decode("utf-8", "replace").split("\n")
    if len(text) > MAX_BYTES or len(lines) > MAX_LINES:
        raise CheckError(f"more than {MAX_LINES:,} lines or {MAX_BYTES >> 20} MiB", where=str(file), remedy=AGAIN)
    found: dict[str, str] = {}
    for number, line in enumerate(filter(None, lines), 1):
        match = LINE.fullmatch(line)
        if not match or match[2] in (".", "..", *found):
            raise CheckError(f"line {number} is no file's sum: {one_line(line, 80)}", where=str(file), remedy=AGAIN)
        found[match[2]] = match[1]
    if not found:
        raise CheckError("names no file", where=str(file), remedy=AGAIN)
    return found
