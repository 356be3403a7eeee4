"""What one image is made of, and the Dockerfile that follows from it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from radeon_stack import __version__
from radeon_stack.catalog.folders import data_folder
from radeon_stack.catalog.platforms import Platform
from radeon_stack.errors import UsageError
from radeon_stack.images.resolve import KIND_LABEL, PLATFORM_LABEL

KINDS = ("train",)


@dataclass(frozen=True)
class ImageSpec:
    """An image of a kind (`train`) for a platform (`cpu`, `rocm7.1.1-gfx1201`)."""

    kind: str
    name: str
    platform: Platform

    @property
    def tag(self) -> str:
        return f"radeon-stack/{self.kind}:{self.name}"

    @property
    def base(self) -> str:
        """The base by digest once one is known."""
        digest = self.platform.digest
        return f"{self.platform.base}@{digest}" if digest else self.platform.base

    @property
    def labels(self) -> tuple[tuple[str, str], ...]:
        return (
            (KIND_LABEL, self.kind),
            (PLATFORM_LABEL, self.name),
            ("org.opencontainers.image.title", f"radeon-stack {self.kind} for {self.name}"),
            ("org.opencontainers.image.version", __version__),
        )


def dockerfile(spec: ImageSpec) -> str:
    """The Dockerfile: the same bytes for the same spec."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(data_folder("docker")),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - a Dockerfile, not HTML
    )
    return environment.get_template("Dockerfile.j2").render(
        kind=spec.kind,
        platform=spec.name,
        version=__version__,
        base=spec.base,
        python=spec.platform.python,
        torch=spec.platform.torch,
        labels=spec.labels,
    )


def write_context(spec: ImageSpec, folder: Path) -> None:
    """Everything `docker build` needs, in an empty folder: Dockerfile, lock and our package."""
    lock = data_folder("docker") / "locks" / f"{spec.platform.lock}.txt"
    if not lock.is_file():
        raise UsageError(f"no lock for {spec.name}", where=str(lock), remedy="make one: python tools/lock.py")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Dockerfile").write_text(dockerfile(spec), encoding="utf-8")
    shutil.copyfile(lock, folder / "requirements.txt")
    package = Path(__file__).resolve().parent.parent
    shutil.copytree(
        package, folder / "radeon_stack", ignore=shutil.ignore_patterns("__pycache__", "_data"), dirs_exist_ok=True
    )
