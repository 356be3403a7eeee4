"""The platforms that images are built for: `docker/platforms.toml`, typed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from radeon_stack.catalog.folders import data_folder
from radeon_stack.catalog.locks import Sources, load_sources
from radeon_stack.catalog.problems import nearest
from radeon_stack.catalog.tables import Table, read_table, typed
from radeon_stack.errors import UsageError

CPU = "cpu"
VENV = "/opt/venv"  # where images have their Python: the contract of rocm/pytorch
Gfx = Annotated[str, Field(pattern=r"^gfx[0-9a-f]{3,5}$")]
Names = Annotated[tuple[Gfx, ...], Field(strict=False)]
Version = Annotated[str, Field(pattern=r"^\d+(\.\d+)+$")]
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
# A value goes into a Dockerfile and a label: no quote, no line, no variable.
EnvValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:=/+-]*$")]
Reference = Annotated[str, Field(pattern=r"^[a-z0-9][A-Za-z0-9._/:-]*(@sha256:[0-9a-f]{64})?$")]


class Base(Table):
    """What an image starts from, and what its /opt/venv holds."""

    base: Reference
    python: str = Field(pattern=r"^3\.\d+$")
    torch: Version
    triton: Version | None = Field(None, description="None: no image of it was looked into")
    source: str = Field(min_length=1, description="where these facts are from")


class KindBase(Base):
    """Another base, that a kind of image starts from for some gfx of a release."""

    gfx: Names = Field(min_length=1)
    home: str = Field(VENV, pattern=r"^(/[A-Za-z0-9._-]+)+$", description="where its Python is")
    brings: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Version] = Field(
        min_length=1,
        description="packages it was chosen for: they stay, all else agrees with them, and they must import",
    )


class Release(Base):
    """A ROCm release and the gfx names it has code for."""

    name: Version
    gfx: Names = Field(description="in AMD's support matrix, or in that of its build system")
    unofficial: Names = Field((), description="built, and in no matrix")
    drivers: Annotated[tuple[Version, ...], Field(strict=False)] = Field(
        (), description="amdgpu driver versions it was released for, by their beginning; empty: not known"
    )
    kinds: dict[str, KindBase] = Field({}, description="by kind of image")

    @model_validator(mode="after")
    def _kinds_have_code(self) -> Release:
        for name, base in self.kinds.items():
            if foreign := set(base.gfx) - {*self.gfx, *self.unofficial}:
                raise ValueError(f"kinds.{name}.gfx to be of the release's own, unlike {', '.join(sorted(foreign))}")
        return self


class PlatformFile(Table):
    """The file as a whole; releases in their order."""

    default: Version
    default_for: dict[Gfx, Version] = Field({}, description="where a gfx needs another one")
    cpu: Base
    release: Annotated[tuple[Release, ...], Field(strict=False)]


@dataclass(frozen=True)
class Platform:
    """One (ROCm release, gfx) pair, or the CPU: `rocm` and `gfx` are None there."""

    name: str
    base: str
    digest: str | None
    python: str
    torch: str
    triton: str | None
    rocm: str | None = None
    gfx: str | None = None
    official: bool = True
    drivers: tuple[str, ...] = ()
    source: str = ""
    home: str = VENV
    brings: Mapping[str, str] = field(default_factory=dict, hash=False)
    kinds: Mapping[str, Platform] = field(default_factory=dict, hash=False, repr=False)
    """What it is for kinds of image that start from another base."""

    def of_kind(self, kind: str) -> Platform:
        """The platform as a kind of image has it."""
        return self.kinds.get(kind, self)

    @property
    def family(self) -> str:
        """`cpu`, `rdna` (gfx10 and up) or `cdna` (gfx9)."""
        if self.gfx is None:
            return CPU
        return "cdna" if self.gfx.startswith("gfx9") else "rdna"

    @property
    def backend(self) -> str:
        """`cpu` or `rocm`."""
        return CPU if self.gfx is None else "rocm"

    @property
    def locked_as(self) -> str:
        """What its locks are named by: `cpu`, `rocm7.1.1`; `vllm-rocm7.14` upon a base that brings that."""
        return "-".join((*self.brings, CPU if self.rocm is None else f"rocm{self.rocm}"))

    @property
    def rocm_short(self) -> str:
        """`71` of 7.1.1, `714` of 7.14: as bitsandbytes names its libraries."""
        return "".join((self.rocm or "").split(".")[:2])

    @property
    def allocator(self) -> str:
        """The variable that sets PyTorch's allocator: renamed with torch 2.10 (c10/core/AllocatorConfig.h)."""
        if self.rocm is None:
            return ""
        major, minor = (int(part) for part in self.torch.split(".")[:2])
        return "PYTORCH_ALLOC_CONF" if (major, minor) >= (2, 10) else "PYTORCH_HIP_ALLOC_CONF"


