"""What the base brought, written down before anything is installed: `base.py FOLDER`.

It runs in the build as a file of its own, before the rest of this package is there: only the standard library.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

GUARDED = ("torch", "torchvision", "torchaudio", "triton", "pytorch-triton-rocm", "pytorch-triton", "vllm")


@dataclass(frozen=True)
class Guarded:
    """A distribution that must stay the base's own: its version, and a hash of its list of files."""

    name: str
    version: str
    record: str


def normal(name: str) -> str:
    """A distribution's name as indexes compare it (PEP 503)."""
    return name.lower().replace("_", "-").replace(".", "-")


def guarded(found: list[Distribution] | None = None) -> list[Guarded]:
    """The base's torch, triton, their kin and what is compiled against them, as far as installed here, sorted."""
    return sorted(_guarded(list(distributions()) if found is None else found), key=lambda one: one.name)


def facts() -> dict[str, Any]:
    """What `base.json` holds."""
    installed = {normal(str(dist.metadata["Name"])): dist.version for dist in distributions()}
    return {
        "python": platform.python_version(),
        "guarded": [asdict(one) for one in guarded()],
        "installed": dict(sorted(installed.items())),
    }


def constraints(found: list[Guarded]) -> str:
    """Constraints that refuse every other version of what the base brought."""
    return "".join(f"{one.name}=={one.version}\n" for one in found)


def _guarded(found: list[Distribution]) -> Iterator[Guarded]:
    for dist in found:
        name = normal(str(dist.metadata["Name"]))
        if name in GUARDED:
            record = dist.read_text("RECORD") or ""
            yield Guarded(name, dist.version, hashlib.sha256(record.encode()).hexdigest())


if __name__ == "__main__":
    to = Path(sys.argv[1])
    (to / "base.json").write_text(json.dumps(facts(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (to / "constraints.txt").write_text(constraints(guarded()), encoding="utf-8")
