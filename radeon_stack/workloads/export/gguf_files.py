"""Is a GGUF file whole? Asked before anything loads it: llama.cpp would end the process, or read what is not there.

The format: ggml's docs/gguf.md. Read by ggml's own Python package; a file may come from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from radeon_stack.errors import CheckError
from radeon_stack.text import one_line

MAGIC, SUPPORTED = b"GGUF", (2, 3)
HEADER_BYTES = 24  # magic, version, how many tensors, how many keys
MOST_TENSORS, MOST_KEYS, MOST_DEPTH = 1 << 20, 1 << 16, 4
# Bytes of a value by its type's number (ggml's gguf.h); strings and arrays say their own length.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
AGAIN = "make it again: radeon-stack run export-check --from RUN"


def require_whole_gguf(file: Path) -> Any:
    """A reader of the file, all of whose tensors lie in it. CheckError for one that is damaged or cut short."""
    _require_header(file)
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(file))
        ends = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
    except Exception as error:  # whatever numpy finds when it reads past the end
        what = f"damaged or cut short: {type(error).__name__}: {one_line(str(error), 120)}"
        raise CheckError(what, where=str(file), remedy=AGAIN) from error
    size = file.stat().st_size
    if not reader.tensors or size < ends:
        raise CheckError(f"cut short: it has {size:,} bytes of {ends:,}", where=str(file), remedy=AGAIN)
    if size > ends + reader.alignment:
        raise CheckError(f"too long: it has {size:,} bytes of {ends:,}", where=str(file), remedy=AGAIN)
    return reader


def _require_header(file: Path) -> None:
    """Counts and lengths are held against the file first: a reader would go on for as long as they say."""
    if not file.is_file():
        raise CheckError("no such file", where=str(file), remedy=AGAIN)
    with file.open("rb") as stream:
        head = stream.read(HEADER_BYTES)
    if head[:4] != MAGIC:
        raise CheckError("not a GGUF file", where=str(file), remedy=AGAIN)
    version, tensors, keys = (int.from_bytes(head[a:b], "little") for a, b in ((4, 8), (8, 16), (16, 24)))
    if len(head) < HEADER_BYTES or version not in SUPPORTED or not (0 < tensors <= MOST_TENSORS and keys <= MOST_KEYS):
        what = f"no plausible header: version {version}, {tensors:,} tensors, {keys:,} keys"
        raise CheckError(what, where=str(file), remedy=AGAIN)
    with file.open("rb") as stream:
        stream.seek(HEADER_BYTES)
        try:
            for _ in range(keys):
                _past(stream, STRING, file)
                _past(stream, _number(stream, 4), file)
        except ValueError as error:
            raise CheckError(f"damaged or cut short: {error}", where=str(file), remedy=AGAIN) from error


def _past(stream: BinaryIO, kind: int, file: Path, depth: int = 0) -> None:
    """Go past a value. ValueError for one that is longer than the file, or of no known type."""
    if kind == STRING:
        _skip(stream, _number(stream, 8), file)
    elif kind in SIZES:
        _skip(stream, SIZES[kind], file)
    elif kind == ARRAY and depth < MOST_DEPTH:
        inner, count = _number(stream, 4), _number(stream, 8)
        if inner in SIZES:
            _skip(stream, SIZES[inner] * count, file)
            return
        for _ in range(count):  # each has eight bytes at least, so the file's end comes first
            _past(stream, inner, file, depth + 1)
    else:
        raise ValueError(f"a value of type {kind}")


def _skip(stream: BinaryIO, size: int, file: Path) -> None:
    if size > file.stat().st_size - stream.tell():
        raise ValueError(f"a value of {size:,} bytes is longer than the file")
    stream.seek(size, 1)


def _number(stream: BinaryIO, size: int) -> int:
    data = stream.read(size)
    if len(data) < size:
        raise ValueError("the file ends within a key")
    return int.from_bytes(data, "little")


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """`{"file"}` → what the file says of itself."""
    reader = require_whole_gguf(Path(request["file"]))
    types: dict[str, int] = {}
    for tensor in reader.tensors:
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    return {"tensors": len(reader.tensors), "types": dict(sorted(types.items())), "architecture": architecture(reader)}


def architecture(reader: Any) -> str:
    """`general.architecture`, "" where it has none."""
    field = reader.get_field("general.architecture")
    return str(field.contents()) if field is not None else ""
