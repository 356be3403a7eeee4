"""What was resolved once and written down: digests of bases, commits of sources, hashes of packages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from radeon_stack.catalog.folders import data_folder
from radeon_stack.catalog.tables import Table, read_table, typed
from radeon_stack.errors import UsageError

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class Sources(Table):
    """locks/sources.toml: base reference → digest, `repository ref` → commit."""

    digests: dict[str, Digest] = Field({})
    commits: dict[str, Commit] = Field({})


def locks_folder(folder: Path | None = None) -> Path:
    return (folder or data_folder("docker")) / "locks"


def load_sources(folder: Path | None = None) -> Sources:
    """What `image lock` has resolved; nothing where it never ran."""
    path = locks_folder(folder) / "sources.toml"
    return typed(Sources, read_table(path), path) if path.is_file() else Sources()


def lock_text(name: str, folder: Path | None = None) -> str:
    """A hash-locked requirements file. UsageError when it was never made."""
    path = locks_folder(folder) / f"{name}.txt"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            "there is no such lock", where=str(path), remedy=f"make it: radeon-stack image lock {name}"
        ) from error
