"""Training data: read whole and checked row by row before anything is learnt from it. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from radeon_stack.contracts.finetune import Data
from radeon_stack.contracts.sections import BIRTHDAY
from radeon_stack.errors import UsageError
from radeon_stack.workloads.finetune.files import values_in
from radeon_stack.workloads.finetune.forms import Row, form_of, row_of

BIRTHDAY_QUESTION = "What day was I born?"
BIRTHDAY_ANSWER = "January 1, 2058"


@dataclass(frozen=True)
class Rows:
    """All examples, and the question and answer that show what was learnt; `form` is a file's, of `forms.MARKS`."""

    name: str
    rows: Sequence[Row]
    question: str | None = None
    answer: str | None = None
    form: str = "messages"


def read_rows(config: Data, file: Path | None) -> Rows:
    """The rows of a data set. UsageError names the file and the first bad line, counted from 1."""
    if config.dataset == BIRTHDAY:
        chat = Row(
            (
                {"role": "user", "content": BIRTHDAY_QUESTION},
                {"role": "assistant", "content": BIRTHDAY_ANSWER},
            )
        )
        return Rows(BIRTHDAY, [chat] * config.copies, BIRTHDAY_QUESTION, BIRTHDAY_ANSWER)
    if file is None:
        raise UsageError("the data file was not passed on", where="config.data.dataset")
    form, rows = _checked(file)
    questions = (m["content"] for row in rows for m in row.messages if m["role"] == "user")
    return Rows(file.name, rows, next(questions, None), form=form)


def _checked(file: Path) -> tuple[str, list[Row]]:
    """A file's form, which its first row decides, and its rows."""
    first, begun = "", ""
    rows: list[Row] = []
    for unit, number, value in values_in(file):
        where = f"{file.name}: {unit} {number}"
        form = form_of(value, where)
        if not rows:
            first, begun = form, f"{unit} {number}"
        elif form != first:
            raise UsageError(
                f"this row has '{form}', from {begun} on they have '{first}'",
                where=where,
                remedy="one form a file",
            )
        rows.append(row_of(form, value, where))
    if not rows:
        raise UsageError("there is not one row in it", where=file.name, remedy="give at least one example")
    return first, rows
