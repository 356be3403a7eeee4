"""What an image is built upon: is it here, can it be had, and what exactly is it?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from radeon_stack.catalog.platforms import Platform
from radeon_stack.errors import ImageError
from radeon_stack.host.engines import client

PULL_SECONDS = 60
DEFAULT_REGISTRY = "docker.io"


@dataclass(frozen=True)
class BaseImage:
    """A base as FROM names it, what it was found to be, and its environment where that is known."""

    reference: str
    identity: str
    where: str
    env: tuple[tuple[str, str], ...] = ()


def base_reference(platform: Platform, base: str | None, registry: str | None) -> str:
    """The base that is asked for: another one, the platform's from another registry, or the platform's."""
    if base:
        return base
    name = f"{platform.base}@{platform.digest}" if platform.digest else platform.base
    return f"{registry.rstrip('/')}/{name}" if registry else name


def find_base(platform: Platform, base: str | None, registry: str | None) -> BaseImage:
    """The base in the engine, else in its registry. ImageError says what was tried and what else can be done."""
    reference = base_reference(platform, base, registry)
    found = _local(reference)
    if found is not None:
        return found
    try:
        described = client(timeout=PULL_SECONDS).images.get_registry_data(reference)
    except Exception as error:  # the engine, its registry and the network have their own families
        raise _unreachable(platform, reference, error) from error
    name = reference.partition("@")[0]
    return BaseImage(f"{name}@{described.id}", str(described.id), "in its registry")


def _local(reference: str) -> BaseImage | None:
    from docker.errors import ImageNotFound

    try:
        image = client().images.get(reference)
    except ImageNotFound:
        return None
    digests = [digest.partition("@")[2] for digest in image.attrs.get("RepoDigests") or ()]
    pairs = (pair.partition("=") for pair in image.attrs["Config"].get("Env") or ())
    # By digest where it has one: another machine then gets the same key.
    return BaseImage(
        reference, digests[0] if digests else str(image.id), "in the engine", tuple((k, v) for k, _, v in pairs)
    )


def _unreachable(platform: Platform, reference: str, error: Any) -> ImageError:
    reason = " ".join(str(getattr(error, "explanation", None) or error).split())[:300]
    if platform.rocm is None:
        return ImageError(
            f"the stand-in base {reference} was not made here",
            where=f"{platform.name}: base",
            remedy="make it: make image ARCH=cpu, or python tools/stand_in_base.py; or name another: --base IMAGE",
        )
    return ImageError(
        f"the base {reference} is not in this engine, and its registry cannot be reached from it "
        f"(tried: the engine's images, then {_host(reference)}: {reason})",
        where=f"{platform.name}: base",
        remedy=(
            f"load it (docker load) or mirror it and build with --base-registry HOST, name another with --base IMAGE, "
            f"or take a built image: radeon-stack pull --arch {platform.gfx}"
        ),
    )


def _host(reference: str) -> str:
    first = reference.partition("/")[0]
    return first if "/" in reference and ("." in first or ":" in first) else DEFAULT_REGISTRY
