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
from radeon_stack.workloads.finetune import forms
from radeon_stack.workloads.finetune.data import Rows, read_rows

GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "a"}]}


SHAREGPT: dict[str, Any] = {"conversations": [{"from": "human", "value": "q?"}, {"from": "gpt", "value": "a"}]}
ALPACA: dict[str, Any] = {"instruction": "q?", "input": "", "output": "a"}
PROMPT: dict[str, Any] = {"prompt": "q?", "completion": "a"}
GOODS: list[dict[str, Any]] = [GOOD, SHAREGPT, ALPACA, PROMPT, {"text": "some text"}]


def written(folder: Path, *lines: str | bytes, name: str = "chats.jsonl") -> Path:
    file = folder / name
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


def contents(rows: Rows) -> list[list[tuple[str, str]]]:
    return [[(message["role"], message["content"]) for message in row.messages] for row in rows.rows]


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    rows = read(written(tmp_path, json.dumps(GOOD), "", json.dumps(GOOD)))
    assert contents(rows) == [[("user", "q?"), ("assistant", "a")]] * 2
    assert (rows.question, rows.answer, rows.form) == ("q?", None, "messages")


def test_plain_texts_are_no_chats(tmp_path: Path) -> None:
    rows = read(written(tmp_path, '{"text": "some text"}'))
    assert [(row.text, row.messages) for row in rows.rows] == [("some text", ())]
    assert (rows.question, rows.form) == (None, "text")


@pytest.mark.parametrize("row", [GOOD, SHAREGPT, ALPACA, PROMPT], ids=["openai", "sharegpt", "alpaca", "prompt"])
@pytest.mark.parametrize("form", ["jsonl", "list", "lines called json"])
def test_every_form_ends_in_the_same_chat(tmp_path: Path, row: dict[str, Any], form: str) -> None:
    if form == "list":
        file = written(tmp_path, json.dumps([row, row], indent=2), name="chats.json")
    else:
        name = "chats.jsonl" if form == "jsonl" else "chats.json"
        file = written(tmp_path, json.dumps(row), json.dumps(row), name=name)
    rows = read(file)
    assert contents(rows) == [[("user", "q?"), ("assistant", "a")]] * 2
    assert rows.question == "q?" and rows.form in row


def test_alpacas_input_stands_below_its_instruction_and_its_system_before_both(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "eins", "output": "one", "system": "Be brief.", "text": "as published"}
    assert contents(read(written(tmp_path, json.dumps(row)))) == [
        [("system", "Be brief."), ("user", "Translate.\n\neins"), ("assistant", "one")]
    ]


def test_sharegpts_speakers_become_roles(tmp_path: Path) -> None:
    said = [(name, name) for name in ("user", "chatgpt", "human", "tool", "model")]
    row = {"system": "s", "conversations": [{"from": name, "value": text} for name, text in said], "id": 7}
    assert [role for role, _ in contents(read(written(tmp_path, json.dumps(row))))[0]] == [
        *("system", "user", "assistant", "user", "tool", "assistant")
    ]


def test_the_line_that_has_another_form_is_named(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, "", json.dumps(ALPACA), json.dumps(ALPACA), json.dumps(GOOD)))
    assert message == (
        "chats.jsonl: line 4: this row has 'messages', from line 2 on they have 'instruction'; one form a file"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "chats.json: there is not one row in it"),
        ("[1]", "chats.json: row 1: found a number; an object with 'messages'"),
        ('[{"text": "a"}, {"text": 5}]', "chats.json: row 2: text: found a number; some text is needed"),
        ('[{"text": "a"}\n,]', "chats.json: row 2: not JSON: Expecting value at line 2 column 2"),
        ('[{"text": "a"}', "chats.json: row 1: found the file's end after it; ',' or ']' is needed"),
        ('[{"text": "a"} {"text": "b"}]', "chats.json: row 1: found '{' after it; ',' or ']' is needed"),
        ('[{"text": "a"}] []', "chats.json: there is more after the list: []"),
        ('[{"text": "a"}, ' + "[" * 100_000, "chats.json: row 2: nested too deeply"),
        ('[{"text": "a", "n": ' + "9" * 5000 + "}]", "chats.json: row 1: not readable: Exceeds the limit"),
        (b'[{"text": "\xff"}]', "chats.json: not UTF-8 at byte 11"),
        ('{\n"text": "a"}', "chats.json: line 1: not JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_list_is_told_by_its_row(tmp_path: Path, text: str | bytes, says: str) -> None:
    assert refusal(written(tmp_path, text, name="chats.json")).startswith(says)


def test_a_list_too_large_to_be_read_whole_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, '[{"text": "a"}]', name="chats.json")
    with file.open("r+b") as stream:
        stream.truncate((1 << 30) + 1)  # sparse: it takes no room
    assert "at most 1,024 MiB are; write it as .jsonl" in refusal(file)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    assert contents(read(written(tmp_path, b"\xef\xbb\xbf" + json.dumps([GOOD]).encode(), name="chats.json")))
    assert contents(read(written(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode())))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{"text": "a\tb"}', "not JSON: Invalid control character at column 12"),
        ("5", "found a number; an object with 'messages', 'conversations', 'instruction' with 'output'"),
        ("{}", "or 'text'; found nothing"),
        ('{"text": "a", "messages": []}', "needs one of 'messages', 'conversations', "),
        ('{"txt": "a"}', "or 'text'; found txt"),
        ('{"instruction": "a"}', "output: found nothing; some text is needed"),
        ('{"instruction": "a", "output": "b", "input": 3}', "input: found a number; some text is needed"),
        ('{"instruction": "a", "output": "b", "history": [["c", "d"]]}', "history: earlier turns are not read"),
        ('{"prompt": ["a"], "completion": "b"}', "prompt: found a list; some text is needed"),
        ('{"prompt": "a"}', "completion: found nothing; some text is needed"),
        ('{"completion": "a"}', "or 'text'; found completion"),
        ('{"conversations": [{"from": "bot", "value": "a"}]}', "conversations[0]: from is 'bot'; allowed: human, user"),
        ('{"conversations": [{"role": "user"}]}', "conversations[0]: from is nothing; allowed: human, user, gpt"),
        ('{"conversations": [{"from": "human", "value": "q"}, {"from": "system", "value": "s"}]}', "speaks first"),
        ('{"conversations": [{"from": ["human"], "value": "q"}]}', "from is a list; allowed: human"),
        (json.dumps({"messages": [{}] * 1001}), "'messages' has 1,001 messages; at most 1,000 are allowed"),
        ('{"text": "\\ud800"}', "text: half a character (a lone surrogate) at 0"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "not readable: Exceeds the limit"),
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
    told = line if isinstance(line, str) else line.decode(errors="replace")
    good = json.dumps(next((row for row in GOODS if next(iter(row)) in told[:40]), GOOD))
    message = refusal(written(tmp_path, good, "", line, good))
    assert message.startswith("chats.jsonl: line 3: "), message[:200]
    assert says in message


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert "not one row" in refusal(written(tmp_path))


