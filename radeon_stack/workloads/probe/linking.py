"""Are the libraries there that compiled modules are linked with? A package may import without them, and not work."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

SUFFIXES = tuple(suffix for suffix in EXTENSION_SUFFIXES if suffix != ".so")  # that one is any library's


def compiled(package: str) -> Iterator[Path]:
    """The compiled modules in a package's own folder."""
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        yield from sorted(file for file in Path(folder).iterdir() if file.name.endswith(SUFFIXES))


def missing(module: Path) -> list[str]:
    """What a module is linked with, and the loader does not find: loaded already, in its run path, or the system's."""
    from elftools.elf.dynamic import DynamicSegment
    from elftools.elf.elffile import ELFFile

    names: list[str] = []
    places: list[Path] = []
    with module.open("rb") as stream:
        for segment in ELFFile(stream).iter_segments():
            for tag in segment.iter_tags() if isinstance(segment, DynamicSegment) else ():
                kind = str(tag.entry.d_tag).removeprefix("DT_").lower()
                told = str(getattr(tag, kind, ""))  # pyelftools gives it that name
                if kind == "needed":
                    names.append(told)
                elif kind in ("runpath", "rpath"):
                    places += [Path(place.replace("$ORIGIN", str(module.parent))) for place in told.split(":")]
    return [name for name in names if not any((place / name).exists() for place in places) and not _loads(name)]


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
