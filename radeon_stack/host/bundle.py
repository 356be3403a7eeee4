"""The facts of a machine in one file, to be diagnosed elsewhere: what was read, without names and serials."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from radeon_stack import atomic
from radeon_stack.errors import UsageError
from radeon_stack.host.cdi import FOLDERS, KIND, CdiDevice
from radeon_stack.host.engines import EngineProbe
from radeon_stack.host.facts import Facts
from radeon_stack.host.sysroot import OVERLAY, Sysroot

MOST_BYTES = 16 << 20
MOST_MEMBERS = 4096
KERNEL_WORDS = re.compile(
    r"^(iommu|amd_iommu|intel_iommu|amdgpu\.|pci(e_aspm)?|modprobe\.blacklist|ttm\.|quiet$|ro$|rw$)"
)
UNIQUE = re.compile(r"^(unique_id )(\d+)$", re.MULTILINE)
SERIAL = re.compile(r"GPU-([0-9A-Fa-f]+)")
ME = "me"
CDI_FILE = "/etc/cdi/amd.json"
LEFT_OUT = (f"/{OVERLAY}", OVERLAY, "/dev/", *(f"{folder}/" for folder in FOLDERS), "/usr/share/")
"""Not packed as they are: nodes are told by the overlay, CDI anew, names of cards are ours."""


def pack(facts: Facts, sysroot: Sysroot, file: Path) -> list[str]:
    """Write the bundle; returns the names in it. Whatever is in it can be read with `tar` before it is sent."""
    redactor = Redactor(facts)
    texts = {
        path: redactor.text(path, text) for path, text in sorted(sysroot.seen.items()) if not path.startswith(LEFT_OUT)
    }
    if facts.cdi:
        texts[CDI_FILE] = json.dumps(specification(facts.cdi), indent=1)
    texts[f"/{OVERLAY}"] = json.dumps(overlay(facts, redactor), indent=1, sort_keys=True)
    names = sorted(path for path in sysroot.there - texts.keys() if not path.startswith(LEFT_OUT))
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name in names:
            # That it is there is all that counts of it.
            member = tarfile.TarInfo(name.lstrip("/"))
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(member)
        for path, text in texts.items():
            body = text.encode(errors="replace")
            member = tarfile.TarInfo(path.lstrip("/"))
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
        for gpu in facts.machine.topology.pci:
            link = tarfile.TarInfo(f"sys/bus/pci/devices/{gpu.address}/driver")
            link.type, link.linkname = tarfile.SYMTYPE, f"../../drivers/{gpu.driver}"
            if gpu.driver:
                archive.addfile(link)
    atomic.write_bytes(file, data.getvalue())
    return sorted(path.lstrip("/") for path in texts)


@dataclass
class Redactor:
    """Takes out what names a person, a disk or a single piece of hardware; two cards stay two."""

    facts: Facts
    numbers: dict[str, int] = field(default_factory=dict)

    def text(self, path: str, text: str) -> str:
        """A file's text."""
        if path == "/proc/cmdline":
            return " ".join(word for word in text.split() if KERNEL_WORDS.match(word))
        if path == "/etc/group":
            lines = (line.split(":") for line in text.splitlines())
            kept = (f for f in lines if len(f) == 4 and f[0] in ("render", "video", "docker"))
            name = self.facts.machine.user.name
            return "".join(f"{f[0]}:x:{f[2]}:{ME if name and name in f[3].split(',') else ''}\n" for f in kept)
        return UNIQUE.sub(lambda m: m[1] + (str(self._number(m[2])) if m[2] != "0" else "0"), text)

    def variable(self, name: str, value: str) -> str:
        """An environment variable's value: cards by their number, an engine's address without its host or folder."""
        if name == "DOCKER_HOST":
            return value.partition("://")[0] + "://" + ("podman" if "podman" in value else "engine")
        return SERIAL.sub(lambda m: f"GPU-{self._number(m[1].lower())}", value)

    def _number(self, serial: str) -> int:
        return self.numbers.setdefault(serial, len(self.numbers) + 1)


def specification(devices: tuple[CdiDevice, ...]) -> dict[str, Any]:
    """A CDI specification with these names and nodes, and nothing else of the machine's own."""
    told = [
        {
            "name": device.name,
            "containerEdits": {"deviceNodes": [{"path": node} for node in sorted(device.nodes)]}
            | ({} if device.plain else {"hooks": [{"path": "/left-out"}]}),
        }
        for device in devices
    ]
    return {"cdiVersion": "0.6.0", "kind": KIND, "devices": told}


