"""Byte sizes as people write them: `16GiB`, `512 MiB`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator

_UNITS = {"b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE = re.compile(r"^\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([a-zA-Z]+)\s*$")


def parse_size(value: object) -> int:
    """Bytes of `16GiB` and the like. ValueError says what is allowed."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.match(value) if isinstance(value, str) else None
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError("a size with its unit, such as '16GiB' or '512MiB'")
    return int(float(match[1]) * unit)


def format_size(size: int) -> str:
    """`17179869184` as `16GiB`; the largest unit that keeps it exact to a tenth."""
    for unit, label in (("tib", "TiB"), ("gib", "GiB"), ("mib", "MiB"), ("kib", "KiB")):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.1f}".removesuffix(".0") + label
    return f"{size}B"


Size = Annotated[int, BeforeValidator(parse_size)]
