"""Wheels that were built once, by key: `wheels/<name>-<key>/` below the home folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radeon_stack import atomic
from radeon_stack.checksums import sum_of
from radeon_stack.errors import CheckError

RECORD = "wheel.json"


@dataclass(frozen=True)
class StoredWheels:
    """The files of one key, and what was written down about them."""

    folder: Path
    record: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.whl"))

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.stat().st_size for file in self.files)


class WheelStore:
    """A folder of wheels by content key. What is under its final name is whole."""

    def __init__(self, home: Path) -> None:
        self.root = home / "wheels"

    def folder(self, name: str, key: str) -> Path:
        return self.root / f"{name}-{key}"

    def get(self, name: str, key: str) -> StoredWheels | None:
        """The wheels of a key, or None. CheckError when a file is not what was stored."""
        folder = self.folder(name, key)
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        for file, digest in record["files"].items():
            path = folder / file
            if not path.is_file() or sum_of(path) != digest:
                raise CheckError(
                    "a stored wheel is not what was stored", where=str(path), remedy=f"remove {folder} and build again"
                )
        return StoredWheels(folder, record)

    def put(self, name: str, key: str, built: Path, about: dict[str, Any]) -> StoredWheels:
        """Keep the wheels of a folder under a key, with their digests."""
        self.root.mkdir(parents=True, exist_ok=True)
        record = {**about, "name": name, "key": key, "files": {f.name: sum_of(f) for f in sorted(built.glob("*.whl"))}}
        with atomic.whole_directory(self.folder(name, key)) as partial:
            for file in built.glob("*.whl"):
                shutil.copyfile(file, partial / file.name)
            (partial / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return StoredWheels(self.folder(name, key), record)
