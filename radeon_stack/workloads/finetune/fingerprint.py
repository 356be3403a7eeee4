"""Which base an adapter was trained on: written down beside it, and asked for before it is merged.

PEFT's own note of the base is a path, which another folder may have tomorrow.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from radeon_stack import atomic
from radeon_stack.errors import CheckError, UsageError
from radeon_stack.safetensor_files import json_object, places, read
from radeon_stack.text import one_line

RECORD = "radeon-stack.json"
MAX_RECORD_BYTES = 1 << 20
SAMPLE = 4096  # bytes of each tensor


@dataclass(frozen=True)
class Origin:
    """The base of an adapter: what its weights are, None where they are in no safetensors, and as what it was given."""

    fingerprint: str | None
    model: str


def fingerprint(base: Path) -> str | None:
    """Of a folder's weights: each tensor's name, dtype, shape and first bytes, however they are spread over files.

    Training moves nearly every weight, so another training of the same model has another one, and a model of any
    size takes a second; that a file is whole it does not say (`checksums` does). None for a folder without any.
    """
    found = sorted(places(base).items())
    digest = hashlib.sha256()
    for name, place in found:
        digest.update(json.dumps([name, place.dtype, place.shape]).encode())
        digest.update(read(place, most=SAMPLE))
    return digest.hexdigest() if found else None


def write_record(adapter: Path, origin: Origin) -> None:
    """Write down beside an adapter which base it was trained on."""
    atomic.write_text(adapter / RECORD, json.dumps({"base": asdict(origin)}, indent=2) + "\n")


def require_base(adapter: Path, base: Path) -> bool:
    """Whether the adapter says that this is its base; False when it does not say, as PEFT's own from elsewhere.

    CheckError when it says another one.
    """
    file = adapter / RECORD
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        text = stream.read(MAX_RECORD_BYTES + 1)
    match json_object(text[:MAX_RECORD_BYTES], file):
        case {"base": {"fingerprint": None, "model": str()}}:
            return False
        case {"base": {"fingerprint": str(wanted), "model": str(name)}}:
            if fingerprint(base) != wanted:
                raise CheckError(
                    f"{base.name} is not the base that this adapter was trained on, which was {one_line(name)}",
                    where=str(adapter),
                    remedy="give that base: the same weights, in a folder of any name",
                )
            return True
    raise UsageError("does not say which base it is of", where=str(file), remedy="copy the adapter again")
