"""The wheels that are staged: `docker/wheels/<name>/wheel.toml`, typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from radeon_stack.catalog.folders import data_folder
from radeon_stack.catalog.platforms import EnvName, EnvValue
from radeon_stack.catalog.problems import nearest
from radeon_stack.catalog.sizes import Size
from radeon_stack.catalog.tables import Table, read_table, typed
from radeon_stack.errors import UsageError

Strings = Annotated[tuple[str, ...], Field(strict=False)]


class Variant(Table):
    """One way to get a wheel: from the lock (neither `index` nor `git`), from a source package, or from a commit."""

    index: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9-]*$", description="its source package's name")
    git: str | None = Field(None, pattern=r"^(https|http|file|git)://[A-Za-z0-9._~/:@%-]+$")
    ref: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", description="tag, branch or commit")
    tools: Strings = Field((), description="requirements of its build")
    env: dict[EnvName, EnvValue] = Field({}, description="what its build needs")
    runtime_env: dict[EnvName, EnvValue] = Field({}, description="what the image's environment needs for it")
    modules: Strings = Field((), description="what must be found once it is installed")

    @model_validator(mode="after")
    def _one_source(self) -> Variant:
        if self.index and self.git:
            raise ValueError("index or git, not both")
        if bool(self.git) != bool(self.ref):
            raise ValueError("git together with ref")
        return self

    @property
    def built(self) -> bool:
        return bool(self.index or self.git)


class Defaults(Table):
    """The variant by family; None where the wheel is not for it."""

    cpu: str | None = None
    rdna: str | None = None
    cdna: str | None = None

    def of(self, family: str) -> str | None:
        return {"cpu": self.cpu, "rdna": self.rdna, "cdna": self.cdna}[family]


class Wheel(Table):
    """A wheel and its variants."""

    version: str = Field(pattern=r"^\d+(\.\w+)+$")
    job_memory: Size = Field(description="what one compiler job needs")
    default: Defaults
    requires: Strings = Field((), description="its run-time requirements, for the kind's lock")
    source: str = Field(min_length=1)
    variants: dict[str, Variant] = Field(min_length=1)

    @model_validator(mode="after")
    def _defaults_exist(self) -> Wheel:
        for family in ("cpu", "rdna", "cdna"):
            name = self.default.of(family)
            if name is not None and name not in self.variants:
                raise ValueError(f"default.{family} to be one of {', '.join(self.variants)}")
        return self


def wheels_folder(folder: Path | None = None) -> Path:
    return (folder or data_folder("docker")) / "wheels"


def load_wheels(folder: Path | None = None) -> dict[str, Wheel]:
    """All wheels by name, sorted. UsageError names file and key of a bad entry."""
    found = {}
    for path in sorted(wheels_folder(folder).glob("*/wheel.toml")):
        found[path.parent.name] = typed(Wheel, read_table(path), path)
    return found


def find_variant(wheels: dict[str, Wheel], name: str, variant: str) -> Variant:
    """A wheel's variant by name. UsageError says which there are."""
    if name not in wheels:
        raise UsageError(f"no wheel '{name}'; {nearest(name, list(wheels))}", where="--wheel")
    known = wheels[name].variants
    if variant not in known:
        raise UsageError(f"{name} has no variant '{variant}'; {nearest(variant, list(known))}", where="--wheel")
    return known[variant]
