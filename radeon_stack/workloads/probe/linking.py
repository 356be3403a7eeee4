"""Do extension modules find the libraries they are linked with? A package may import without them, and not work.

The dynamic loader itself is asked, as `ldd` asks it: it knows every way of naming a place, and starts nothing it finds.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

SUFFIXES = tuple(suffix for suffix in EXTENSION_SUFFIXES if suffix != ".so")  # that one is any library's
ASK = "LD_TRACE_LOADED_OBJECTS"  # ld.so(8): say what would be loaded, and end
SECONDS = 60
REFUSED = "cannot be preloaded"
NEWER = re.compile(r"version `([^']+)' not found \(required by (.+)\)$", re.MULTILINE)  # GLIBCXX_3.4.32, of a library


@dataclass(frozen=True)
class Module:
    """An extension module, and what its import would not find, libraries or versions of them; None: it cannot be told
    from here.
    """

    name: str
    lost: tuple[str, ...] | None


def look(packages: Iterable[str]) -> Iterator[Module]:
    """Every extension module in these packages' folders, as it would be imported once they all are."""
    packages = tuple(packages)
    for package in packages:
        with suppress(Exception):  # whether it imports is another check's question
            import_module(package)
    for package in packages:
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            yield from _in(package, Path(folder).resolve())


def _in(package: str, folder: Path) -> Iterator[Module]:
    files = [Path(place, name) for place, _, names in os.walk(folder) for name in sorted(names)]
    names = {file.name for file in files}
    for file in files:
        if not file.name.endswith(SUFFIXES) or not file.resolve().is_relative_to(folder):
            continue
        inside = file.relative_to(folder)
        lost = not_found(file)
        if lost and ".".join((package, *inside.parts[:-1])) not in sys.modules:
            # Whoever imports it imports its own package first, which may load what the package has elsewhere.
            lost = tuple(name for name in lost if name not in names) or None
        yield Module(f"{package}/{inside}", lost)


def not_found(module: Path) -> tuple[str, ...] | None:
    """What this Python would not find for a module, beyond what it has loaded. None: the loader did not look at it."""
    before = os.environ.get("LD_PRELOAD", "")
    with TemporaryDirectory() as empty:  # an empty place in a run path is the working directory
        told = subprocess.run(
            [sys.executable, "-c", ""],
            env={**os.environ, ASK: "1", "LD_PRELOAD": f"{before} {module}".strip()},
            cwd=empty, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip
    if any(f"'{module}'" in line and REFUSED in line for line in told.stderr.splitlines()):
        return (f"to be whole, and of this machine ({REFUSED})",)
    lines = [line.strip() for line in told.stdout.splitlines()]
    if not any(line.startswith(f"{module} (") for line in lines):
        return None
    names = [name for name, _, where in (line.partition(" => ") for line in lines) if where == "not found"]
    older = [version for version, who in NEWER.findall(told.stderr) if who == str(module)]
    return (*(name for name in dict.fromkeys(names) if not _loaded(name)), *dict.fromkeys(older))


def _loaded(name: str) -> bool:
    """Does this process have it already, by whatever path? Nothing is loaded for the question."""
    try:
        ctypes.CDLL(name, os.RTLD_NOLOAD)
    except OSError:
        return False
    return True
