"""Layers of settings: recipe ← preset ← `--set` ← flags, and where each value came from."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from radeon_stack.errors import UsageError

Tree = dict[str, Any]


@dataclass
class Layers:
    """A merged tree; `origin` maps each dotted leaf to the layer that set it last."""

    tree: Tree = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    def add(self, tree: Mapping[str, Any], origin: str) -> None:
        """Lay a tree over what is there: tables merge, every other value replaces."""
        self._merge(self.tree, tree, origin, "")

    def _merge(self, into: Tree, tree: Mapping[str, Any], origin: str, prefix: str) -> None:
        for key, value in tree.items():
            path = prefix + key
            if isinstance(value, Mapping):
                self.origin[path] = origin
                below = into.get(key)
                if not isinstance(below, dict):
                    below = into[key] = {}
                self._merge(below, value, origin, path + ".")
            else:
                into[key] = value
                self.origin = {k: o for k, o in self.origin.items() if not k.startswith(path + ".")}
                self.origin[path] = origin


def parse_assignment(text: str) -> Tree:
    """`a.b=v` as a tree. The value is read as TOML (`24`, `5e-4`, `true`, `["q_proj"]`), else as a string."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of another encoding, which the records could not hold
        key = text.partition("=")[0]
        raise UsageError(f"the value of {key!a} is not UTF-8", where="--set", remedy="write it in UTF-8") from None
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise UsageError(f"'{text}' is not an assignment", where="--set", remedy="write --set train.steps=50")
    tree: Any = parse_value(value.strip())
    for part in reversed(parts):
        tree = {part: tree}
    return dict(tree)


def parse_value(text: str) -> object:
    """A TOML value, or the text itself where it is not one."""
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A line break in the text could smuggle in further keys: then it is a string.
    return document["value"] if list(document) == ["value"] else text


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted leaves of a tree, in order."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
