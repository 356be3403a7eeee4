"""Which engine, and which image? Decided once, and said why."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from radeon_stack.catalog.kinds import find_kind
from radeon_stack.catalog.load import Effective
from radeon_stack.catalog.platforms import CPU, load_platforms
from radeon_stack.errors import ImageError, MachineError, StackError, UsageError
from radeon_stack.host.engines import EngineProbe, probe_engine, require_engine
from radeon_stack.host.node_record import NodeRecord
from radeon_stack.host.runtimes import VENV, choose_runtime
from radeon_stack.host.selection import Selection
from radeon_stack.images.environments import Environment, environment_for, lacking
from radeon_stack.images.published import Wanted
from radeon_stack.images.resolve import Image, find_image, named_image
from radeon_stack.images.sites import SiteImage, site_image

USUAL_KIND = "train"  # of `make image`
# `make setup` is for these: what they lack here is installed, or comes in an image. Others get an environment.
REGISTRY_VARIABLE = "RADEON_STACK_REGISTRY"
TRAINING_KINDS = (USUAL_KIND, "train-unsloth")
# What the workloads import; looked for, never imported, on the host side.
WORK_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


@dataclass(frozen=True)
class Choice:
    """An engine's name, the image if it takes one, and the reason.

    Without an image, which Python: this one, unless there is an `environment`, which may not have been made yet.
    """

    engine: str
    image: Image | None
    why: str
    probe: EngineProbe | None = None
    environment: Environment | None = None
    python_why: str = "this Python has what it needs"
    site: SiteImage | None = None
    runtime: str = ""
    runtime_why: str = ""
    """Of a cluster: the image as its registry has it, and what runs it on a node."""

    @property
    def python(self) -> str:
        """Of a run without an image."""
        return str(self.environment.python) if self.environment else sys.executable


def choose(effective: Effective, selection: Selection, engine: str, reference: str | None, home: Path) -> Choice:
    """The engine and image for a recipe; environments are below `home`.

    MachineError or ImageError says what is missing and how to get it.
    """
    if engine == "local":
        if reference is not None:
            raise UsageError("the local engine takes no image", where="--image", remedy="leave it or the engine out")
        return _local(effective, selection, "local: asked for", home)
    if engine == "docker":
        probe = require_engine("--engine docker", "run without it: --engine local")
        image = _image(effective, selection, reference)
        return Choice("docker", image, image.why, probe)
    probe = probe_engine()
    if not probe.answers:
        if reference is not None:
            raise MachineError(f"an image needs an engine, and {probe.why_not}", where="--image", remedy="leave it out")
        return _local(effective, selection, f"local: {probe.why_not}", home)
    try:
        image = _image(effective, selection, reference)
    except ImageError as error:
        if reference:
            raise
        return _local(effective, selection, f"local: {error.what}", home)
    return Choice("docker", image, image.why, probe)


def choose_for_nodes(
    effective: Effective, selection: Selection, record: NodeRecord, asked: str | None, reference: str | None, home: Path
) -> Choice:
    """The container of a cluster's nodes: what they have, with an image of a registry; else the Python they share.

    ImageError where one that was asked for cannot be had.
    """
    runtime = choose_runtime(record, asked, where="--container")
    registries = tuple(os.environ.get(REGISTRY_VARIABLE, "").split())
    wanted = asked not in (None, VENV) or reference is not None
    if runtime.name == VENV or not (wanted or registries):
        if reference is not None:
            remedy = "leave it out, or name a container: --container apptainer"
            raise UsageError(f"an image needs a container: {runtime.why}", where="--image", remedy=remedy)
        why = runtime.why if runtime.name == VENV else f"no registry is named ({REGISTRY_VARIABLE}) to have images from"
        return replace(_local(effective, selection, why, home), runtime_why=f"no container: {why}")
    try:
        kind, gfx = effective.image_kind, platform_of(effective, selection)
        site = site_image(reference, registries, Wanted(kind, gfx))
    except ImageError as error:
        if wanted:
            remedy = f"name one: --image HOST/NAME:TAG, or take the Python that the nodes share: --container {VENV}"
            raise ImageError(error.what, where=error.where, remedy=remedy) from error
        return replace(_local(effective, selection, error.what, home), runtime_why=f"no container: {error.what}")
    return Choice("slurm", site.image, site.image.why, site=site, runtime=runtime.name, runtime_why=runtime.why)


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
        how = f"build it: {_making(kind, platform)}, or run without: --engine local"
        raise ImageError(f"the engine has no {wanted}", remedy=how)
    return found


def _making(kind: str, platform: str) -> str:
    return f"make image {_release(platform)}ARCH={platform}" + f" KIND={kind}" * (kind != USUAL_KIND)


def _release(arch: str) -> str:
    return "" if arch == CPU else f"ROCM={load_platforms().release_for(arch)} "


def _local(effective: Effective, selection: Selection, why: str, home: Path) -> Choice:
    if effective.image_kind not in TRAINING_KINDS:
        return _with_python(effective, selection, Choice("local", None, why), home)
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


def _with_python(effective: Effective, selection: Selection, choice: Choice, home: Path) -> Choice:
    """This Python if it has all that the kind promises, else an environment of the kind's own."""
    kind = effective.image_kind
    find_kind(kind, where=f"{effective.path}: image")
    environment = environment_for(kind, home)
    missing = ", ".join(lacking(environment.spec))
    if not missing:
        return replace(choice, python_why=f"this Python has all that {kind} promises")
    if effective.recipe.resources.gpus.min:
        raise MachineError(
            f"{choice.why}; and this Python lacks {missing}, which come without an image for the CPU alone",
            remedy=f"build an image: {_making(kind, platform_of(effective, selection))}",
        )
    why = f"this Python lacks {missing}: {kind} has an environment of its own, for the CPU"
    return replace(choice, environment=environment, python_why=why)
