"""From a spec to an image: what a key says is there is not built again, and nothing is tagged before it is whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from radeon_stack import atomic
from radeon_stack.catalog.sizes import format_size
from radeon_stack.errors import BuildError, ImageError
from radeon_stack.host.clients import building_client
from radeon_stack.host.engines import client
from radeon_stack.images.builder import BuildSettings, Output, bake_command, build, build_command
from radeon_stack.images.labels import KEY
from radeon_stack.images.progress import Step, Steps
from radeon_stack.images.registry import Registry
from radeon_stack.images.render import (
    REQUIREMENTS,
    bake_file,
    context,
    dockerfile,
    image_key,
    requirements_key,
    wheel_key,
)
from radeon_stack.images.shared_wheels import fetch_wheels
from radeon_stack.images.spec import ImageSpec, WheelSpec
from radeon_stack.images.store import StoredWheels, WheelStore


@dataclass(frozen=True)
class Workplace:
    """Where builds keep what they leave: the home folder, and whom they tell their steps."""

    home: Path
    settings: BuildSettings
    tell: Callable[[Step], None]
    offline: bool = False
    registries: tuple[Registry, ...] = ()
    """Where wheels are looked for before they are built."""

    @property
    def store(self) -> WheelStore:
        return WheelStore(self.home)


@dataclass(frozen=True)
class Built:
    """What a build gave. `built` is false when it was there already."""

    tag: str
    id: str
    key: str
    size: int
    built: bool
    seconds: float
    log: Path | None = None
    steps: list[Step] = field(default_factory=list)


def build_image(spec: ImageSpec, place: Workplace, *, budget: int | None = None) -> Built:
    """The image of a spec. BuildError when a stage fails or the image is above `budget` bytes."""
    started = time.monotonic()
    key = image_key(spec)
    if not place.settings.no_cache and (found := image_of_key(key)) is not None:
        _within(int(found.attrs["Size"]), budget, spec)
        if spec.tag not in found.tags:
            found.tag(spec.tag)
        return Built(spec.tag, str(found.id), key, int(found.attrs["Size"]), False, time.monotonic() - started)
    stored = {wheel.name: ensure_wheel(spec, wheel, place) for wheel in spec.wheels}
    if (requirements := place.store.get(REQUIREMENTS, requirements_key(spec))) is not None:
        stored[REQUIREMENTS] = requirements
    elif place.offline:
        raise _not_stored(REQUIREMENTS, spec)
    with record(place.home, spec.name) as folder, _context(spec, stored) as build_folder:
        shutil.copyfile(build_folder / "Dockerfile", folder / "Dockerfile")
        steps, log, id_file = Steps(place.tell), folder / "log.txt", folder / "image.id"
        command = build_command(building_client(), build_folder, Output(id_file=id_file), _settings(place))
        build(command, steps, log)
        image = client().images.get(id_file.read_text(encoding="ascii").strip())
        _within(int(image.attrs["Size"]), budget, spec)
        image.tag(spec.tag)
        seconds = time.monotonic() - started
        built = Built(spec.tag, str(image.id), key, int(image.attrs["Size"]), True, seconds, log, steps.finished)
        atomic.write_text(folder / "result.json", json.dumps(summary(built), indent=2) + "\n")
    return built


def bake_images(specs: list[ImageSpec], place: Workplace, baker: str, *, budget: int | None = None) -> list[Built]:
    """Many images in one graph: what they share is built once, and what is not goes on at once.

    An image that is there already is left out. All are built before one is tagged; BuildError tags none.
    """
    started = time.monotonic()
    keys = {spec.name: image_key(spec) for spec in specs}
    there = {} if place.settings.no_cache else {name: image_of_key(key) for name, key in keys.items()}
    missing = [spec for spec in specs if there.get(spec.name) is None]
    done = {spec.name: build_image(spec, place, budget=budget) for spec in specs if spec not in missing}
    if missing:
        with record(place.home, "bake") as folder, tempfile.TemporaryDirectory(prefix="radeon-stack-") as contexts:
            for spec in missing:
                write_context(spec, Path(contexts) / spec.name, _stored(spec, place))
            bake = Path(contexts) / "docker-bake.json"
            bake.write_text(bake_file({f"./{spec.name}": spec for spec in missing}, tagged=False), encoding="utf-8")
            steps, log, metadata = Steps(place.tell), folder / "log.txt", folder / "metadata.json"
            build(bake_command(baker, bake, metadata, _settings(place)), steps, log, folder=Path(contexts))
            images = {spec.name: _made(keys[spec.name], log) for spec in missing}
            for spec in missing:
                _within(int(images[spec.name].attrs["Size"]), budget, spec)
            for spec in missing:
                image = images[spec.name]
                image.tag(spec.tag)
                seconds, size = time.monotonic() - started, int(image.attrs["Size"])
                done[spec.name] = Built(
                    spec.tag, str(image.id), keys[spec.name], size, True, seconds, log, steps.finished
                )
            results = [summary(done[spec.name]) for spec in missing]
            atomic.write_text(folder / "result.json", json.dumps(results, indent=2) + "\n")
    return [done[spec.name] for spec in specs]


def ensure_wheel(spec: ImageSpec, wheel: WheelSpec, place: Workplace, *, again: bool = False) -> StoredWheels:
    """A wheel by its key: from the store, a registry, or built in its stage alone. `again` builds it in any case."""
    key = wheel_key(spec, wheel)
    found = None if again else place.store.get(wheel.name, key)
    if found is not None:
        place.tell(Step(f"wheel-{wheel.name} · {key}, from the store", "cached"))
        return found
    if place.offline:
        raise _not_stored(wheel.name, spec)
    for registry in () if again else place.registries:
        with suppress(ImageError):  # a registry that is away costs a build, and no more
            if (found := fetch_wheels(registry, place.store, wheel.name, key)) is not None:
                place.tell(Step(f"wheel-{wheel.name} · {key}, from {registry.repository}", "cached"))
                return found
    if again:
        place = replace(place, settings=replace(place.settings, no_cache=True))
    about = {"variant": wheel.variant, "platform": spec.platform.name, "base": spec.base, "identity": spec.identity}
    return _build_leaf(spec, f"wheel-{wheel.name}", wheel.name, key, about, place)


def ensure_requirements(spec: ImageSpec, place: Workplace, *, again: bool = False) -> StoredWheels:
    """The lock's packages as files: what a build without a network installs. `again` downloads them in any case."""
    key = requirements_key(spec)
    found = None if again else place.store.get(REQUIREMENTS, key)
    if found is not None:
        place.tell(Step(f"requirements · {key}, from the store", "cached"))
        return found
    about = {"kind": spec.kind_name, "python": spec.platform.python}
    return _build_leaf(spec, REQUIREMENTS, REQUIREMENTS, key, about, place)


