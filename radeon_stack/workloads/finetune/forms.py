"""The forms that training data comes in; every one ends in the same Row. Needs no torch.

A row tells its form by the field that it alone has. What others publish is taken as it is published:

- `messages`: OpenAI's chats, a list of {"role", "content"}
- `conversations`: ShareGPT's, a list of {"from", "value"}; optional `system`
- `instruction`, `output`: Alpaca's; optional `input` (below the instruction, in the same turn) and `system`
- `prompt`, `completion`: one question, one answer
- `text`: no chat, learnt as it stands
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from radeon_stack.errors import UsageError
from radeon_stack.text import one_line

ROLES = ("system", "user", "assistant", "tool")
# Who speaks in ShareGPT's form: its own two words, and those that later data sets write in it.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
}
MARKS = ("messages", "conversations", "instruction", "prompt", "text")
FIELDS = (*MARKS, "completion", "output", "input", "system", "history")  # all that is read of a row
NEEDED = "'messages', 'conversations', 'instruction' with 'output', 'prompt' with 'completion', or 'text'"
MAX_CHARACTERS = 16 << 20  # of a row; a context of a million tokens is some four million
MAX_MESSAGES = 1000  # of a row; telling answers from prompts renders a chat once for each
SHOWN = 40  # characters of a hostile value, in an error

_KINDS: dict[type, str] = {
    str: "a text",
    list: "a list",
    dict: "a JSON object",
    bool: "a truth value",
    int: "a number",
    float: "a number",
}

Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """One training example: either chat messages or plain text."""

    messages: tuple[Message, ...] = ()
    text: str = ""


def form_of(value: Any, where: str) -> str:
    """Which form a row has: the field of `MARKS` that names it. UsageError for none or two."""
    if not isinstance(value, dict):
        raise UsageError(f"found {kind(value)}; an object with {NEEDED} is needed", where=where)
    marks = [name for name in MARKS if name in value]
    if marks == ["instruction", "text"]:
        # Alpaca as it was published has its own rendering of the row beside it.
        marks = ["instruction"]
    if len(marks) != 1:
        found = ", ".join(one_line(str(name), SHOWN) for name in [*value][:8]) or "nothing"
        raise UsageError(f"needs one of {NEEDED}; found {found}", where=where)
    return marks[0]


def row_of(form: str, value: Mapping[str, Any], where: str) -> Row:
    """A row in one of the `MARKS`. UsageError names the field and what is allowed."""
    row = Row(text=_filled(value, "text", where)) if form == "text" else Row(_CHATS[form](value, where))
    size = len(row.text) + sum(len(message["content"]) for message in row.messages)
    if size > MAX_CHARACTERS:
        raise UsageError(f"the row has {size:,} characters; at most {MAX_CHARACTERS:,} are allowed", where=where)
    return row


def _openai(value: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    messages = []
    for message, place in _turns(value, "messages", "'role' and 'content'", where):
        role = _one_of(message, "role", {role: role for role in ROLES}, place)
        messages.append({"role": role, "content": _filled(message, "content", place)})
    return _answered(messages, where)


def _sharegpt(value: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    messages = _system(value, where)
    for turn, place in _turns(value, "conversations", "'from' and 'value'", where):
        role = _one_of(turn, "from", SPEAKERS, place)
        if role == "system" and messages:
            raise UsageError("the system speaks first, and once", where=place)
        messages.append({"role": role, "content": _filled(turn, "value", place)})
    return _answered(messages, where)


def _alpaca(value: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    if value.get("history"):
        raise UsageError("earlier turns are not read in this form; give them as 'messages'", where=f"{where}: history")
    question = "\n\n".join([_filled(value, "instruction", where), *_maybe(value, "input", where)])
    return _exchange(_system(value, where), question, _filled(value, "output", where))


def _prompt(value: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    return _exchange([], _filled(value, "prompt", where), _filled(value, "completion", where))


_CHATS = {"messages": _openai, "conversations": _sharegpt, "instruction": _alpaca, "prompt": _prompt}


def _exchange(before: list[Message], question: str, answer: str) -> tuple[Message, ...]:
    return (*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer})


def _turns(value: Mapping[str, Any], name: str, fields: str, where: str) -> list[tuple[dict[str, Any], str]]:
    """A list's objects, each with its place."""
    turns = value[name]
    if not isinstance(turns, list) or not turns:
        raise UsageError(f"'{name}' is {kind(turns)}; a list of messages is needed", where=where)
    if len(turns) > MAX_MESSAGES:
        raise UsageError(f"'{name}' has {len(turns):,} messages; at most {MAX_MESSAGES:,} are allowed", where=where)
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise UsageError(
                f"found {kind(turn)}; an object with {fields} is needed", where=f"{where}: {name}[{index}]"
            )
    return [(turn, f"{where}: {name}[{index}]") for index, turn in enumerate(turns)]


def _answered(messages: list[Message], where: str) -> tuple[Message, ...]:
    if not any(message["role"] == "assistant" for message in messages):
        raise UsageError("no message is the assistant's: there is nothing to learn", where=where)
    return tuple(messages)


def _one_of(value: Mapping[str, Any], name: str, allowed: Mapping[str, str], where: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or found not in allowed:
        shown = one_line(repr(found[:SHOWN]), SHOWN) if isinstance(found, str) else kind(found)
        raise UsageError(f"{name} is {shown}; allowed: {', '.join(allowed)}", where=where)
    return allowed[found]


def _system(value: Mapping[str, Any], where: str) -> list[Message]:
    return [{"role": "system", "content": text} for text in _maybe(value, "system", where)]


def _maybe(value: Mapping[str, Any], name: str, where: str) -> list[str]:
    """The text of an optional field; nothing where it is missing or blank."""
    found = value.get(name)
    return [] if found is None or (isinstance(found, str) and not found.strip()) else [_filled(value, name, where)]


def _filled(value: Mapping[str, Any], name: str, where: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not found.strip():
        raise UsageError(f"found {kind(found)}; some text is needed", where=f"{where}: {name}")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        # JSON can say half a character ("\\ud800"); no tokenizer takes it.
        raise UsageError(f"half a character (a lone surrogate) at {error.start}", where=f"{where}: {name}") from error
    return found


def kind(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "nothing"
    if isinstance(value, str) and value and not value.strip():
        return "blank text"
    word = _KINDS.get(type(value), f"a {type(value).__name__}")
    return word if value or not isinstance(value, str | list | dict) else word.replace("a ", "an empty ", 1)
