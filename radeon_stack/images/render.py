"""ImageSpec → Dockerfile, context and keys. Pure: the same spec gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from radeon_stack import __version__
from radeon_stack.images.keys import digest, key_of
from radeon_stack.images.labels import BASE, DRIVERS, GFX, KEY, KIND, PLATFORM, ROCM, TORCH, WHEELS
from radeon_stack.images.spec import JOB_MEMORY, ImageSpec, WheelSpec

REQUIREMENTS = "requirements"
# What runs inside an image; the host side stays outside, and a change of it moves no key.
INSIDE = (
    "__init__.py",
    "errors.py",
    "atomic.py",
    "checksums.py",
    "dialogue.py",
    "figures.py",
    "safetensor_files.py",
    "codeobjects",
    "text.py",
    "contracts",
    "kernels",
    "runs/__init__.py",
    "runs/events.py",
    "workloads",
)
KERNELS = "/opt/radeon-stack/triton"
ENVIRONMENT = (("PATH", "/opt/venv/bin:$PATH"), ("VIRTUAL_ENV", "/opt/venv"))
SOURCE_SUFFIXES = (".py", ".toml", ".json", ".j2")


def image_key(spec: ImageSpec) -> str:
    """The image's key: of its base, the keys of its wheels, its own stages, and the files these copy."""
    stages = _stages(_render(spec, frozenset(), key=""))
    return key_of(
        {
            "identity": spec.identity,
            "wheels": {wheel.name: wheel_key(spec, wheel) for wheel in spec.wheels},
            "stages": {name: text for name, text in stages.items() if not name.startswith("wheel-")},
            "files": {name: digest(data) for name, data in _own_files(spec, key="").items()},
        }
    )


def wheel_key(spec: ImageSpec, wheel: WheelSpec) -> str:
    """A wheel's key: of its stage, the stage's files, and the base it is built on."""
    stage = _stages(_render(spec, frozenset(), key=""))[f"wheel-{wheel.name}-build"]
    # How much memory a compiler job takes decides how many run at once, and nothing about the wheel.
    stage = "\n".join(line for line in stage.splitlines() if JOB_MEMORY not in line)
    files = {name: digest(text.encode()) for name, text in wheel.files.items()}
    return key_of({"identity": spec.identity, "stage": stage, "files": files, "driver": digest(driver(spec))})


def requirements_key(spec: ImageSpec) -> str:
    """The key of the downloaded requirements: of the lock, and of the base, whose Python chooses among wheels."""
    return key_of({"lock": digest(spec.requirements.encode()), "identity": spec.identity})


def dockerfile(spec: ImageSpec, stored: Iterable[str] = ()) -> str:
    """The Dockerfile; `stored` names wheels (and `requirements`) that lie in the context instead of being built."""
    return _render(spec, frozenset(stored), image_key(spec))


def context(spec: ImageSpec) -> dict[str, bytes]:
    """All files that `docker build` needs, by their path in the context; every stage is built from source."""
    key = image_key(spec)
    files = {
        **_own_files(spec, key),
        "Dockerfile": _render(spec, frozenset(), key).encode(),
        ".dockerignore": b"Dockerfile\ndocker-bake.json\n",
    }
    if spec.wheels:
        files["stage.sh"] = driver(spec)
    for wheel in spec.wheels:
        files |= {f"wheels/{wheel.name}/{name}": text.encode() for name, text in wheel.files.items()}
    return dict(sorted(files.items()))


def bake_file(specs: Mapping[str, ImageSpec], *, tagged: bool = True) -> str:
    """A bake file of JSON: one target a context folder, all in one group."""
    targets: dict[str, Any] = {
        _target(folder): {"context": folder, "output": ["type=docker"], **({"tags": [spec.tag]} if tagged else {})}
        for folder, spec in specs.items()
    }
    return _json({"group": {"default": {"targets": list(targets)}}, "target": targets})


