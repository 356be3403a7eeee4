"""What one image is made of: kind, platform, wheels, base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from radeon_stack.catalog.folders import data_folder
from radeon_stack.catalog.kinds import Kind, find_kind
from radeon_stack.catalog.locks import load_sources, lock_text
from radeon_stack.catalog.platforms import Platform
from radeon_stack.catalog.problems import nearest
from radeon_stack.catalog.wheels import Variant, Wheel, find_variant, load_wheels
from radeon_stack.errors import UsageError

JOB_MEMORY = "JOB_MEMORY_MIB"


@dataclass(frozen=True)
class WheelSpec:
    """A wheel that is built in a stage of its own: for this gfx, in this variant."""

    name: str
    variant: str
    wheel: Wheel
    settings: Variant
    env: tuple[tuple[str, str], ...]
    files: Mapping[str, str] = field(hash=False)
    """build.sh, tools.txt, source.txt and patches, by their names in the stage's /build."""


@dataclass(frozen=True)
class ImageSpec:
    """An image of a kind for a platform. `base` is what FROM names; `identity` what that was found to be."""

    kind_name: str
    kind: Kind
    platform: Platform
    wheels: tuple[WheelSpec, ...]
    """Built in stages; sorted by name."""
    variants: tuple[tuple[str, str], ...]
    """Of all wheels of the kind, those from the lock too."""
    runtime_env: tuple[tuple[str, str], ...]
    modules: tuple[str, ...]
    base: str
    identity: str
    trim: bool = False
    base_env: tuple[tuple[str, str], ...] = ()
    docker: Path = field(default_factory=lambda: data_folder("docker"))

    @property
    def name(self) -> str:
        """`train-rocm7.1.1-gfx1201`: tags and folders begin with it."""
        return f"{self.kind_name}-{self.platform.name}"

    @property
    def tag(self) -> str:
        return f"radeon-stack/{self.kind_name}:{self.platform.name}"

    @property
    def kernels(self) -> bool:
        """Whether it brings compiled kernels: what runs on a CPU alone needs none."""
        return self.kind.kernels and self.platform.gfx is not None

    @cached_property
    def requirements(self) -> str:
        """The hash-locked requirements, without what a stage builds."""
        text = lock_text(f"{self.kind_name}-{self.platform.locked_as}", self.docker)
        return _without(text, {wheel.name for wheel in self.wheels})


def image_spec(
    kind_name: str,
    platform: Platform,
    *,
    choices: Mapping[str, str] | None = None,
    base: str | None = None,
    identity: str | None = None,
    trim: bool = False,
    base_env: tuple[tuple[str, str], ...] = (),
    docker: Path | None = None,
) -> ImageSpec:
    """The spec of an image; `choices` are variants by wheel. UsageError names what does not exist.

    Another `base` is taken for one such as the release's own: what a kind's own base brings, it has not.
    """
    docker = docker or data_folder("docker")
    kind, platform = find_kind(kind_name, docker), platform if base else platform.of_kind(kind_name)
    variants = _variants(kind, platform, choices or {}, docker)
    wheels = load_wheels(docker)
    settings = {name: find_variant(wheels, name, variant) for name, variant in variants.items()}
    built = tuple(
        wheel_spec(name, wheels[name], variant, platform, docker)
        for name, variant in variants.items()
        if settings[name].built
    )
    locked = f"{platform.base}@{platform.digest}" if platform.digest else platform.base
    named = base or locked
    return ImageSpec(
        kind_name=kind_name,
        kind=kind,
        platform=platform,
        wheels=built,
        variants=tuple(variants.items()),
        runtime_env=tuple(sorted({k: v for s in settings.values() for k, v in s.runtime_env.items()}.items())),
        modules=tuple(sorted({module for s in settings.values() for module in s.modules})),
        base=named,
        identity=identity or named,
        trim=trim,
        base_env=base_env,
        docker=docker,
    )


def wheel_spec(name: str, wheel: Wheel, variant: str, platform: Platform, docker: Path) -> WheelSpec:
    """The stage of one wheel. UsageError when its commit or its tools were never locked."""
    settings = wheel.variants[variant]
    env = {**settings.env, JOB_MEMORY: str(wheel.job_memory >> 20)}
    if platform.gfx:
        env |= {"GFX": platform.gfx, "ROCM": str(platform.rocm), "ROCM_SHORT": platform.rocm_short}
    if settings.git:
        env |= {"GIT": settings.git, "COMMIT": _commit(name, variant, settings, docker)}
    folder = docker / "wheels" / name
    files = {"build.sh": (folder / "build.sh").read_text(encoding="utf-8")}
    files["tools.txt"] = lock_text(f"wheel-{name}-{variant}.tools", docker)
    if settings.index:
        files["source.txt"] = lock_text(f"wheel-{name}-{variant}.source", docker)
    for patch in sorted(folder.glob("patches/*.patch")):
        files[f"patches/{patch.name}"] = patch.read_text(encoding="utf-8")
    return WheelSpec(name, variant, wheel, settings, tuple(sorted(env.items())), files)


def _without(lock: str, names: set[str]) -> str:
    """The lock without some packages: each is a line that begins with its name, and the indented lines after it."""
    kept, skipping = [], False
    for line in lock.splitlines(keepends=True):
        if not line.startswith((" ", "\t")):
            skipping = line.partition("==")[0] in names
        if not skipping:
            kept.append(line)
    return "".join(kept)


def _variants(kind: Kind, platform: Platform, choices: Mapping[str, str], docker: Path) -> dict[str, str]:
    wheels = load_wheels(docker)
    names = kind.wheel_names(platform.backend)
    foreign = [name for name in choices if name not in names]
    if foreign:
        raise UsageError(
            f"this image has no wheel '{foreign[0]}'; {nearest(foreign[0], names)}", where=f"--wheel {foreign[0]}"
        )
    found = {}
    for name in sorted(names):
        default = wheels[name].default.of(platform.family) if name in wheels else None
        variant = choices.get(name) or default
        if variant is not None:
            find_variant(wheels, name, variant)
            found[name] = variant
    return found


def _commit(name: str, variant: str, settings: Variant, docker: Path) -> str:
    ref = f"{settings.git} {settings.ref}"
    commit = load_sources(docker).commits.get(ref)
    if commit is None:
        raise UsageError(
            f"the commit of {ref} was never resolved",
            where=f"{docker / 'locks' / 'sources.toml'}: commits",
            remedy="resolve it: radeon-stack image lock sources",
        )
    return commit
