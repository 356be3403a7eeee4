"""All that doctor judges by, probed within a fixed time: what does not answer is told as unknown, never waited for."""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from radeon_stack.catalog.load import read, recipe_paths, resolve
from radeon_stack.host.boxed import together
from radeon_stack.host.cdi import CdiDevice, cdi_devices
from radeon_stack.host.engines import SOCKET, STANDARD, SYSTEMD, EngineProbe, described, probe_engine
from radeon_stack.host.gpus import PCI, pci_gpus
from radeon_stack.host.machine import WSL_FILES, Machine, probe
from radeon_stack.host.sysroot import Sysroot, as_number

SECONDS = 2.0  # for all probes together
WATCHED = (
    "DOCKER_HOST",
    "HSA_OVERRIDE_GFX_VERSION",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_HIP_MEMORY_CACHING",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "GGML_CUDA_P2P",
)
PROGRAMS = ("dockerd", "podman")
PROBES = ("files", "clocks", "engine")
GROUP = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")  # names end up in commands to paste: groupadd(8)
KEEP_GROUPS_ANNOTATION = "run.oci.keep_original_groups=1"  # crun's: its manual, OCI annotations


@dataclass(frozen=True)
class ImageFact:
    """An image of ours in the engine; `drivers` are the beginnings of driver versions that it was made for."""

    name: str
    kind: str
    rocm: str = ""
    gfx: str = ""
    drivers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clock:
    """A card's shader clock: now and at most, in MHz, and how busy the card is, in percent."""

    now: int
    most: int
    busy: int


@dataclass(frozen=True)
class Group:
    """A line of /etc/group."""

    gid: int
    members: frozenset[str]


@dataclass(frozen=True)
class Need:
    """What a recipe, with its preset, asks of a machine; bytes, and GPUs at least."""

    recipe: str
    memory: int
    shm: int
    gpus: int


@dataclass(frozen=True)
class Facts:
    """What was found. None: not known here; the names in `late` did not answer in time."""

    machine: Machine
    module: str = ""
    """State of the amdgpu module, `live` when it is loaded; "" when there is none."""
    cmdline: tuple[str, ...] = ()
    distribution: str = ""
    systemd: bool = True
    vendor: str = ""
    """Of the machine; QEMU and the like are virtual ones."""
    groups: Mapping[str, Group] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    clocks: Mapping[str, Clock] = field(default_factory=dict)
    cdi: tuple[CdiDevice, ...] = ()
    wsl_missing: tuple[str, ...] = ()
    """Files that a container needs on WSL2, and that are not there."""
    engine: EngineProbe | None = None
    buildkit: bool | None = None
    buildx: bool | None = None
    engine_free: int | None = None
    home_free: int | None = None
    shm: int | None = None
    keeps_groups: bool = False
    """Does podman's configuration give containers the caller's groups?"""
    images: tuple[ImageFact, ...] | None = None
    packages_missing: tuple[str, ...] | None = None
    programs: frozenset[str] = frozenset()
    """Which of the engines' programs are on PATH, whether they run or not."""
    needs: tuple[Need, ...] = ()
    late: frozenset[str] = frozenset()
    broken: Mapping[str, str] = field(default_factory=dict)
    """Probes that broke, and why: their facts are not known either."""


@dataclass(frozen=True)
class Ways:
    """Probes of other rooms, which doctor hands in: images of the engine, clients that build, packages that lack."""

    images: Callable[[], tuple[ImageFact, ...]] | None = None
    buildkit: Callable[[], bool] | None = None
    buildx: Callable[[], bool] | None = None
    packages_missing: Callable[[], tuple[str, ...]] | None = None