def overlay(facts: Facts, redactor: Redactor) -> dict[str, Any]:
    """What is no file: nodes, the caller's numbers, the engine's answers. No name of a person, host or registry."""
    machine, engine = facts.machine, facts.engine
    told: dict[str, Any] = {
        "nodes": {
            node.path: {"uid": node.uid, "gid": node.gid, "mode": f"{node.mode:o}", "usable": node.usable}
            for node in machine.nodes.values()
        },
        "user": {"uid": machine.user.uid, "gid": machine.user.gid, "groups": sorted(machine.user.groups), "name": ME},
        "environment": {name: redactor.variable(name, value) for name, value in facts.environment.items()},
        "programs": sorted(facts.programs),
        "late": sorted(facts.late),
        "systemd": facts.systemd,
        "keeps_groups": facts.keeps_groups,
        "packages_missing": None if facts.packages_missing is None else list(facts.packages_missing),
        "home_free": facts.home_free,
        "shm": facts.shm,
    }
    return told if engine is None else told | {"engine": _engine(facts, engine)}


def _engine(facts: Facts, engine: EngineProbe) -> dict[str, Any]:
    reason = "permission denied" if engine.denied else "no such file" if engine.absent else "it says nothing"
    security = [f"name={name}" for name in ("rootless", "selinux") if getattr(engine, name)]
    images = [
        {"name": f"{i.kind}:{i.gfx or 'cpu'}", "kind": i.kind, "rocm": i.rocm, "gfx": i.gfx, "drivers": list(i.drivers)}
        for i in facts.images or ()
    ]
    return {
        "why_not": engine.why_not and f"no container engine answers ({reason})",
        "version": {
            "Version": engine.version,
            "ApiVersion": engine.api,
            "Components": [{"Name": "Podman Engine" if engine.product == "podman" else "Engine"}],
        },
        "info": {
            "Driver": engine.storage,
            "DockerRootDir": "/var/lib/docker" if engine.root else "",
            "OperatingSystem": "Docker Desktop" if engine.desktop else "Linux",
            "SecurityOptions": security,
            "CDISpecDirs": ["/etc/cdi"] if engine.cdi else [],
        },
        "buildkit": facts.buildkit,
        "buildx": facts.buildx,
        "free": facts.engine_free,
        "images": None if facts.images is None else images,
    }


def is_here(told: str) -> bool:
    """Does `--sysroot` mean this machine itself?"""
    return bool(told) and os.path.realpath(told) == os.path.realpath("/")


@contextmanager
def opened(told: str) -> Iterator[Sysroot]:
    """The sysroot of `--sysroot`: a folder as it is, a bundle unpacked for as long as it is looked at."""
    if not told:
        raise UsageError("is empty", where="--sysroot", remedy="a folder, or a file of: doctor --bundle FILE")
    place = Path(told)
    if is_here(told):
        yield Sysroot()
    elif place.is_dir():
        if not any((place / name).exists() for name in ("sys", "proc", OVERLAY)):
            raise UsageError(f"{place} is no machine's tree: it has neither sys nor proc", where="--sysroot")
        yield Sysroot(place)
    elif place.is_file():
        with tempfile.TemporaryDirectory(prefix="radeon-stack-") as folder:
            _unpack(place, Path(folder))
            yield Sysroot(Path(folder))
    else:
        found = "it is neither a folder nor a file" if place.exists() else "nothing is there"
        raise UsageError(f"{place}: {found}", where="--sysroot", remedy="a folder, or a file of: doctor --bundle FILE")


def _unpack(file: Path, folder: Path) -> None:
    """Files and links of a bundle, bounded; nothing of it lands outside the folder."""
    try:
        with tarfile.open(file, "r:gz") as archive:
            total = 0
            for number, member in enumerate(archive):
                total += member.size
                if number > MOST_MEMBERS or total > MOST_BYTES:
                    raise UsageError("too large for a bundle", where=str(file))
                _unpack_member(archive, member, Path(os.path.realpath(folder)))
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UsageError(f"is no bundle: {error}", where=str(file), remedy="make one: doctor --bundle FILE") from error
    if not (folder / OVERLAY).is_file():
        raise UsageError(f"is no bundle: it lacks {OVERLAY}", where=str(file), remedy="make one: doctor --bundle FILE")


def _unpack_member(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """By hand, for Python's own filter came with 3.11.4. Nothing is written through a link, and nothing twice."""
    *above, last = Path(member.name.lstrip("/")).parts or ("",)
    if ".." in (*above, last):
        raise ValueError(f"{member.name!r} leads out of it")
    place = folder
    for part in above:
        place /= part
        if place.is_symlink():
            raise ValueError(f"{member.name!r} is below a link")
        place.mkdir(exist_ok=True)
    place /= last
    if member.isdir():
        place.mkdir(exist_ok=True)
    elif member.issym():
        if not Path(os.path.realpath(place.parent / member.linkname)).is_relative_to(folder):
            raise ValueError(f"the link {member.name!r} leads out of it")
        place.symlink_to(member.linkname)
    elif member.isreg() and (source := archive.extractfile(member)):
        with place.open("xb") as stream:
            stream.write(source.read())
