"""The image for a cluster: by digest, with its labels from the registry, where no engine is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from radeon_stack.errors import ImageError
from radeon_stack.images.labels import GFX, ROCM, TORCH
from radeon_stack.images.published import STABLE, Candidate, Wanted, candidate, first_fitting
from radeon_stack.images.references import split
from radeon_stack.images.registry import Registry
from radeon_stack.images.resolve import Image


@dataclass(frozen=True)
class SiteImage:
    """An image of a registry. `download` is bytes of its layers, compressed; `plain` that the registry has no TLS."""

    image: Image
    download: int
    plain: bool = False

    @property
    def reference(self) -> str:
        """`host/name@sha256:…`: what it is, whatever a tag comes to mean."""
        return self.image.id


def site_image(
    reference: str | None,
    registries: tuple[str, ...],
    wanted: Wanted,
    channel: str = STABLE,
    told: Callable[[str], None] = lambda line: None,
) -> SiteImage:
    """The image of that name (`host/name:tag` or `@sha256:…`), else the published one that fits, as `pull` takes it.

    UsageError when neither a name nor a registry is given, ImageError when it cannot be had.
    """
    if reference is None:
        registry, choice = first_fitting(registries, wanted, channel, told)
        return _site_image(registry, choice.candidate, f"{registry.repository}:{choice.candidate.tag}", choice.why)
    where, name = split(reference)
    registry = Registry(where)
    found = candidate(registry, name)
    if found is None:
        raise ImageError(
            "the registry has no such image",
            where=f"--image {reference}",
            remedy="see what it has: radeon-stack pull --dry-run, or push it: radeon-stack image push",
        )
    return _site_image(registry, found, reference, f"{reference} was asked for")


def _site_image(registry: Registry, found: Candidate, name: str, why: str) -> SiteImage:
    labels = found.labels
    image = Image(
        f"{registry.repository}@{found.manifest.digest}",
        name,
        why,
        labels.get(GFX, ""),
        labels.get(ROCM, ""),
        labels.get(TORCH, ""),
    )
    return SiteImage(image, found.manifest.download, registry.plain)
