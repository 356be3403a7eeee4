"""The content key: a hash of everything that can change a thing, so a hit builds nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

KEY_DIGITS = 16  # 64 bits of SHA-256: enough to tell builds apart, short enough for a tag


def key_of(inputs: Mapping[str, object]) -> str:
    """The key of named inputs, in whatever order they stand; values are JSON's."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