TEXT = st.text(max_size=5)
NAMES = [*forms.FIELDS, "role", "content", "from", "value"]
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([*forms.SPEAKERS]),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(NAMES), v, max_size=4),
    max_leaves=12,
)


@given(st.lists(ANY, max_size=3), st.booleans())
def test_any_json_is_rows_or_a_usage_error(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], as_list: bool
) -> None:
    lines = [json.dumps(values)] if as_list else [json.dumps(value) for value in values]
    name = "chats.json" if as_list else "chats.jsonl"
    file = written(tmp_path_factory.mktemp("data"), *lines, name=name)
    try:
        rows = read(file)
    except UsageError as error:
        assert error.where.startswith("chats.json") and len(str(error)) < 1000
    else:
        assert len(rows.rows) == len(values)
        for row in rows.rows:
            assert bool(row.text) != bool(row.messages)
            assert all(message["content"].strip() for message in row.messages)
            assert row.text or any(message["role"] == "assistant" for message in row.messages)


@given(st.binary(max_size=60))
def test_any_bytes_are_rows_or_a_usage_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    for name in ("chats.json", "chats.jsonl"):
        file = written(tmp_path_factory.mktemp("data"), data, name=name)
        with pytest.raises(UsageError):
            read(file)


@given(
    st.lists(st.tuples(st.sampled_from([*forms.SPEAKERS]), TEXT.filter(str.strip)), min_size=1, max_size=5),
    TEXT,
)
def test_sharegpts_and_openais_form_of_a_chat_are_the_same_row(said: list[tuple[str, str]], system: str) -> None:
    said = [(name, text) for name, text in said if name != "system"] + [("gpt", "a")]
    roles = [{"role": forms.SPEAKERS[name], "content": text} for name, text in said]
    told = [{"role": "system", "content": system}] * bool(system.strip()) + roles
    turns = [{"from": name, "value": text} for name, text in said]
    assert forms.row_of("conversations", {"conversations": turns, "system": system}, "here") == forms.row_of(
        "messages", {"messages": told}, "here"
    )


def test_a_row_of_any_file_has_a_bounded_size() -> None:
    with pytest.raises(UsageError, match="the row has 16,777,217 characters; at most 16,777,216"):
        forms.row_of("text", {"text": "x" * ((16 << 20) + 1)}, "here")


def pyarrow_nulls(count: int) -> Any:
    import pyarrow

    return pyarrow.nulls(count, pyarrow.string())


@pytest.mark.work
class TestParquet:
    """The same rows from a Parquet file."""

    def file(self, folder: Path, **columns: Any) -> Path:
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
        assert "has the columns question; 'messages', 'conversations', " in refusal(self.file(tmp_path, question=["p"]))

    @pytest.mark.parametrize("row", [GOOD, SHAREGPT, ALPACA, PROMPT], ids=["openai", "sharegpt", "alpaca", "prompt"])
    def test_every_form_is_read(self, tmp_path: Path, row: dict[str, Any]) -> None:
        columns = {name: [value] * 300 for name, value in row.items()}
        rows = read(self.file(tmp_path, **columns, source=["nobody"] * 300))
        assert contents(rows) == [[("user", "q?"), ("assistant", "a")]] * 300

    def test_a_column_that_a_row_leaves_out_is_not_there(self, tmp_path: Path) -> None:
        rows = read(self.file(tmp_path, prompt=["q?"], completion=["a"], text=pyarrow_nulls(1)))
        assert rows.form == "prompt"

    def test_text_that_is_not_utf8_is_refused(self, tmp_path: Path) -> None:
        import pyarrow

        wrong = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
        assert "not UTF-8" in refusal(self.file(tmp_path, text=wrong))

    def test_bytes_are_no_text(self, tmp_path: Path) -> None:
        assert "text: found a bytes; some text is needed" in refusal(self.file(tmp_path, text=[b"abc"]))

    def test_a_truncated_file_is_refused(self, tmp_path: Path) -> None:
        path = self.file(tmp_path, text=["a"] * 100)
        path.write_bytes(path.read_bytes()[:-20])
        assert "not a readable Parquet file" in refusal(path)