def gather(sysroot: Sysroot, home: Path, ways: Ways | None = None, seconds: float = SECONDS) -> Facts:
    """Everything about this machine, or about the tree below `sysroot`; within so many seconds."""
    ways = ways or Ways()
    probes: dict[str, Callable[[], Any]] = {
        "files": lambda: (from_files(sysroot), sysroot.seen, sysroot.there),
        # Apart: these ask the card itself, and a card that hangs does not answer.
        "clocks": lambda: ({"clocks": clocks(sysroot)}, sysroot.seen, sysroot.there),
    }
    if sysroot.live:
        probes |= {
            "engine": lambda: _engine_here(max(1, int(seconds)), ways.images),
            "home_free": lambda: _free(home),
            "keeps_groups": _keeps_groups,
            "shm": lambda: shutil.disk_usage("/dev/shm").total,  # noqa: S108 - looked at, not written
        }
        given = {name: getattr(ways, name) for name in ("buildkit", "buildx", "packages_missing")}
        probes |= {name: way for name, way in given.items() if way is not None}
    answers = together(probes, seconds)
    found = dict(answers.found)
    for name in ("files", "clocks"):
        facts, seen, there = found.pop(name, ({}, {}, set()))
        found |= facts
        sysroot.seen.update(seen)
        sysroot.there.update(there)
    found.setdefault("machine", Machine.unknown())
    found["late"] = answers.late | found.get("late", frozenset())
    if sysroot.live:
        found |= found.pop("engine", {})
        found["environment"] = {name: os.environ[name] for name in WATCHED if name in os.environ}
        found["programs"] = frozenset(filter(shutil.which, PROGRAMS))
    return Facts(**found, needs=needs(), broken=answers.broken)


def needs() -> tuple[Need, ...]:
    """Of every recipe and preset in the catalog."""
    files = [read(path.stem) for path in recipe_paths()]
    found = [resolve(file, preset) for file in files for preset in (None, *file.presets)]
    return tuple(
        Need(
            made.name + (f" --preset {made.preset}" if made.preset else ""),
            made.recipe.resources.memory,
            made.recipe.resources.shm,
            made.recipe.resources.gpus.min,
        )
        for made in found
    )


def _engine_here(seconds: int, images: Callable[[], tuple[ImageFact, ...]] | None) -> dict[str, Any]:
    """The engine, what is free on its disk where that is a disk of ours, and its images."""
    engine = probe_engine(seconds)
    facts: dict[str, Any] = {"engine": engine}
    if engine.root and engine.address.startswith(SOCKET):
        facts["engine_free"] = _free(Path(engine.root))
    if engine.answers and images is not None:
        facts["images"] = images()
    return facts


def from_files(sysroot: Sysroot) -> dict[str, Any]:
    """What is read below the root, of this machine or of a staged one."""
    return {
        "machine": probe(sysroot),
        "module": (sysroot.text("/sys/module/amdgpu/initstate") or "live") if _has_module(sysroot) else "",
        "cmdline": tuple((sysroot.text("/proc/cmdline") or "").split()),
        "distribution": _distribution(sysroot.text("/etc/os-release") or ""),
        "systemd": not sysroot.live or sysroot.exists(SYSTEMD),
        "vendor": sysroot.text("/sys/class/dmi/id/sys_vendor") or "",
        "groups": _groups(sysroot.text("/etc/group") or ""),
        "cdi": cdi_devices(sysroot),
        "wsl_missing": tuple(path for path in WSL_FILES if not sysroot.exists(path)),
    } | ({} if sysroot.live else _told(sysroot.overlay))


def _told(told: Mapping[str, Any]) -> dict[str, Any]:
    """A tree has no engine to ask: its overlay tells what was answered."""
    engine, environment = told.get("engine"), told.get("environment")
    facts: dict[str, Any] = {}
    if isinstance(engine, dict):
        buildkit = engine.get("buildkit", True)
        facts = {
            "engine": _engine(engine),
            "buildkit": None if buildkit is None else bool(buildkit),
            "buildx": bool(engine.get("buildx", False)),
            "engine_free": as_number(str(engine.get("free", ""))),
            "images": _images(engine.get("images")),
        }
    if isinstance(told.get("packages_missing"), list):
        facts["packages_missing"] = _words(told["packages_missing"])
    kept = {k: str(v) for k, v in environment.items() if k in WATCHED} if isinstance(environment, dict) else {}
    return facts | {
        "programs": frozenset(PROGRAMS) & frozenset(_words(told.get("programs"))),
        "late": frozenset(PROBES) & frozenset(_words(told.get("late"))),
        "systemd": told.get("systemd", True) is True,
        "keeps_groups": told.get("keeps_groups") is True,
        "home_free": as_number(str(told.get("home_free", ""))),
        "shm": as_number(str(told.get("shm", ""))),
        "environment": kept,
    }


