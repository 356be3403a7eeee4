"""Training data is checked row by row; a bad line is told by its number, and nothing is half read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.contracts.finetune import Data
from radeon_stack.errors import UsageError
from radeon_stack.workloads.finetune.data import Rows, read_rows

GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "a"}]}


def written(folder: Path, *lines: str | bytes) -> Path:
    file = folder / "chats.jsonl"
    file.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return file


def read(file: Path) -> Rows:
    return read_rows(Data(dataset=str(file)), file)


def refusal(file: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read(file)
    return str(caught.value)


def test_birthday_is_a_thousand_copies_of_one_chat() -> None:
    rows = read_rows(Data(), None)
    assert len(rows.rows) == 1000
    assert [message["content"] for message in rows.rows[999].messages] == ["What day was I born?", "January 1, 2058"]
    assert (rows.question, rows.answer) == ("What day was I born?", "January 1, 2058")


def test_chats_and_texts_are_read_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    rows = read(written(tmp_path, json.dumps(GOOD), "", json.dumps({"text": "some text"})))
    assert [row.text or row.messages[0]["content"] for row in rows.rows] == ["q?", "some text"]
    assert (rows.question, rows.answer) == ("q?", None)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("5", "found a number; an object with 'messages' or 'text' is needed"),
        ("{}", "needs either 'messages' or 'text'; found nothing"),
        ('{"text": "a", "messages": []}', "needs either 'messages' or 'text'; found text, messages"),
        ('{"txt": "a"}', "needs either 'messages' or 'text'; found txt"),
        ('{"text": "  "}', "text: found blank text; some text is needed"),
        ('{"text": null}', "text: found nothing; some text is needed"),
        ('{"messages": []}', "'messages' is an empty list"),
        ('{"messages": ["hi"]}', "messages[0]: found a text; an object with 'role' and 'content' is needed"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "messages[0]: role is 'bot'; allowed: system, user"),
        ('{"messages": [{"role": "user"}]}', "messages[0]: content: found nothing; some text is needed"),
        (
            '{"messages": [{"role": "user", "content": "q"}]}',
            "no message is the assistant's: there is nothing to learn",
        ),
        (b'{"text": "\xff"}', "not UTF-8"),
        pytest.param("[" * 100_000, "nested too deeply", id="a hundred thousand brackets"),
        pytest.param('{"text": "' + "x" * (16 << 20) + '"}', "longer than 16 MiB", id="over 16 MiB"),
    ],
)
def test_a_bad_line_is_told_by_its_number_and_what_is_wrong(tmp_path: Path, line: str | bytes, says: str) -> None:
    message = refusal(written(tmp_path, json.dumps(GOOD), "", line, json.dumps(GOOD)))
    assert message.startswith("chats.jsonl: line 3: "), message[:200]
    assert says in message


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert "not one row" in refusal(written(tmp_path))


@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda v: (
                st.lists(v, max_size=3)
                | st.dictionaries(st.sampled_from(["messages", "text", "role", "content"]), v, max_size=3)
            ),
            max_leaves=8,
        ),
        max_size=3,
    )
)
def test_any_json_lines_are_rows_or_a_usage_error(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    file = written(tmp_path_factory.mktemp("data"), *(json.dumps(value) for value in values))
    try:
        assert len(read(file).rows) == len(values)
    except UsageError as error:
        assert error.where.startswith("chats.jsonl")


@pytest.mark.work
class TestParquet:
    """The same rows from a Parquet file."""

    def file(self, folder: Path, **columns: list[Any]) -> Path:
        import pyarrow
        import pyarrow.parquet

        path = folder / "chats.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path

    def test_chats_are_read(self, tmp_path: Path) -> None:
        rows = read(self.file(tmp_path, messages=[GOOD["messages"], GOOD["messages"]]))
        assert [row.messages[1]["content"] for row in rows.rows] == ["a", "a"]

    def test_a_bad_row_is_told_by_its_number(self, tmp_path: Path) -> None:
        assert refusal(self.file(tmp_path, text=["fine", " "])).startswith(
            "chats.parquet: row 2: text: found blank text"
        )

    def test_a_file_without_our_columns_is_refused_naming_those_it_has(self, tmp_path: Path) -> None:
        assert "has the columns prompt; 'messages' or 'text' is needed" in refusal(self.file(tmp_path, prompt=["p"]))

    def test_a_truncated_file_is_refused(self, tmp_path: Path) -> None:
        path = self.file(tmp_path, text=["a"] * 100)
        path.write_bytes(path.read_bytes()[:-20])
        assert "not a readable Parquet file" in refusal(path)
