"""Which Python here has what a kind of image has? This one, or an environment of its own below the home folder."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from radeon_stack.catalog.platforms import CPU, load_platforms
from radeon_stack.images.keys import digest, key_of
from radeon_stack.images.render import driver
from radeon_stack.images.spec import JOB_MEMORY, ImageSpec, WheelSpec, image_spec

PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Environment:
    """A virtual environment with what an image of a kind has, for the CPU. What is under its name is whole."""

    spec: ImageSpec
    home: Path

    @property
    def kind(self) -> str:
        return self.spec.kind_name

    @cached_property
    def folder(self) -> Path:
        return self.home / "environments" / f"{self.spec.name}-{environment_key(self.spec)}"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def log(self) -> Path:
        """What was printed while it was made."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def ready(self) -> bool:
        """Is it there? Not without the Python that it was made from: `python` is a link to that."""
        return self.python.exists()


def environment_for(kind: str, home: Path, docker: Path | None = None) -> Environment:
    """The environment of a kind of image, made or not. UsageError for a kind that there is not."""
    return Environment(image_spec(kind, load_platforms(docker)[CPU], docker=docker), home)


def lacking(spec: ImageSpec) -> tuple[str, ...]:
    """What a kind promises and this Python has not. Looked for, never imported: of `a.b` that would be `a`."""
    return tuple(name for name in promised(spec) if find_spec(name.partition(".")[0]) is None)


def promised(spec: ImageSpec) -> tuple[str, ...]:
    """The modules that every image of a spec has."""
    return (*spec.kind.imports, *spec.kind.addition(spec.platform.backend).imports, *spec.kind.apart)


def environment_key(spec: ImageSpec, interpreter: str | None = None, package: Path = PACKAGE) -> str:
    """An environment's key: of its packages, torch, wheels and Python, and of whose radeon-stack is linked into it.

    So two checkouts have an environment each, and neither ever runs the other's code.
    """
    interpreter = interpreter or this_interpreter()
    return key_of(
        {
            "lock": digest(spec.requirements.encode()),
            "torch": spec.platform.torch,
            "wheels": {wheel.name: local_wheel_key(spec, wheel, interpreter) for wheel in spec.wheels},
            "promised": sorted(promised(spec)),
            "interpreter": interpreter,
            "package": str(package),
        }
    )


def local_wheel_key(spec: ImageSpec, wheel: WheelSpec, interpreter: str | None = None) -> str:
    """The key of a wheel that is built here, without an image: this machine's Python is in its base's place."""
    return key_of(
        {
            "files": {name: digest(text.encode()) for name, text in wheel.files.items()},
            "driver": digest(driver(spec)),
            # How much memory a compiler job takes decides how many run at once, and nothing about the wheel.
            "env": {name: value for name, value in wheel.env if name != JOB_MEMORY},
            "interpreter": interpreter or this_interpreter(),
        }
    )


def this_interpreter() -> str:
    """What compiled packages are for: `cpython-3.11-x86_64`."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{sys.implementation.name}-{version}-{platform.machine()}"
