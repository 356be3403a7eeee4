"""The facts of a machine in one file, to be diagnosed elsewhere: what was read, without names and serials."""

from __future__ import annotations

import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from radeon_stack import atomic
from radeon_stack.errors import UsageError
from radeon_stack.host.facts import Facts
from radeon_stack.host.machine import WSL_FILES
from radeon_stack.host.sysroot import OVERLAY, Sysroot

MOST_BYTES = 16 << 20
MOST_MEMBERS = 4096
KERNEL_WORDS = re.compile(
    r"^(iommu|amd_iommu|intel_iommu|amdgpu\.|pci(e_aspm)?|modprobe\.blacklist|ttm\.|quiet$|ro$|rw$)"
)
UNIQUE = re.compile(r"^(unique_id )(\d+)$", re.MULTILINE)
ME = "me"


def pack(facts: Facts, sysroot: Sysroot, file: Path) -> list[str]:
    """Write the bundle; returns the names in it. Whatever is in it can be read with `tar` before it is sent."""
    members = {path.lstrip("/"): redacted(path, text, facts) for path, text in sorted(sysroot.seen.items())}
    members.pop(OVERLAY, None)
    if facts.machine.wsl:
        # That they are there is all that counts.
        members |= {path.lstrip("/"): "" for path in WSL_FILES if path not in facts.wsl_missing}
    links = {f"{gpu.address}": gpu.driver for gpu in facts.machine.topology.pci if gpu.driver}
    members[OVERLAY] = json.dumps(overlay(facts), indent=1, sort_keys=True)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, text in members.items():
            body = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
        for address, driver in links.items():
            link = tarfile.TarInfo(f"sys/bus/pci/devices/{address}/driver")
            link.type, link.linkname = tarfile.SYMTYPE, f"../../drivers/{driver}"
            archive.addfile(link)
    atomic.write_bytes(file, data.getvalue())
    return sorted(members)


def overlay(facts: Facts) -> dict[str, Any]:
    """What is no file: nodes, the caller's numbers, the engine's answers. No name of a person, host or registry."""
    machine, engine = facts.machine, facts.engine
    told: dict[str, Any] = {
        "nodes": {
            node.path: {"uid": node.uid, "gid": node.gid, "mode": f"{node.mode:o}", "usable": node.usable}
            for node in machine.nodes.values()
        },
        "user": {"uid": machine.user.uid, "gid": machine.user.gid, "groups": sorted(machine.user.groups), "name": ME},
        "environment": dict(facts.environment),
        "programs": sorted(facts.programs),
        "home_free": facts.home_free,
        "shm": facts.shm,
    }
    if engine is None:
        return told
    reason = "permission denied" if engine.denied else "no such file" if engine.absent else "it says nothing"
    security = [f"name={name}" for name in ("rootless", "selinux") if getattr(engine, name)]
    told["engine"] = {
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
        "images": [
            {
                "name": f"{i.kind}:{i.gfx or 'cpu'}",
                "kind": i.kind,
                "rocm": i.rocm,
                "gfx": i.gfx,
                "drivers": list(i.drivers),
            }
            for i in facts.images or ()
        ],
    }
    return told


def redacted(path: str, text: str, facts: Facts) -> str:
    """A file's text without what names a person, a disk or a single piece of hardware."""
    if path == "/proc/cmdline":
        return " ".join(word for word in text.split() if KERNEL_WORDS.match(word))
    if path == "/etc/group":
        lines = (line.split(":") for line in text.splitlines())
        kept = (f for f in lines if len(f) == 4 and f[0] in ("render", "video", "docker"))
        name = facts.machine.user.name
        return "".join(f"{f[0]}:x:{f[2]}:{ME if name and name in f[3].split(',') else ''}\n" for f in kept)
    if path.startswith("/usr/share/"):
        return ""
    numbers: dict[str, int] = {}
    # Two cards stay two: each id is replaced by a number of its own.
    return UNIQUE.sub(lambda m: m[1] + str(numbers.setdefault(m[2], len(numbers) + 1)) if m[2] != "0" else m[0], text)


@contextmanager
def opened(place: Path) -> Iterator[Sysroot]:
    """The sysroot of `--sysroot`: a folder as it is, a bundle unpacked for as long as it is looked at."""
    if place.is_dir():
        yield Sysroot(place)
        return
    if not place.exists():
        raise UsageError(
            f"nothing at {place}", where="--sysroot", remedy="a folder, or a file of: doctor --bundle FILE"
        )
    with tempfile.TemporaryDirectory(prefix="radeon-stack-") as folder:
        _unpack(place, Path(folder))
        yield Sysroot(Path(folder))


def _unpack(file: Path, folder: Path) -> None:
    """Files and links of a bundle, bounded; nothing of it lands outside the folder."""
    try:
        with tarfile.open(file, "r:gz") as archive:
            total = 0
            for number, member in enumerate(archive):
                total += member.size
                if number > MOST_MEMBERS or total > MOST_BYTES:
                    raise UsageError("too large for a bundle", where=str(file))
                if member.isreg() or member.issym():
                    archive.extract(member, folder, filter="data")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UsageError(f"is no bundle: {error}", where=str(file), remedy="make one: doctor --bundle FILE") from error
