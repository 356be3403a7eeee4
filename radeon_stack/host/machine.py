"""The facts of this machine that a launch plan depends on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from radeon_stack.errors import MachineError
from radeon_stack.host.boxed import together
from radeon_stack.host.gpus import Gpu, Topology, driver_version, topology
from radeon_stack.host.kfd import numbers
from radeon_stack.host.sysroot import Node, Sysroot, as_number

LOOK_SECONDS = 10
KFD = "/dev/kfd"
DXG = "/dev/dxg"
WSL_LIBRARIES, WSL_BRIDGE = "/usr/lib/wsl/lib", "/opt/rocm/lib/librocdxg.so.1"
WSL_FILES = {
    WSL_LIBRARIES: "Windows' GPU driver brings these libraries into WSL2",
    WSL_BRIDGE: "it leads ROCm to Windows' GPU driver",
}


@dataclass(frozen=True)
class User:
    """Who calls: numbers of the process, and the groups that /etc/group has for that name."""

    uid: int
    gid: int
    groups: frozenset[int]
    name: str = ""


@dataclass(frozen=True)
class Machine:
    """What was found; memory in bytes. `nodes` are the device nodes that a GPU could need, by path."""

    topology: Topology
    nodes: Mapping[str, Node]
    memory: int
    user: User
    kernel: str = ""
    driver: str | None = None
    selinux: bool = False

    @classmethod
    def unknown(cls) -> Machine:
        """A machine of which nothing was found out."""
        return cls(Topology((), 0, (), ()), {}, 0, User(os.getuid(), os.getgid(), frozenset()))

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        return self.topology.gpus

    @property
    def wsl(self) -> bool:
        """Windows' own GPU device, and no KFD: WSL2."""
        return DXG in self.nodes and KFD not in self.nodes


def probe(sysroot: Sysroot | None = None) -> Machine:
    """Look at this machine, or at the tree below `sysroot` in its place. Never an error."""
    sysroot = sysroot or Sysroot()
    paths = [KFD, DXG, *(f"/dev/dri/{name}" for name in sysroot.node_names("/dev/dri"))]
    found = {path: sysroot.node(path) for path in paths}
    return Machine(
        topology=topology(sysroot),
        nodes={path: node for path, node in found.items() if node is not None},
        memory=numbers_in_kib(sysroot.text("/proc/meminfo") or "").get("MemTotal", 0),
        user=_user(sysroot),
        kernel=sysroot.text("/proc/sys/kernel/osrelease") or "",
        driver=driver_version(sysroot),
        selinux=sysroot.text("/sys/fs/selinux/enforce") == "1",
    )


def look(sysroot: Sysroot | None = None) -> Machine:
    """As `probe`, and not waited for without end. MachineError when a file of the kernel does not answer."""
    answers = together({"machine": lambda: probe(sysroot)}, LOOK_SECONDS)
    if "machine" not in answers.found:
        why = answers.broken.get("machine", "a file below /sys or /proc does not answer: a driver hangs")
        raise MachineError(why, where="this machine", remedy="radeon-stack doctor")
    machine: Machine = answers.found["machine"]
    return machine


def boot_id(sysroot: Sysroot) -> str:
    """What tells one boot of this machine from the next: random(4)."""
    return sysroot.text("/proc/sys/kernel/random/boot_id") or ""


def numbers_in_kib(text: str) -> dict[str, int]:
    """`Name: 123 kB` lines in bytes, as /proc/meminfo has them."""
    plain = "\n".join(line.replace(":", " ").removesuffix(" kB") for line in text.splitlines())
    return {name: value << 10 for name, value in numbers(plain + "\n").items()}


def _user(sysroot: Sysroot) -> User:
    if sysroot.live:
        import pwd

        try:
            name = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:  # a container's uid may have no name
            name = ""
        return User(os.getuid(), os.getgid(), frozenset(os.getgroups()) | {os.getgid()}, name)
    told: Any = sysroot.overlay.get("user")
    told = told if isinstance(told, dict) else {}
    uid, gid = (as_number(str(told.get(key, 1000))) or 0 for key in ("uid", "gid"))
    listed = told.get("groups", [])
    groups = (as_number(str(group)) for group in (listed if isinstance(listed, list) else []))
    return User(uid, gid, frozenset(g for g in groups if g is not None) | {gid}, str(told.get("name", "")))