def description(spec: ImageSpec, key: str) -> dict[str, Any]:
    """What is written into the image, and what its verify stage goes by."""
    platform, addition = spec.platform, spec.kind.addition(spec.platform.backend)
    return {
        "kind": spec.kind_name,
        "platform": platform.name,
        "key": key,
        "tool": __version__,
        "base": spec.base,
        "python": platform.python,
        "torch": platform.torch,
        "triton": platform.triton,
        "rocm": platform.rocm,
        "rocm_short": platform.rocm_short,
        "gfx": platform.gfx,
        "allocator": platform.allocator,
        "env": dict(spec.runtime_env),
        "wheels": dict(spec.variants),
        "commits": {w.name: env["COMMIT"] for w in spec.wheels if "COMMIT" in (env := dict(w.env))},
        "imports": sorted((*spec.kind.imports, *addition.imports, *platform.brings)),
        "apart": list(spec.kind.apart),
        "modules": list(spec.modules),
        "without": sorted(addition.without),
        "trim": spec.trim,
        "kernels": spec.kernels,
    }


def labels(spec: ImageSpec, key: str) -> tuple[tuple[str, str], ...]:
    """What an image is found and chosen by."""
    platform = spec.platform
    pairs = [
        (KIND, spec.kind_name),
        (PLATFORM, platform.name),
        (KEY, key),
        (BASE, spec.base),
        (TORCH, platform.torch),
        (WHEELS, ",".join(f"{name}={variant}" for name, variant in spec.variants)),
        ("org.opencontainers.image.title", f"radeon-stack {spec.kind_name} for {platform.name}"),
        ("org.opencontainers.image.version", __version__),
        ("org.opencontainers.image.licenses", "Apache-2.0"),
    ]
    if platform.rocm and platform.gfx:
        pairs += [(ROCM, platform.rocm), (GFX, platform.gfx), (DRIVERS, ",".join(platform.drivers))]
    return tuple(pairs)


def _render(spec: ImageSpec, stored: frozenset[str], key: str) -> str:
    kernels = (("RADEON_STACK_KERNELS", KERNELS),) if spec.kernels else ()
    environment = (*ENVIRONMENT, *kernels, *sorted(spec.runtime_env))
    return str(
        _template(spec.docker).render(
            kind=spec.kind_name,
            platform=spec.platform,
            base=spec.base,
            wheels=spec.wheels,
            stored=stored,
            trim=spec.trim,
            kernels=KERNELS if spec.kernels else None,
            base_env=[(name, _quoted(value)) for name, value in spec.base_env],
            env=environment,
            labels=labels(spec, key),
        )
    )


@lru_cache
def _template(folder: Path) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701 - a Dockerfile, not HTML
    )
    return environment.get_template("Dockerfile.j2")


def _stages(text: str) -> dict[str, str]:
    """The instructions of each stage by its name, without comments: a comment builds nothing."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("FROM "):
            name = line.rpartition(" AS ")[2]
        if name and line.strip() and not line.startswith("#"):
            found.setdefault(name, []).append(line)
    return {name: "\n".join(lines) for name, lines in found.items()}


def driver(spec: ImageSpec) -> bytes:
    """What every wheel's stage runs around its own build.sh."""
    return (spec.docker / "wheels" / "stage.sh").read_bytes()


def _own_files(spec: ImageSpec, key: str) -> dict[str, bytes]:
    """What the image's own stages copy."""
    return {
        "image.json": _json(description(spec, key)).encode(),
        "requirements.txt": spec.requirements.encode(),
        **{f"radeon_stack/{name}": data for name, data in package_files().items()},
    }


@lru_cache
def package_files() -> dict[str, bytes]:
    """The sources that go inside, by their path in the package."""
    root = Path(__file__).resolve().parent.parent
    found = {}
    for entry in INSIDE:
        path = root / entry
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and file.suffix in SOURCE_SUFFIXES:
                found[str(file.relative_to(root))] = file.read_bytes()
    return found


def _target(folder: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in folder.strip("./")) or "image"


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$") + '"'


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