def _words(told: Any) -> tuple[str, ...]:
    return tuple(map(str, told)) if isinstance(told, list) else ()


def _engine(told: Mapping[str, Any]) -> EngineProbe:
    where = str(told.get("address", STANDARD))
    if told.get("why_not"):
        return EngineProbe(where, why_not=str(told["why_not"]), denied="permission denied" in str(told["why_not"]))
    version, info = told.get("version"), told.get("info")
    return described(where, version if isinstance(version, dict) else {}, info if isinstance(info, dict) else {})


def _images(told: Any) -> tuple[ImageFact, ...]:
    found = []
    for one in told if isinstance(told, list) else []:
        if isinstance(one, dict):
            words = [str(one.get(key, "")) for key in ("name", "kind", "rocm", "gfx")]
            found.append(ImageFact(words[0], words[1], words[2], words[3], _words(one.get("drivers"))))
    return tuple(found)


def _keeps_groups() -> bool:
    """containers.conf(5): the user's own, and its drop-ins; the last one that speaks of it counts."""
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "containers"
    places = [Path("/etc/containers/containers.conf"), own / "containers.conf"]
    for folder in (Path("/etc/containers/containers.conf.d"), own / "containers.conf.d"):
        places += sorted(folder.glob("*.conf")) if folder.is_dir() else []
    told = os.environ.get("CONTAINERS_CONF")
    for place in [Path(told)] if told else places:
        try:
            lines = tomllib.loads(place.read_text(encoding="utf-8"))["containers"]["annotations"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if KEEP_GROUPS_ANNOTATION in lines:
            return True
    return False


def _has_module(sysroot: Sysroot) -> bool:
    return sysroot.exists("/sys/module/amdgpu")


def _distribution(text: str) -> str:
    """`ID` of /etc/os-release and what it is like: `ubuntu debian`."""
    pairs = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return f"{pairs.get('ID', '')} {pairs.get('ID_LIKE', '')}".replace('"', "").strip()


def _groups(text: str) -> dict[str, Group]:
    found = {}
    for line in text.splitlines():
        fields = line.split(":")
        gid = as_number(fields[2]) if len(fields) == 4 and GROUP.fullmatch(fields[0]) else None
        if gid is not None:
            found[fields[0]] = Group(gid, frozenset(filter(None, fields[3].split(","))))
    return found


def clocks(sysroot: Sysroot) -> dict[str, Clock]:
    """The clocks of the cards that tell theirs, by PCI address."""
    found = {gpu.address: _clock(sysroot, gpu.address) for gpu in pci_gpus(sysroot)}
    return {address: clock for address, clock in found.items() if clock is not None}


def _clock(sysroot: Sysroot, pci: str) -> Clock | None:
    """Of pp_dpm_sclk, whose lines are `1: 2400Mhz *`: Documentation/gpu/amdgpu/thermal.rst of Linux."""
    speeds: list[int] = []
    now = 0
    for line in (sysroot.text(f"{PCI}/{pci}/pp_dpm_sclk") or "").splitlines():
        words = line.replace("Mhz", " ").split()
        speed = as_number(words[1]) if len(words) > 1 else None
        if speed is not None:
            speeds.append(speed)
            now = speed if "*" in words else now
    busy = sysroot.number(f"{PCI}/{pci}/gpu_busy_percent")
    return Clock(now, max(speeds), busy) if speeds and now and busy is not None else None


def _free(folder: Path) -> int | None:
    """Bytes free where a folder is or would be."""
    for place in (folder, *folder.parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None
