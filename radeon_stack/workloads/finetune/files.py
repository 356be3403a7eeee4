"""Data files → (line or row, its number, value), one at a time; nothing is believed of them. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from radeon_stack.errors import UsageError
from radeon_stack.text import one_line
from radeon_stack.workloads.finetune.forms import FIELDS, MARKS, NEEDED

MAX_LINE_BYTES = 16 << 20
MAX_LIST_BYTES = 1 << 30  # a list is read whole; lines are not
UTF8 = "save it as UTF-8"
WHOLE = "it may have been cut off: copy it again; or write it as .jsonl, one object a line"
PARQUET_ROWS = 256  # decoded at a time
SPACE = " \t\r\n"

Numbered = Iterator[tuple[str, int, Any]]


def values_in(file: Path) -> Numbered:
    """Each value of a .jsonl, .json or .parquet file, counted from 1. UsageError names the file and the place."""
    if file.suffix == ".parquet":
        return _parquet(file)
    return _list(file) if file.suffix == ".json" and _begins_list(file) else _lines(file)


def _begins_list(file: Path) -> bool:
    """Much that is called .json holds an object a line."""
    with file.open("rb") as stream:
        return stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _lines(file: Path) -> Numbered:
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{file.name}: line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise UsageError("the line is longer than 16 MiB", where=where, remedy="one JSON object a line")
            if not line.strip():
                continue
            try:
                value = json.loads(line.rstrip())
            except UnicodeDecodeError as error:
                raise UsageError(f"not UTF-8 at byte {error.start} of the line", where=where, remedy=UTF8) from error
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"not JSON: {_said(error)} at column {error.colno}", where=where, remedy="one JSON object a line"
                ) from error
            except RecursionError as error:
                raise UsageError("nested too deeply", where=where) from error
            except ValueError as error:  # a number of more digits than Python reads
                raise UsageError(f"not readable: {one_line(str(error))}", where=where) from error
            yield "line", number, value


def _list(file: Path) -> Numbered:
    """One JSON list, read element by element: the rows before a broken one are not lost sight of."""
    size = file.stat().st_size
    if size > MAX_LIST_BYTES:
        raise UsageError(
            f"a JSON list of {size >> 20:,} MiB; it is read whole, and at most {MAX_LIST_BYTES >> 20:,} MiB are",
            where=file.name,
            remedy="write it as .jsonl, one object a line",
        )
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 at byte {error.start}", where=file.name, remedy=UTF8) from error
    decode = json.JSONDecoder().raw_decode
    at, number = _past_space(text, text.index("[") + 1), 0
    if not text.startswith("]", at):
        while True:
            number += 1
            where = f"{file.name}: row {number}"
            try:
                value, at = decode(text, at)
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"not JSON: {_said(error)} at line {error.lineno} column {error.colno}", where=where, remedy=WHOLE
                ) from error
            except RecursionError as error:
                raise UsageError("nested too deeply", where=where) from error
            except ValueError as error:
                raise UsageError(f"not readable: {one_line(str(error))}", where=where) from error
            yield "row", number, value
            at = _past_space(text, at)
            if text.startswith("]", at):
                break
            if not text.startswith(",", at):
                found = repr(text[at]) if at < len(text) else "the file's end"
                raise UsageError(f"found {found} after it; ',' or ']' is needed", where=where, remedy=WHOLE)
            at = _past_space(text, at + 1)
    if rest := text[at + 1 :].strip(SPACE):
        raise UsageError(f"there is more after the list: {one_line(rest[:40])}", where=file.name)


def _said(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at")  # some of Python's go on with the place


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in SPACE:
        at += 1
    return at


def _parquet(file: Path) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        _require_columns(names, file)
        number = 0
        for batch in table.iter_batches(PARQUET_ROWS, columns=[name for name in FIELDS if name in names]):
            for value in batch.to_pylist():
                number += 1
                # A column has a value in every row, if only a null: that is a field which is not there.
                yield "row", number, {key: part for key, part in value.items() if part is not None}
    except (pyarrow.ArrowException, OSError) as error:
        # Text that is not UTF-8 is found on the way to Python, as a UnicodeDecodeError below.
        raise UsageError(f"not a readable Parquet file: {one_line(str(error))}", where=file.name) from error
    except UnicodeDecodeError as error:
        raise UsageError("not UTF-8", where=f"{file.name}: one of the {PARQUET_ROWS} rows after {number}") from error


def _require_columns(names: Collection[str], file: Path) -> None:
    if not set(MARKS) & set(names):
        found = ", ".join(one_line(name, 40) for name in [*names][:8]) or "none"
        raise UsageError(f"has the columns {found}; {NEEDED} is needed", where=file.name)
