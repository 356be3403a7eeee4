"""Which engine, and which image? Decided once, and said why."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from radeon_stack.catalog.load import Effective
from radeon_stack.catalog.platforms import CPU, load_platforms
from radeon_stack.errors import ImageError, MachineError, StackError, UsageError
from radeon_stack.host.engines import EngineProbe, probe_engine, require_engine
from radeon_stack.host.selection import Selection
from radeon_stack.images.resolve import Image, find_image, named_image

USUAL_KIND = "train"  # of `make image`
# What the workloads import; looked for, never imported, on the host side.
WORK_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


@dataclass(frozen=True)
class Choice:
    """An engine's name, the image if it takes one, and the reason."""

    engine: str
    image: Image | None
    why: str
    probe: EngineProbe | None = None


def choose(effective: Effective, selection: Selection, engine: str, reference: str | None) -> Choice:
    """The engine and image for a recipe. MachineError or ImageError says what is missing and how to get it."""
    if engine == "local":
        if reference is not None:
            raise UsageError("the local engine takes no image", where="--image", remedy="leave it or the engine out")
        return _local(effective, "local: asked for")
    if engine == "docker":
        probe = require_engine("--engine docker", "run without it: --engine local")
        image = _image(effective, selection, reference)
        return Choice("docker", image, image.why, probe)
    probe = probe_engine()
    if not probe.answers:
        if reference is not None:
            raise MachineError(f"an image needs an engine, and {probe.why_not}", where="--image", remedy="leave it out")
        return _local(effective, f"local: {probe.why_not}")
    try:
        image = _image(effective, selection, reference)
    except ImageError as error:
        if reference:
            raise
        return _local(effective, f"local: {error.what}")
    return Choice("docker", image, image.why, probe)


def platform_of(effective: Effective, selection: Selection) -> str:
    """The image platform a recipe runs on here: its own, else that of the chosen GPUs, else `cpu`."""
    if effective.recipe.platform:
        return effective.recipe.platform
    return selection.gpus[0].gfx if selection.gpus else "cpu"


def _image(effective: Effective, selection: Selection, reference: str | None) -> Image:
    kind, platform = effective.image_kind, platform_of(effective, selection)
    found = named_image(reference) if reference else find_image(kind, platform)
    if found is None:
        wanted = f"image {reference}" if reference else f"image labelled {kind} for {platform}"
        how = f"make image {_release(platform)}ARCH={platform}" + f" KIND={kind}" * (kind != USUAL_KIND)
        raise ImageError(f"the engine has no {wanted}", remedy=f"build it: {how}, or run without: --engine local")
    return found


def _release(arch: str) -> str:
    return "" if arch == CPU else f"ROCM={load_platforms().release_for(arch)} "


def _local(effective: Effective, why: str) -> Choice:
    layer = getattr(effective.config, "layer", "")
    packages = (*WORK_PACKAGES, layer) if layer else WORK_PACKAGES
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        how = "install them (make setup; pip install 'radeon-stack[work]') or build an image: make image ARCH=cpu"
        if layer:  # it wants older packages than `work` has
            how = (
                f"build its image: make image ARCH=cpu KIND={effective.image_kind}; or install it into an environment "
                f"of its own: pip install 'radeon-stack[{layer}]'"
            )
        more: StackError = MachineError(f"{why}; and this Python lacks {', '.join(missing)}", remedy=how)
        raise more
    return Choice("local", None, why)
