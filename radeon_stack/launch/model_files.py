"""The files of a model folder: are they whole? Needs no torch, and reads nothing of a tensor.

A folder may come from anywhere: every file is bounded, every number checked.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from radeon_stack.errors import UsageError
from radeon_stack.safetensor_files import AGAIN, INDEX, WEIGHTS, json_object, raw_header
from radeon_stack.text import one_line

MAX_JSON_BYTES = 256 << 20  # a tokenizer of 262,144 words takes 33 MB
MAX_FILES = 1000
JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", INDEX)


def require_whole(folder: Path) -> None:
    """UsageError, with the file, for a model of which a file is damaged, cut short or not there."""
    for name in JSON_FILES:
        if os.path.lexists(folder / name):
            found = read_object(folder / name, MAX_JSON_BYTES)
            if name == INDEX and not (folder / WEIGHTS).exists():  # beside that one it is not looked at
                _require_shards(folder, found)
    for file in weight_files(folder):
        _require_length(file)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by name."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > MAX_FILES:
        raise UsageError(f"more than {MAX_FILES} safetensors files", where=str(folder))
    return files


def read_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: https://github.com/huggingface/safetensors, "Format"."""
    return raw_header(file)[0]


def read_object(file: Path, most: int) -> dict[str, Any]:
    """A JSON object of so many bytes at most."""
    _require_file(file)
    try:
        with file.open("rb") as stream:
            found = stream.read(most + 1)
    except OSError as error:
        raise UsageError(f"cannot read it: {error.strerror}", where=str(file)) from error
    if len(found) > most:
        raise UsageError(f"larger than {most >> 20} MiB", where=str(file))
    return json_object(found, file)


def _require_shards(folder: Path, index: dict[str, Any]) -> None:
    places = index.get("weight_map")
    names = set(map(str, places.values())) if isinstance(places, dict) else set()
    for name in sorted(names):
        if Path(name).name != name or not (folder / name).is_file():
            raise UsageError(f"names {one_line(name)}, which is not there", where=str(folder / INDEX), remedy=AGAIN)


def _require_length(file: Path) -> None:
    header, begins = raw_header(file)
    ends = max((_end(name, entry, file) for name, entry in header.items() if name != "__metadata__"), default=0)
    size, told = file.stat().st_size, begins + ends
    if size != told:
        how = "cut short" if size < told else "too long"
        raise UsageError(f"{how}: it has {size:,} bytes of {told:,}", where=str(file), remedy=AGAIN)


def _end(name: str, entry: Any, file: Path) -> int:
    """Where a tensor ends, in bytes after the header."""
    match entry:
        case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end:
            return end
    raise UsageError(f"no plausible tensor: {one_line(name)}", where=str(file), remedy=AGAIN)


def _require_file(file: Path) -> None:
    if not file.is_file():  # a pipe would be waited for without end
        raise UsageError("is not a file", where=str(file))
