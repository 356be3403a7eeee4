"""What each step came to, kept as it ends: a run that is taken up again does only what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radeon_stack import atomic
from radeon_stack.checksums import sum_of
from radeon_stack.errors import CheckError


@dataclass(frozen=True)
class Kept:
    """The records of a run's steps, a file each."""

    folder: Path

    def get(self, step: str, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the step came to with the same inputs, or None. CheckError where its file is not what it made."""
        try:
            record = json.loads(self._file(step).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("inputs") != json.loads(json.dumps(inputs)):
            return None
        value: dict[str, Any] = record["value"]
        if "file" in value:
            file = self.folder.parent / value["file"]
            if not file.is_file():
                return None  # it is made again
            require_same(file, value)
        return value

    def put(self, step: str, inputs: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(self._file(step), json.dumps({"inputs": inputs, "value": value}, indent=2) + "\n")

    def _file(self, step: str) -> Path:
        return self.folder / (re.sub(r"[^a-z0-9.]+", "-", step) + ".json")


def made(file: Path, root: Path) -> dict[str, Any]:
    """What is kept of a file that a step made: its place below root, bytes and sha256."""
    return {"file": str(file.relative_to(root)), "bytes": file.stat().st_size, "sha256": sum_of(file)}


def require_same(file: Path, value: Mapping[str, Any]) -> None:
    """CheckError unless a file is what was made."""
    remedy = "remove it and continue, it is made again: radeon-stack run --resume RUN"
    size = file.stat().st_size
    if size != value["bytes"]:
        raise CheckError(f"has {size:,} bytes, and {value['bytes']:,} were written", where=str(file), remedy=remedy)
    if sum_of(file) != value["sha256"]:
        raise CheckError("has changed since it was written (sha256)", where=str(file), remedy=remedy)
