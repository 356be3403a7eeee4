"""Files of tensors, block by block: where in them each tensor is, its bytes, and the header of a file to write.

https://github.com/huggingface/safetensors, "Format". Needs nothing but Python, holds no tensor, and maps no file into
memory, whose touched pages would count as ours. A file may come from anywhere: every number in it is checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radeon_stack.errors import UsageError
from radeon_stack.text import one_line

MAX_HEADER_BYTES = 64 << 20  # of one file; safetensors itself allows 100 MB
MAX_DIMENSIONS = 16
LENGTH_BYTES = 8  # a file begins with the length of its header, little-endian
ALIGNMENT = 8  # of the first tensor
BLOCK = 1 << 20  # bytes that are read at once
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 << 20
METADATA = "__metadata__"
AGAIN = "download it again"
DTYPES = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "U16 I16 F16 BF16",
    32: "U32 I32 F32",
    64: "U64 I64 F64 C64",
}
BITS = {name: bits for bits, names in DTYPES.items() for name in names.split()}  # of one value


@dataclass(frozen=True)
class Place:
    """Where a tensor is: a file's bytes from `begin` to before `end`."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    @property
    def blocks(self) -> range:
        """How many of its bytes are before each block of them."""
        return range(0, self.bytes, BLOCK)

    def like(self, other: Place) -> bool:
        """Whether they are of one dtype and shape."""
        return (self.dtype, self.shape) == (other.dtype, other.shape)


def places(folder: Path) -> dict[str, Place]:
    """The tensors of a folder, in several files or in one, by their names.

    UsageError for a file that is cut short or no such file, and for an index that names what is not there.
    """
    index, whole = folder / INDEX, folder / WEIGHTS
    if whole.is_file() or not index.is_file():  # where there is a whole one, transformers looks at nothing else
        files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
        return {place.name: place for file in files for place in places_in(file)}
    told = _indexed(index)
    found: dict[str, Place] = {}
    for name in sorted(set(told.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise UsageError(f"names {one_line(name)}, which is not there", where=str(index), remedy=AGAIN)
        found |= {place.name: place for place in places_in(folder / name) if told.get(place.name) == name}
    if lost := sorted(told.keys() - found.keys()):
        raise UsageError(f"names {one_line(lost[0])}, which its file has not", where=str(index), remedy=AGAIN)
    return found


def places_in(file: Path) -> list[Place]:
    """The tensors of one file, in the order of their bytes, which leave no gap and do not overlap."""
    header, begins = raw_header(file)
    found = [_place(file, name, entry, begins) for name, entry in header.items() if name != METADATA]
    found.sort(key=lambda place: (place.begin, place.end))
    at = begins
    for place in found:
        if place.begin != at:
            raise _implausible(file, place.name)
        at = place.end
    if (size := file.stat().st_size) != at:
        how = "cut short" if size < at else "too long"
        raise UsageError(f"{how}: it has {size:,} bytes of {at:,}", where=str(file), remedy=AGAIN)
    return found


def raw_header(file: Path) -> tuple[dict[str, Any], int]:
    """A file's header as it stands there, and where it ends."""
    if not file.is_file():  # a pipe would be waited for without end
        raise UsageError("is not a file", where=str(file))
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise UsageError("not a safetensors file", where=str(file), remedy=AGAIN)
            text = stream.read(length)
    except OSError as error:
        raise UsageError(f"cannot read it: {error.strerror}", where=str(file)) from error
    if len(text) < length:
        raise UsageError("cut short within its header", where=str(file), remedy=AGAIN)
    return json_object(text, file), LENGTH_BYTES + length


def json_object(text: bytes, file: Path) -> dict[str, Any]:
    """A JSON object that was read from a file; UsageError, with the file, for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError("not readable JSON", where=str(file), remedy=AGAIN) from error
    if not isinstance(found, dict):
        raise UsageError("not a JSON object", where=str(file), remedy=AGAIN)
    return found


def header(tensors: Iterable[Place]) -> bytes:
    """The header of a file in which these tensors' bytes follow, one tensor's after the other's."""
    told: dict[str, Any] = {METADATA: {"format": "pt"}}
    at = 0
    for place in tensors:
        told[place.name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": [at, at + place.bytes]}
        at += place.bytes
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def read_into(buffer: memoryview, place: Place, skip: int = 0) -> None:
    """Fill a buffer with a tensor's bytes after the first `skip`. UsageError when the file ends before."""
    with place.file.open("rb") as stream:
        stream.seek(place.begin + skip)
        if stream.readinto(buffer) != buffer.nbytes:
            raise UsageError("became shorter while it was read", where=str(place.file))


def read(place: Place, skip: int = 0, most: int = BLOCK) -> bytes:
    """A tensor's bytes after the first `skip`, so many at most."""
    data = bytearray(min(most, place.bytes - skip))
    read_into(memoryview(data), place, skip)
    return bytes(data)


def _place(file: Path, name: str, entry: Any, begins: int) -> Place:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            dtype in BITS
            and len(shape) <= MAX_DIMENSIONS
            and all(type(size) is int and size >= 0 for size in shape)
            and 0 <= begin <= end
            and (end - begin) * 8 == math.prod(shape) * BITS[dtype]
        ):
            return Place(file, name, dtype, tuple(shape), begins + begin, begins + end)
    raise _implausible(file, name)


def _implausible(file: Path, name: str) -> UsageError:
    return UsageError(f"no plausible tensor: {one_line(name)}", where=str(file), remedy=AGAIN)


def _indexed(index: Path) -> dict[str, str]:
    with index.open("rb") as stream:
        text = stream.read(MAX_INDEX_BYTES + 1)
    if len(text) > MAX_INDEX_BYTES:
        raise UsageError(f"larger than {MAX_INDEX_BYTES >> 20} MiB", where=str(index))
    told = json_object(text, index).get("weight_map")
    if not isinstance(told, dict) or not all(isinstance(name, str) for name in told.values()):
        raise UsageError("has no weight_map of names", where=str(index), remedy=AGAIN)
    return told
