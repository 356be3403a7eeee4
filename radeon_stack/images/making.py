"""Makes an environment: once, by one run at a time, and under its name only when it is whole."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from radeon_stack import atomic
from radeon_stack.errors import BuildError, ImageError, MachineError
from radeon_stack.images.environments import PACKAGE, Environment, local_wheel_key, this_interpreter
from radeon_stack.images.logged import Logged
from radeon_stack.images.progress import Step
from radeon_stack.images.render import REQUIREMENTS, description, driver
from radeon_stack.images.spec import WheelSpec
from radeon_stack.images.store import StoredWheels, WheelStore
from radeon_stack.images.uv import cpu_torch, find_links, find_uv

COMPILERS = ("gcc", "g++")
BUILD = "build"  # below what is half made: tools, sources and what is left of them; it does not stay
RECORD = "radeon-stack"  # what /etc/radeon-stack is in an image
# Of our own environment, what would reach into theirs, and what stage.sh takes for a wheel's.
HIDDEN = ("PYTHONPATH", "PYTHONHOME", "BUILD", "WHEELS", "PYTHON_BIN", "CACHE", "GIT", "COMMIT", "GFX")
Tell = Callable[[Step], None]


def make(environment: Environment, tell: Tell) -> None:
    """Make an environment, unless it is ready by then.

    MachineError says what this machine lacks for it, ImageError what could not be had, BuildError what did not
    compile or does not work; each names the log. However it ends, nothing half-made is under the folder's name.
    """
    environment.folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(environment, tell) as lock, _ended_by_signals():
        if environment.ready:
            return
        uv, missing = find_uv(), _not_stored(environment)
        require_programs(missing, uv)
        tell(Step(announcement(environment.kind, [wheel.name for wheel in missing]), "note"))
        environment.log.write_bytes(b"")
        logged = Logged(f"the environment for {environment.kind}", environment.log, tell, held=(lock,))
        with atomic.whole_directory(environment.folder) as partial:
            _Making(environment, partial, logged, find_links(os.environ)).make(uv)
            _settle(partial, environment.folder)


def announcement(kind: str, compiled: Sequence[str]) -> str:
    """What is about to be done, and how long that takes on two cores."""
    how_long = f"about 5 minutes on two cores, 4 to compile {', '.join(compiled)}" if compiled else "a minute or two"
    return f"making an environment for {kind}, once: {how_long}"


def require_programs(wheels: Sequence[WheelSpec], uv: list[str] | None) -> None:
    """MachineError for programs that these wheels are built with, before anything is fetched for them."""
    needed = list(COMPILERS) if wheels else []
    needed += ["git"] if any(wheel.settings.git for wheel in wheels) else []
    needed += ["patch"] if any(name.startswith("patches/") for wheel in wheels for name in wheel.files) else []
    if missing := [program for program in needed if shutil.which(program) is None]:
        names = ", ".join(wheel.name for wheel in wheels)
        raise MachineError(
            f"there is no {' and no '.join(missing)}, and {names} is compiled here",
            where="--engine local",
            remedy=f"install them: sudo apt install {' '.join(missing)}",
        )
    if (wheels or uv is None) and importlib.util.find_spec("ensurepip") is None:
        raise MachineError(
            "this Python makes no virtual environments with pip (no ensurepip)",
            where="--engine local",
            remedy="install it: sudo apt install python3-venv",
        )


@dataclass(frozen=True)
class _Making:
    """The steps, each upon the one before; all in a folder that gets its name once they have ended."""

    environment: Environment
    partial: Path
    logged: Logged
    links: str

    def make(self, uv: list[str] | None) -> None:
        spec, python = self.environment.spec, str(self._python)
        self._temporary.mkdir(parents=True)
        self._build("an empty environment", [*_venv(), "--without-pip", "--prompt", spec.name, str(self.partial)])
        install = [*(uv or self._uv()), "pip", "install", "--python", python, "--no-deps"]
        record = self._record()
        self._fetch(
            f"torch {spec.platform.torch}",
            [*install, *cpu_torch(spec.platform.torch, self.links)],
            [python, str(PACKAGE / "workloads" / "probe" / "base.py"), str(record)],
        )
        lock = ["--require-hashes", "--requirement", str(record / f"{REQUIREMENTS}.txt")]
        self._fetch(f"packages by hash: {spec.requirements.count('==')}", [*install, *lock])
        for wheel in spec.wheels:
            stored = self._wheel(wheel)
            self._build(f"{wheel.name} {wheel.wheel.version}", [*install, *map(str, stored.files)])
            with (record / "wheels.sha256").open("a", encoding="utf-8") as sums:
                sums.writelines(f"{digest}  {name}\n" for name, digest in stored.record["files"].items())
        # A link, for a .pth would let in all that lies beside the package: this Python's other packages, when it
        # was installed there. And a link shows today's code.
        (next(self.partial.glob("lib/python*/site-packages")) / PACKAGE.name).symlink_to(PACKAGE)
        # An image's own verification: the environment does what it is for, or it does not exist.
        self._build("verified", [python, "-m", f"{PACKAGE.name}.workloads.probe", "verify", str(record)])

    @property
    def _python(self) -> Path:
        return self.partial / "bin" / "python"

    @property
    def _temporary(self) -> Path:
        return self.partial / BUILD / "tmp"

    @property
    def _env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in HIDDEN}
        return kept | {"TMPDIR": str(self._temporary)} | ({"UV_FIND_LINKS": self.links} if self.links else {})

    def _fetch(self, title: str, *commands: list[str]) -> float:
        remedy = "if it is for want of a network, run it again with one"
        return self.logged.run(title, *commands, env=self._env, failing=ImageError, remedy=remedy)

    def _build(self, title: str, *commands: list[str], **env: str) -> float:
        return self.logged.run(title, *commands, env=self._env | env, failing=BuildError)

    def _uv(self) -> list[str]:
        """A uv of its own, where there is none: pip would take torch with CUDA."""
        python = str(self.partial / BUILD / "uv" / "bin" / "python")
        fetch = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"]
        self._fetch("uv", [*_venv(), str(self.partial / BUILD / "uv")], fetch)
        return [python, "-m", "uv"]

    def _record(self) -> Path:
        """What the verification goes by, as in an image."""
        folder, spec = self.partial / RECORD, self.environment.spec
        folder.mkdir()
        told = description(spec, self.environment.folder.name.rpartition("-")[2])
        (folder / "image.json").write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / f"{REQUIREMENTS}.txt").write_text(spec.requirements, encoding="utf-8")
        return folder

    def _wheel(self, wheel: WheelSpec) -> StoredWheels:
        """A wheel from the store, or built into it: what fails later does not have it compiled again."""
        spec, store = self.environment.spec, WheelStore(self.environment.home)
        key = local_wheel_key(spec, wheel)
        if (found := store.get(wheel.name, key)) is not None:
            self.logged.tell(Step(f"{wheel.name} {wheel.wheel.version}, from the store", "cached"))
            return found
        build = self.partial / BUILD / wheel.name
        for name, data in {**{n: text.encode() for n, text in wheel.files.items()}, "stage.sh": driver(spec)}.items():
            (build / name).parent.mkdir(parents=True, exist_ok=True)
            (build / name).write_bytes(data)
        seconds = self._build(
            f"{wheel.name} {wheel.wheel.version}, compiled",
            [*_venv(), str(build / "tools")],
            ["sh", str(build / "stage.sh")],
            **dict(wheel.env),
            BUILD=str(build),
            WHEELS=str(build / "wheels"),
            PYTHON_BIN=str(build / "tools" / "bin"),
            # Not the home's `cache`: containers write to that.
            CACHE=str(self.environment.home / "builds" / "cache"),
        )
        about = {"variant": wheel.variant, "platform": spec.platform.name, "interpreter": this_interpreter()}
        return store.put(wheel.name, key, build / "wheels", {**about, "seconds": round(seconds, 1)})


def _not_stored(environment: Environment) -> list[WheelSpec]:
    spec, store = environment.spec, WheelStore(environment.home)
    return [wheel for wheel in spec.wheels if store.get(wheel.name, local_wheel_key(spec, wheel)) is None]


def _venv() -> list[str]:
    return [sys.executable, "-m", "venv"]


def _settle(partial: Path, final: Path) -> None:
    """Leave what it was made with, and have scripts name the Python by where it will be."""
    shutil.rmtree(partial / BUILD)
    before, after = os.fsencode(partial), os.fsencode(final)
    for file in (partial / "pyvenv.cfg", *(partial / "bin").iterdir()):
        if file.is_symlink() or not file.is_file():
            continue
        data = file.read_bytes()
        if before in data and b"\0" not in data:
            file.write_bytes(data.replace(before, after))


@contextmanager
def _alone(environment: Environment, tell: Tell) -> Iterator[int]:
    """Hold the environment's lock; its descriptor, for children: it is held until the last of them has ended."""
    with environment.folder.with_name(f"{environment.folder.name}.lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(Step(f"waiting for another run: it is making the environment for {environment.kind}", "note"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end it as Ctrl-C does, with its children; under nohup the latter stays ignored."""
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