def image_of_key(key: str) -> Any | None:
    """The engine's image with this key; it was verified when it was built, else it had no label."""
    found = client().images.list(filters={"label": f"{KEY}={key}"})
    return found[0] if found else None


def summary(built: Built) -> dict[str, Any]:
    """For JSON: sizes in bytes, times in seconds."""
    return {
        "tag": built.tag,
        "id": built.id,
        "key": built.key,
        "size": built.size,
        "built": built.built,
        "seconds": round(built.seconds, 3),
        "log": str(built.log) if built.log else None,
        "steps": [{"step": step.title, "state": step.state, "seconds": step.seconds} for step in built.steps],
    }


@contextmanager
def record(home: Path, name: str) -> Iterator[Path]:
    """A folder of its own for a build: log, Dockerfile, result. It stays when the build fails."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    parent = home / "builds"
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{stamp}-{name}-", dir=parent))
    folder.chmod(0o755)
    yield folder


def write_context(spec: ImageSpec, folder: Path, stored: Iterable[StoredWheels] = ()) -> None:
    """The context of a spec in a folder, with the wheels that need not be built again."""
    for name, data in context(spec).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    names = []
    for wheels in stored:
        names.append(str(wheels.record["name"]))
        target = folder / "stored" / names[-1]
        target.mkdir(parents=True)
        for file in wheels.files:
            _link(file, target / file.name)
    if names:
        (folder / "Dockerfile").write_text(dockerfile(spec, names), encoding="utf-8")


def _made(key: str, log: Path) -> Any:
    image = image_of_key(key)
    if image is None:
        raise BuildError(f"the build ended, and left no image of key {key}", remedy=f"the full log: {log}")
    return image


def _stored(spec: ImageSpec, place: Workplace) -> list[StoredWheels]:
    """What the store has of an image's leaves; the others are built in the graph."""
    found = [place.store.get(wheel.name, wheel_key(spec, wheel)) for wheel in spec.wheels]
    found.append(place.store.get(REQUIREMENTS, requirements_key(spec)))
    return [stored for stored in found if stored is not None]


def _build_leaf(
    spec: ImageSpec, stage: str, name: str, key: str, about: dict[str, Any], place: Workplace
) -> StoredWheels:
    started = time.monotonic()
    with record(place.home, f"{stage}-{key}") as folder, _context(spec, {}) as build_folder:
        output = folder / "wheels"
        command = build_command(building_client(), build_folder, Output(stage=stage, folder=output), place.settings)
        build(command, Steps(place.tell), folder / "log.txt")
        about = {**about, "seconds": round(time.monotonic() - started, 1)}
        stored = place.store.put(name, key, output, about)
        shutil.rmtree(output)
    return stored


@contextmanager
def _context(spec: ImageSpec, stored: dict[str, StoredWheels]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="radeon-stack-") as folder:
        write_context(spec, Path(folder), stored.values())
        yield Path(folder)


def _settings(place: Workplace) -> BuildSettings:
    settings = place.settings
    network = "none" if place.offline else settings.network
    return BuildSettings(settings.ca, settings.pip_conf, network, settings.no_cache)


def _within(size: int, budget: int | None, spec: ImageSpec) -> None:
    if budget is not None and size > budget:
        raise BuildError(
            f"the image is {format_size(size)}, above the budget of {format_size(budget)}",
            where=f"{spec.name}: --budget",
            remedy="see what takes the room: radeon-stack image size, or build with --trim",
        )


def _not_stored(name: str, spec: ImageSpec) -> ImageError:
    arch = f"--rocm {spec.platform.rocm} --arch {spec.platform.gfx}" if spec.platform.gfx else "--arch cpu"
    return ImageError(
        f"{name} is not in the local store, and --offline fetches nothing",
        where=f"{spec.name}: {name}",
        remedy=f"while there is a network: radeon-stack image wheels --kind {spec.kind_name} {arch}",
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
