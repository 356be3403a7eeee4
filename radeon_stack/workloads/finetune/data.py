"""Training data: read whole and checked row by row before anything is learnt from it. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radeon_stack.contracts.finetune import Data
from radeon_stack.contracts.sections import BIRTHDAY
from radeon_stack.errors import UsageError

_KINDS = {
    "str": "text",
    "list": "list",
    "dict": "JSON object",
    "bool": "truth value",
    "int": "number",
    "float": "number",
}
ROLES = ("system", "user", "assistant", "tool")
MAX_LINE_BYTES = 16 << 20

BIRTHDAY_QUESTION = "What day was I born?"
BIRTHDAY_ANSWER = "January 1, 2058"

Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """One training example: either chat messages or plain text."""

    messages: tuple[Message, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Rows:
    """All examples, and the question and answer that show what was learnt."""

    name: str
    rows: Sequence[Row]
    question: str | None = None
    answer: str | None = None


def read_rows(config: Data, file: Path | None) -> Rows:
    """The rows of a data set. UsageError names the file and the first bad line, counted from 1."""
    if config.dataset == BIRTHDAY:
        chat: tuple[Message, ...] = (
            {"role": "user", "content": BIRTHDAY_QUESTION},
            {"role": "assistant", "content": BIRTHDAY_ANSWER},
        )
        return Rows(BIRTHDAY, [Row(chat)] * config.copies, BIRTHDAY_QUESTION, BIRTHDAY_ANSWER)
    if file is None:
        raise UsageError("the data file was not passed on", where="config.data.dataset")
    read = _parquet if file.suffix == ".parquet" else _jsonl
    rows = [_row(value, f"{file.name}: {unit} {number}") for unit, number, value in read(file)]
    if not rows:
        raise UsageError("there is not one row in it", where=file.name, remedy="give at least one example")
    questions = (m["content"] for row in rows for m in row.messages if m["role"] == "user")
    return Rows(file.name, rows, next(questions, None))


def _jsonl(file: Path) -> Iterator[tuple[str, int, Any]]:
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
                yield "line", number, json.loads(line.rstrip())
            except UnicodeDecodeError as error:
                raise UsageError(f"not UTF-8 at byte {error.start} of the line", where=where) from error
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"not JSON: {error.msg} at column {error.colno}", where=where, remedy="one JSON object a line"
                ) from error
            except RecursionError as error:
                raise UsageError("nested too deeply", where=where) from error


def _parquet(file: Path) -> Iterator[tuple[str, int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if not {"messages", "text"} & set(names):
            raise UsageError(f"has the columns {', '.join(names)}; 'messages' or 'text' is needed", where=file.name)
        number = 0
        for batch in table.iter_batches(columns=[n for n in ("messages", "text") if n in names]):
            for value in batch.to_pylist():
                number += 1
                yield "row", number, {key: part for key, part in value.items() if part is not None}
    except pyarrow.ArrowException as error:
        raise UsageError(f"not a readable Parquet file: {str(error).splitlines()[0]}", where=file.name) from error


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UsageError(f"found {_kind(value)}; an object with 'messages' or 'text' is needed", where=where)
    if ("messages" in value) == ("text" in value):
        found = ", ".join(map(str, value)) or "nothing"
        raise UsageError(f"needs either 'messages' or 'text'; found {found}", where=where)
    if "text" in value:
        return Row(text=_filled(value["text"], f"{where}: text"))
    return Row(messages=_messages(value["messages"], where))


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"'messages' is {_kind(value)}; a list of messages is needed", where=where)
    messages = []
    for index, message in enumerate(value):
        place = f"{where}: messages[{index}]"
        if not isinstance(message, dict):
            raise UsageError(f"found {_kind(message)}; an object with 'role' and 'content' is needed", where=place)
        role = message.get("role")
        if role not in ROLES:
            raise UsageError(f"role is {role!r}; allowed: {', '.join(ROLES)}", where=place)
        messages.append({"role": str(role), "content": _filled(message.get("content"), f"{place}: content")})
    if not any(m["role"] == "assistant" for m in messages):
        raise UsageError("no message is the assistant's: there is nothing to learn", where=where)
    return tuple(messages)


def _filled(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"found {_kind(value)}; some text is needed", where=where)
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str | list | dict) and not value:
        return f"an empty {_KINDS[type(value).__name__]}"
    if isinstance(value, str) and not value.strip():
        return "blank text"
    return f"a {_KINDS.get(type(value).__name__, 'number')}"
