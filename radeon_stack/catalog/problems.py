"""Turns pydantic's findings into what a person needs: file, key, what was found, what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from radeon_stack.errors import UsageError

Location = tuple[int | str, ...]

# TOML's names for what pydantic calls by Python's.
_NAMED_TYPES = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "float_type": "a number",
    "int_type": "an integer",
    "model_type": "a table",
    "string_type": "a string",
    "tuple_type": "an array of strings",
}


def nearest(wanted: str, known: Sequence[str]) -> str:
    """`did you mean 'x'?`, or what there is when nothing is near."""
    near = get_close_matches(wanted, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return "allowed: " + ", ".join(sorted(known)) if known else "nothing is allowed here"


def dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)


def explain(
    error: ValidationError,
    model: type[BaseModel],
    data: Mapping[str, object],
    origin: Mapping[str, str],
    *,
    file: str,
    prefix: str = "",
) -> UsageError:
    """One UsageError for all findings; the first tells its place in full, the rest follow after it.

    `origin` maps dotted keys to where the value was given; `prefix` is put before every key.
    """
    findings: dict[Location, list[dict[str, Any]]] = {}
    for entry in error.errors(include_url=False):
        findings.setdefault(_place(entry, data), []).append(dict(entry))
    lines = []
    for location, entries in findings.items():
        key = prefix + dotted(location)
        text = _text(entries, location, model)
        lines.append((origin.get(key, file), key, text))
    (where, key, text), *others = lines
    more = "".join(f"; also {k}: {t}" for _, k, t in others)
    return UsageError(text + more, where=f"{where}: {key}" if key else where)


def _place(entry: Mapping[str, Any], data: Mapping[str, object]) -> Location:
    """The entry's location without the union branches that pydantic appends to it."""
    location: Location = entry["loc"]
    if entry["type"] in ("missing", "extra_forbidden"):
        return location
    value: object = data
    for depth, part in enumerate(location):
        if isinstance(value, Mapping) and part in value:
            value = value[str(part)]
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            return location[:depth]
    return location


def _text(entries: Sequence[Mapping[str, Any]], location: Location, model: type[BaseModel]) -> str:
    first = entries[0]
    if first["type"] == "extra_forbidden":
        return f"unknown key; {nearest(str(location[-1]), _fields_at(model, location[:-1]))}"
    if first["type"] == "missing":
        return "this key is missing; it has no default"
    allowed = " or ".join(dict.fromkeys(_allowed(entry) for entry in entries))
    found = first["input"]
    hint = ""
    if first["type"] == "literal_error" and isinstance(found, str):
        choices = [choice.strip("' ") for choice in first["ctx"]["expected"].replace(" or ", ",").split(",")]
        near = get_close_matches(found, choices, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"found {_shown(found)}; allowed: {allowed}{hint}"


def _allowed(entry: Mapping[str, Any]) -> str:
    kind: str = entry["type"]
    if kind in _NAMED_TYPES:
        return _NAMED_TYPES[kind]
    message: str = entry["msg"]
    for start in ("Input should be ", "Value error, ", "String should ", "Tuple should "):
        message = message.removeprefix(start)
    return message


def _shown(value: object) -> str:
    kind = {str: "string", bool: "true/false", int: "integer", float: "number", dict: "table", list: "array"}
    text = _written(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind.get(type(value), type(value).__name__)})"


def _written(value: object) -> str:
    """As a recipe would have it."""
    match value:
        case Mapping():
            return "{ " + ", ".join(f"{key} = {_written(item)}" for key, item in value.items()) + " }"
        case list() | tuple():
            return "[" + ", ".join(map(_written, value)) + "]"
        case bool():
            return str(value).lower()
    return repr(value)


def _fields_at(model: type[BaseModel], location: Location) -> list[str]:
    """Field names of the model nested at a location; [] where there is none."""
    for part in location:
        if isinstance(part, int):  # a place in an array whose items are the model already
            continue
        field = model.model_fields.get(str(part))
        annotation: Any = field.annotation if field else None
        items = get_args(annotation)
        annotation = items[0] if get_origin(annotation) is tuple and items else annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
