"""`--sweep KEY=A,B,…`: values of a recipe to be tried each, and with several keys every combination of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from radeon_stack.catalog.load import in_recipe
from radeon_stack.catalog.merge import Tree, flatten, parse_assignment, parse_value
from radeon_stack.errors import UsageError

MOST = 64  # members: each is a run, with a model that it saves
OPTION = "--sweep"
EXAMPLE = "write --sweep train.learning_rate=1e-4,2e-4,5e-4"
CLOSING = {"[": "]", "{": "}"}

Point = Mapping[str, object]
"""A member's values by their keys, as `Axis.key` has these."""


@dataclass(frozen=True)
class Axis:
    """A key, as a person writes it below `config`, and the values it is given."""

    key: str
    values: tuple[object, ...]


def points(options: Sequence[str], sets: Sequence[str] = ()) -> tuple[Point, ...]:
    """Every combination of what the `--sweep` options give, the last one's values changing fastest.

    UsageError for a list that is none, a key that is given twice (by a `--set` too), and for more than `MOST`.
    """
    axes = [parse_axis(text) for text in options]
    for axis in axes:
        if [other.key for other in axes].count(axis.key) > 1:
            raise UsageError("is given twice", where=f"{OPTION} {axis.key}", remedy="give all its values in one list")
    taken = {key for text in sets for key, _ in flatten(in_recipe(parse_assignment(text)))}
    for axis in axes:
        if any(key in taken for key, _ in flatten(tree_of(axis.key, axis.values[0]))):
            raise UsageError("is given by --set too", where=f"{OPTION} {axis.key}", remedy="leave one of them out")
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MOST:
        raise UsageError(f"makes {count} runs; {MOST} at most", where=OPTION, remedy="give fewer values, or fewer keys")
    return tuple(
        dict(zip([axis.key for axis in axes], values, strict=True)) for values in product(*(a.values for a in axes))
    )


def parse_axis(text: str) -> Axis:
    """`a.b=1,2` as a key and its values, each read as `--set` reads it. UsageError for fewer than two values."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of another encoding, which the records could not hold
        raise UsageError(f"{text.partition('=')[0]!a} is not UTF-8", where=OPTION, remedy="write it in UTF-8") from None
    key, equals, told = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise UsageError(f"'{text}' is no list of values for a key", where=OPTION, remedy=EXAMPLE)
    told_in_full = parts[0] == "config" and "config" in in_recipe({"".join(parts[1:2]): None})
    name = ".".join(parts[1:] if told_in_full else parts)
    where = f"{OPTION} {name}"
    pieces = [piece.strip() for piece in split_values(told, where)]
    if not all(pieces):
        raise UsageError("a value is empty", where=where, remedy='an empty text is written ""')
    if len(pieces) < 2:
        raise UsageError("has one value alone", where=where, remedy=f"one is given by --set; {EXAMPLE}")
    values = [parse_value(piece) for piece in pieces]
    for piece, value, before in _with_earlier(pieces, values):
        if any(_same(value, other) for other in before):
            raise UsageError(f"has {piece} twice", where=where, remedy="leave one of them out")
    return Axis(name, tuple(values))


def split_values(text: str, where: str = OPTION) -> list[str]:
    """The text cut at its commas, but not at those inside TOML's quotes, arrays and tables.

    What begins with neither a quote nor a bracket is a bare word, in which both stand for themselves.
    """
    cuts, at = [-1], 0
    while at <= len(text):
        at = _end_of_value(text, at, where)
        cuts.append(at)
        at += 1
    return [text[start + 1 : end] for start, end in pairwise(cuts)]


def _end_of_value(text: str, start: int, where: str) -> int:
    """Where the comma after the value stands that begins at `start`, or the text's end."""
    first = next((char for char in text[start:] if not char.isspace()), "")
    awaited: list[str] = []  # closing brackets
    quote, at = "", start
    structured = first in ("[", "{", '"', "'")
    while at < len(text):
        char = text[at]
        if quote:
            if char == "\\" and quote == '"':
                at += 1
            elif char == quote:
                quote = ""
        elif structured and char in "\"'":
            quote = char
        elif structured and char in CLOSING:
            awaited.append(CLOSING[char])
        elif awaited and char == awaited[-1]:
            awaited.pop()
        elif char == "," and not awaited:
            return at
        at += 1
    if quote or awaited:
        raise UsageError(f"{quote or awaited[-1]} is missing at its end", where=where, remedy=EXAMPLE)
    return len(text)


def _with_earlier(pieces: list[str], values: list[object]) -> Iterator[tuple[str, object, list[object]]]:
    for at, (piece, value) in enumerate(zip(pieces, values, strict=True)):
        yield piece, value, values[:at]


def _same(one: object, other: object) -> bool:
    """1 is 1.0, and neither is true."""
    return one == other and isinstance(one, bool) is isinstance(other, bool)


def tree_of(key: str, value: object) -> Tree:
    """The tree that sets a key of a recipe."""
    first, *others = key.split(".")
    for part in reversed(others):
        value = {part: value}
    return in_recipe({first: value})


def flags_of(point: Point) -> dict[str, Tree]:
    """A point as `resolve` takes it: what is set by each flag, which errors name."""
    return {f"{OPTION} {key}": tree_of(key, value) for key, value in point.items()}
