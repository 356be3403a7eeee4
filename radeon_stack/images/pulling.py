"""A published image into the engine: only what is missing, through broken connections, held to its digests."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radeon_stack.catalog.sizes import format_size
from radeon_stack.errors import CheckError, ImageError, MachineError
from radeon_stack.host.engines import client
from radeon_stack.images.download import PATIENCE_SECONDS, fetch_blob
from radeon_stack.images.labels import KEY, KIND, PLATFORM
from radeon_stack.images.published import Candidate
from radeon_stack.images.registry import CONFIG_LIMIT, Registry

# What a layer grows to when it is unpacked: 2 to 3 times for images of Python and ROCm libraries.
UNPACKED = 3
LOAD_SECONDS = 3600
CHUNK = 1 << 20
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Need:
    """What a pull will move and take, in bytes; `free` is what there is for it."""

    download: int
    unpacked: int
    layers: tuple[int, ...]
    """Which layers are missing here, by their place."""
    free: int
    here: bool
    """The image is in the engine already."""


@dataclass(frozen=True)
class Pulled:
    """The image as it is now in the engine."""

    id: str
    digest: str
    reference: str
    tag: str
    downloaded: int


def need(one: Candidate, home: Path) -> Need:
    """What is missing: layers that no image here has below them are downloaded, the others not."""
    if _image(one.config_digest) is not None:
        return Need(0, 0, (), _free(home), True)
    missing = tuple(range(_layers_here(one.diff_ids), len(one.manifest.layers)))
    download = sum(int(one.manifest.layers[place]["size"]) for place in missing)
    return Need(download, download * UNPACKED, missing, _free(home), False)


def require_room(wanted: Need, home: Path) -> None:
    """MachineError when the disk has no room for the download and what it unpacks to."""
    total = wanted.download + wanted.unpacked
    if total > wanted.free:
        raise MachineError(
            f"about {format_size(total)} are needed ({format_size(wanted.download)} to download, then unpacked), "
            f"{format_size(wanted.free)} are free",
            where=str(home),
            remedy="free some room (docker image prune), or put the home folder elsewhere: RADEON_STACK_HOME=DIR",
        )


def pull(
    registry: Registry,
    one: Candidate,
    wanted: Need,
    home: Path,
    *,
    told: Callable[[int], None] = lambda _: None,
    waiting: Callable[[str, float], None] = lambda why, seconds: None,
    patience: float = PATIENCE_SECONDS,
) -> Pulled:
    """Download, load, compare. The image has its registry's digest and our tag afterwards, and no file stays."""
    digest = one.manifest.digest
    folder = home / "blobs"
    if not wanted.here:
        folder.mkdir(parents=True, exist_ok=True)
        done = 0
        files: dict[int, Path] = {}
        for place in wanted.layers:
            layer, before = one.manifest.layers[place], done
            files[place] = fetch_blob(
                registry,
                layer["digest"],
                int(layer["size"]),
                folder,
                told=lambda size, before=before: told(before + size),  # type: ignore[misc]
                waiting=waiting,
                patience=patience,
            )
            done += int(layer["size"])
        _load(one, registry.read_blob(one.config_digest, CONFIG_LIMIT), files)
    image = _image(one.config_digest)
    if image is None:
        raise CheckError("the engine loaded another image than was pulled", where=f"{registry.repository}@{digest}")
    _check_labels(image, one)
    for place in wanted.layers:
        (folder / one.manifest.layers[place]["digest"].replace(":", "-")).unlink(missing_ok=True)
    tag = f"radeon-stack/{one.labels[KIND]}:{one.labels[PLATFORM]}"
    image.tag(tag)
    return Pulled(str(image.id), digest, _named(registry, digest, tag), tag, wanted.download)


def _named(registry: Registry, digest: str, tag: str) -> str:
    """Its name by digest: the engine asks the registry for the manifest, and has all the rest already."""
    from docker.errors import APIError

    reference = f"{registry.repository}@{digest}"
    with suppress(APIError):  # an engine that does not reach the registry itself keeps our tag
        client(timeout=LOAD_SECONDS).api.pull(str(registry.repository), tag=digest)
        return reference
    return tag


def _load(one: Candidate, config: bytes, files: dict[int, Path]) -> None:
    from docker.errors import APIError

    try:
        for line in client(timeout=LOAD_SECONDS).api.load_image(_archive(one, config, files)) or ():
            if error := line.get("error"):
                raise ImageError(f"the engine did not load it: {error}")
    except APIError as error:
        raise ImageError(f"the engine did not load it: {error.explanation or error}") from error


def _archive(one: Candidate, config: bytes, files: dict[int, Path]) -> Iterator[bytes]:
    """An image archive as `docker load` reads it. Layers that are here already are named, and left out.

    Source: moby's image/tarexport/load.go: a layer is read only when its chain is not in the store.
    """
    name = one.config_digest.partition(":")[2] + ".json"
    layers = [f"{layer['digest'].partition(':')[2]}.tar" for layer in one.manifest.layers]
    manifest = json.dumps([{"Config": name, "RepoTags": None, "Layers": layers}]).encode()
    for member, data in ((name, config), ("manifest.json", manifest)):
        yield _header(member, len(data)) + data + _padding(len(data))
    for place, path in files.items():
        size = path.stat().st_size
        yield _header(layers[place], size)
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
        yield _padding(size)
    yield bytes(2 * BLOCK)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _layers_here(diff_ids: tuple[str, ...]) -> int:
    """How many of the lowest layers some image of the engine has."""
    if _keeps_content_apart():
        return 0
    most = 0
    for image in client().images.list(all=True):
        there = image.attrs.get("RootFS", {}).get("Layers") or ()
        same = 0
        for ours, theirs in zip(diff_ids, there, strict=False):
            if ours != theirs:
                break
            same += 1
        most = max(most, same)
    return most


def _keeps_content_apart() -> bool:
    """With containerd's image store an archive has to be whole."""
    status: list[Any] = client().info().get("DriverStatus") or []
    return any("io.containerd" in str(value) for _, value in status)


def _image(config_digest: str) -> Any | None:
    from docker.errors import ImageNotFound

    try:
        return client().images.get(config_digest)
    except ImageNotFound:
        return None


def _check_labels(image: Any, one: Candidate) -> None:
    for label in (KEY, KIND, PLATFORM):
        if image.labels.get(label) != one.labels.get(label):
            raise CheckError(f"its label {label} is not what was published", where=str(image.id))


def _free(home: Path) -> int:
    """Bytes free where it will lie: the least of the home folder and the engine's, where that is on this machine."""
    places = [_existing(home)]
    root = Path(str(client().info().get("DockerRootDir", "")))
    if root.is_dir():
        places.append(root)
    return min(shutil.disk_usage(place).free for place in places)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
