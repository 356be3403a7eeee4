"""The kinds of image there are: `docker/kinds.toml`, typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from radeon_stack.catalog.folders import data_folder
from radeon_stack.catalog.problems import nearest
from radeon_stack.catalog.tables import Table, read_table, typed
from radeon_stack.errors import UsageError

Strings = Annotated[tuple[str, ...], Field(strict=False)]


class Addition(Table):
    """What a backend adds to a kind."""

    requirements: Strings = ()
    imports: Strings = ()
    without: Strings = ()


class Wheels(Table):
    """Folders of wheels/ by backend."""

    cpu: Strings = ()
    rocm: Strings = ()


class Kind(Table):
    """One kind of image."""

    summary: str = Field(min_length=1)
    extra: str = Field(min_length=1, description="an extra of pyproject.toml")
    imports: Strings = Field(min_length=1)
    apart: Strings = Field((), description="imported in a process of their own: they change what is imported already")
    wheels: Wheels = Wheels()
    cpu: Addition = Addition()
    rocm: Addition = Addition()
    kernels: bool = Field(False, description="an image for a GPU has radeon-stack's kernels compiled for it")

    def addition(self, backend: str) -> Addition:
        return self.cpu if backend == "cpu" else self.rocm

    def wheel_names(self, backend: str) -> tuple[str, ...]:
        return self.wheels.cpu if backend == "cpu" else self.wheels.rocm


def load_kinds(folder: Path | None = None) -> dict[str, Kind]:
    """All kinds by name."""
    path = (folder or data_folder("docker")) / "kinds.toml"
    return {name: typed(Kind, table, path, f"{name}.") for name, table in read_table(path).items()}


def find_kind(name: str, folder: Path | None = None, *, where: str = "--kind") -> Kind:
    """A kind by its name. UsageError says which there are."""
    kinds = load_kinds(folder)
    if name not in kinds:
        raise UsageError(f"no kind of image '{name}'; {nearest(name, list(kinds))}", where=where)
    return kinds[name]
