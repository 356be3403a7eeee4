"""Which local image fits? Decided by labels, never by the look of a tag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from radeon_stack.errors import ImageError, UsageError
from radeon_stack.host.engines import PROBE_SECONDS, client
from radeon_stack.host.facts import ImageFact
from radeon_stack.images.labels import DRIVERS, GFX, KIND, PLATFORM, ROCM, TORCH
from radeon_stack.images.references import is_reference
from radeon_stack.text import one_line


@dataclass(frozen=True)
class Image:
    """An image that fits, why it was taken, and what its labels say is inside ("": nothing)."""

    id: str
    name: str
    why: str
    gfx: str = ""
    rocm: str = ""
    torch: str = ""


def find_image(kind: str, platform: str) -> Image | None:
    """The newest image of this kind for this platform (`cpu`, or a gfx name such as `gfx1201`)."""
    images = client().images.list(filters={"label": [f"{KIND}={kind}"]})
    fitting = [image for image in images if _fits(image.labels.get(PLATFORM, ""), platform)]
    if not fitting:
        return None
    newest = max(fitting, key=lambda image: str(image.attrs["Created"]))
    name = newest.tags[0] if newest.tags else newest.short_id
    return _image(newest, name, f"docker: the engine answers, and {name} is labelled {kind} for {platform}")


def image_facts() -> tuple[ImageFact, ...]:
    """All images of ours in the engine, as doctor judges them."""
    found = client(timeout=PROBE_SECONDS).images.list(filters={"label": [KIND]})
    return tuple(
        ImageFact(
            image.tags[0] if image.tags else image.short_id,
            image.labels.get(KIND, ""),
            image.labels.get(ROCM, ""),
            image.labels.get(GFX, ""),
            tuple(filter(None, image.labels.get(DRIVERS, "").split(","))),
        )
        for image in found
    )


def named_image(reference: str) -> Image | None:
    """The image a person named, or None when the engine has no such image."""
    image = _get(reference)
    return None if image is None else _image(image, reference, f"docker: {reference} was asked for")


def _image(found: Any, name: str, why: str) -> Image:
    labels = found.labels
    return Image(str(found.id), name, why, labels.get(GFX, ""), labels.get(ROCM, ""), labels.get(TORCH, ""))


def _fits(label: str, platform: str) -> bool:
    return label == platform or label.endswith(f"-{platform}")


def local_image(reference: str) -> Any:
    """The engine's image of a name, id or digest, as the SDK gives it. ImageError when it has none."""
    image = _get(reference)
    if image is None:
        raise ImageError(f"the engine has no image {reference}", remedy="radeon-stack image list")
    return image


def _get(reference: str) -> Any:
    from docker.errors import ImageNotFound

    if not is_reference(reference):  # an engine answers that with its own "400 Client Error"
        raise UsageError(f"'{one_line(reference)}' is no name of an image", remedy="see: radeon-stack image list")
    try:
        return client().images.get(reference)
    except ImageNotFound:
        return None
