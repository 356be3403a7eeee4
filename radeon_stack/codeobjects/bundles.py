"""Clang's offload bundles, plain and compressed: which targets, and how many bytes for each.

Source: LLVM, "Clang Offload Bundler" (file layout), lib/Driver/OffloadBundler.cpp (compressed header, versions 1 to 3).
All sizes in a bundle are claims: each is held against what is really there before it is used.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zstandard

from radeon_stack.codeobjects.isa import target_name
from radeon_stack.errors import UsageError

PLAIN_MAGIC = b"__CLANG_OFFLOAD_BUNDLE__"
COMPRESSED_MAGIC = b"CCOB"
ZLIB, ZSTD = 0, 1  # llvm::compression::Format
HEADERS = {1: struct.Struct("<4xHHIQ"), 2: struct.Struct("<4xHHIIQ"), 3: struct.Struct("<4xHHQQQ")}
ENTRY = struct.Struct("<QQQ")
COUNT = struct.Struct("<Q")

# Four bytes come about in compressed code by chance; with a version and a method behind them they do not.
_BEGINNING = re.compile(rb"__CLANG_OFFLOAD_BUNDLE__|CCOB[\x01-\x03]\x00[\x00\x01]\x00")

ENTRIES_LIMIT = 4096
ID_LIMIT = 256
HEADER_LIMIT = 4 << 20  # more than any honest table of entries
BUNDLES_LIMIT = 65_536
STEP = 1 << 16


@dataclass(frozen=True)
class Bundle:
    """One bundle: where it begins, how many bytes it takes, and the code for each target in bytes, uncompressed."""

    offset: int
    size: int
    compression: str
    """`none`, `zstd` or `zlib`, with the header's version: `zstd v2`."""
    targets: tuple[tuple[str, int], ...]


def bundles(data: memoryview) -> Iterator[Bundle]:
    """All bundles of a section or file, one after another, with padding between them. UsageError for a damaged one."""
    place, count = 0, 0
    while (found := _next(data, place)) is not None:
        bundle = _plain(data, found) if bytes(data[found : found + 1]) == b"_" else _compressed(data, found)
        yield bundle
        place = found + max(bundle.size, 1)
        count += 1
        if count > BUNDLES_LIMIT:
            raise UsageError(f"more than {BUNDLES_LIMIT} offload bundles")


def _next(data: memoryview, place: int) -> int | None:
    """Where the next bundle begins; only padding may stand before it, as linkers align each to a page."""
    while place < len(data):
        window = bytes(data[place : place + STEP])
        stripped = window.lstrip(b"\0")
        place += len(window) - len(stripped)
        if stripped:
            if bytes(data[place : place + len(PLAIN_MAGIC)]) == PLAIN_MAGIC:
                return place
            if bytes(data[place : place + 4]) == COMPRESSED_MAGIC:
                return place
            return _search(data, place)
    return None


def _search(data: memoryview, place: int) -> int | None:
    """A bundle further on, behind bytes that are none (version 1 does not tell its own length)."""
    overlap = len(PLAIN_MAGIC) - 1
    while place < len(data):
        window = bytes(data[place : place + STEP + overlap])
        hits = [match.start() for match in _BEGINNING.finditer(window)]
        if hits:
            return place + hits[0]
        place += STEP
    return None


def _plain(data: memoryview, offset: int) -> Bundle:
    entries = _entries(bytes(data[offset : offset + HEADER_LIMIT]))
    end = 0
    for start, size, _ in entries:
        if start + size > len(data) - offset:
            raise UsageError("an offload bundle tells of code beyond its end")
        end = max(end, start + size)
    return Bundle(offset, end, "none", _targets(entries))


def _compressed(data: memoryview, offset: int) -> Bundle:
    head = bytes(data[offset : offset + 32])
    version = struct.unpack_from("<H", head, 4)[0] if len(head) >= 8 else 0
    layout = HEADERS.get(version)
    if layout is None or len(head) < layout.size:
        raise UsageError(f"a compressed offload bundle of version {version}; 1 to 3 are known")
    fields = layout.unpack_from(head)
    method, uncompressed = fields[1], fields[-2]
    total = fields[2] if version > 1 else len(data) - offset
    if not layout.size <= total <= len(data) - offset:
        raise UsageError("a compressed offload bundle tells of more bytes than there are")
    # Let go also when it raises: a mapped file cannot be closed under a view of it.
    with data[offset + layout.size : offset + total] as body:
        name, head_bytes, used = _inflate(body, method, uncompressed)
    entries = _entries(head_bytes)
    if any(start + size > uncompressed for start, size, _ in entries):
        raise UsageError("an offload bundle tells of code beyond its end")
    size = total if version > 1 else layout.size + used
    return Bundle(offset, size, f"{name} v{version}", _targets(entries))


def _inflate(body: memoryview, method: int, uncompressed: int) -> tuple[str, bytes, int]:
    """The first bytes of what is compressed, as many as the table of entries can need, and the bytes read for it."""
    if method not in (ZLIB, ZSTD):
        raise UsageError(f"an offload bundle compressed by method {method}; 0 (zlib) and 1 (zstd) are known")
    name = ("zlib", "zstd")[method]
    limit = min(uncompressed, HEADER_LIMIT)
    found = bytearray()
    place = 0
    try:
        inflate = _zlib(limit) if method == ZLIB else zstandard.ZstdDecompressor().decompressobj().decompress
        while place < len(body) and len(found) < limit:
            piece = bytes(body[place : place + 1024])
            place += len(piece)
            # A kibibyte of zstd holds some hundred blocks of at most 128 KiB each: a bomb stays small.
            found += inflate(piece)
            if _complete(found):
                break
    except (zlib.error, zstandard.ZstdError) as error:
        raise UsageError(f"a damaged offload bundle: {error}") from error
    return name, bytes(found), place


def _zlib(limit: int) -> Callable[[bytes], bytes]:
    stream = zlib.decompressobj()
    return lambda piece: stream.decompress(piece, limit)


def _complete(found: bytearray) -> bool:
    """Is the whole table of entries there?"""
    try:
        _entries(bytes(found))
    except UsageError:
        return False
    return True


def _entries(head: bytes) -> list[tuple[int, int, str]]:
    """(offset, size, id) of each entry."""
    if not head.startswith(PLAIN_MAGIC):
        raise UsageError("what is compressed is no offload bundle")
    place = len(PLAIN_MAGIC)
    if len(head) < place + COUNT.size:
        raise UsageError("an offload bundle is cut off")
    count = COUNT.unpack_from(head, place)[0]
    if count > ENTRIES_LIMIT:
        raise UsageError(f"an offload bundle of {count} entries; {ENTRIES_LIMIT} at most")
    place += COUNT.size
    found = []
    for _ in range(count):
        if len(head) < place + ENTRY.size:
            raise UsageError("an offload bundle is cut off")
        start, size, length = ENTRY.unpack_from(head, place)
        place += ENTRY.size
        if length > ID_LIMIT or len(head) < place + length:
            raise UsageError("an offload bundle is cut off, or has an id too long")
        found.append((start, size, head[place : place + length].decode("ascii", errors="replace")))
        place += length
    return found


def _targets(entries: list[tuple[int, int, str]]) -> tuple[tuple[str, int], ...]:
    found: dict[str, int] = {}
    for _, size, identity in entries:
        if (name := target_name(identity)) is not None:
            found[name] = found.get(name, 0) + size
    return tuple(sorted(found.items()))