@dataclass(frozen=True)
class Platforms(Mapping[str, Platform]):
    """All platforms by name, in the order of the file."""

    by_name: Mapping[str, Platform]
    default: str
    default_for: Mapping[str, str]

    def __getitem__(self, name: str) -> Platform:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def release_for(self, gfx: str) -> str:
        """The release that a gfx gets when none is asked for."""
        return self.default_for.get(gfx, self.default)

    def find(self, arch: str, rocm: str | None = None) -> Platform:
        """The platform of an arch and release (None: the default). UsageError lists the pairs there are."""
        if arch == CPU:
            if rocm:
                raise UsageError("cpu has no ROCm release", where="ROCM", remedy="leave it out: make image ARCH=cpu")
            return self[CPU]
        wanted = f"rocm{rocm or self.release_for(arch)}-{arch}"
        if wanted in self:
            return self[wanted]
        releases = list(dict.fromkeys(platform.rocm for platform in self.values() if platform.rocm))
        having = [platform.rocm for platform in self.values() if platform.gfx == arch]
        if rocm and rocm not in releases:
            raise UsageError(f"no ROCm release '{rocm}'; {nearest(rocm, releases)}", where="ROCM")
        if having:
            there = ", ".join(str(release) for release in having)
            raise UsageError(
                f"ROCm {rocm or self.release_for(arch)} has no code for {arch}",
                where="ROCM, ARCH",
                remedy=f"{arch}: {there}",
            )
        known = sorted({platform.gfx for platform in self.values() if platform.gfx} | {CPU})
        by_arch = {name: [str(p.rocm) for p in self.values() if p.gfx == name] for name in known if name != CPU}
        pairs = "; ".join(f"{name}: {', '.join(those)}" for name, those in by_arch.items())
        raise UsageError(f"no platform for '{arch}'", where="ARCH", remedy=f"there are cpu; {pairs}")


def load_platforms(folder: Path | None = None) -> Platforms:
    """The platforms of `docker/`. UsageError names file and key of a bad entry."""
    folder = folder or data_folder("docker")
    path = folder / "platforms.toml"
    file = typed(PlatformFile, read_table(path), path)
    names = [release.name for release in file.release]
    for key, wanted in [("default", file.default), *((f"default_for.{g}", r) for g, r in file.default_for.items())]:
        if wanted not in names:
            raise UsageError(f"no release '{wanted}'; {nearest(wanted, names)}", where=f"{path}: {key}")
    sources = load_sources(folder)
    found = [_cpu(file.cpu, sources)]
    found += [
        _pair(release, gfx, sources) for release in file.release for gfx in sorted((*release.gfx, *release.unofficial))
    ]
    return Platforms({platform.name: platform for platform in found}, file.default, file.default_for)


def _cpu(base: Base, sources: Sources) -> Platform:
    digest = sources.digests.get(base.base)
    return Platform(CPU, base.base, digest, base.python, base.torch, base.triton, source=base.source)


def _pair(release: Release, gfx: str, sources: Sources) -> Platform:
    platform = Platform(
        name=f"rocm{release.name}-{gfx}",
        base=release.base,
        digest=sources.digests.get(release.base),
        python=release.python,
        torch=release.torch,
        triton=release.triton,
        rocm=release.name,
        gfx=gfx,
        official=gfx in release.gfx,
        drivers=release.drivers,
        source=release.source,
    )
    kinds = {
        kind: replace(platform, digest=sources.digests.get(other.base), **other.model_dump(exclude={"gfx"}))
        for kind, other in release.kinds.items()
        if gfx in other.gfx
    }
    return replace(platform, kinds=kinds)
