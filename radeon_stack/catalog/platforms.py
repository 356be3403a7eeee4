"""The platforms that images are built for: `docker/platforms.toml`, typed."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from radeon_stack.catalog.folders import data_folder
from radeon_stack.catalog.problems import explain, nearest
from radeon_stack.errors import UsageError


class Platform(BaseModel):
    """One (ROCm release, gfx) pair, or the CPU."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    base: str = Field(min_length=1, description="the image to start from")
    digest: str | None = Field(None, pattern=r"^sha256:[0-9a-f]{64}$", description="None until it was resolved")
    python: str = Field(pattern=r"^3\.\d+$")
    torch: str = Field(min_length=1)
    lock: str = Field(pattern=r"^[a-z0-9.-]+$")
    source: str = Field(min_length=1, description="where these facts are from")


def platforms(folder: Path | None = None) -> dict[str, Platform]:
    """All platforms by name. UsageError names file and key of a bad entry."""
    path = (folder or data_folder("docker")) / "platforms.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the platforms: {error}", where=str(path)) from error
    found = {}
    for name, table in tables.items():
        try:
            found[name] = Platform.model_validate(table)
        except ValidationError as error:
            raise explain(error, Platform, table, {}, file=str(path), prefix=f"{name}.") from None
    return found


def platform_name(arch: str, rocm: str | None, known: dict[str, Platform]) -> str:
    """The platform of an architecture and ROCm release. UsageError lists the pairs there are."""
    wanted = arch if arch == "cpu" else f"rocm{rocm or '?'}-{arch}"
    if wanted not in known:
        raise UsageError(f"no platform '{wanted}'; {nearest(wanted, list(known))}", where="ARCH, ROCM")
    return wanted
