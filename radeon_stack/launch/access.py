"""The least access with which the chosen GPUs work, in the words of this machine's engine."""

from __future__ import annotations

from dataclasses import dataclass

from radeon_stack.errors import MachineError
from radeon_stack.host.cdi import CdiDevice, cdi_devices, names_for
from radeon_stack.host.engines import EngineProbe
from radeon_stack.host.gpus import Gpu
from radeon_stack.host.machine import DXG, KFD, WSL_BRIDGE, WSL_FILES, WSL_LIBRARIES, Machine
from radeon_stack.host.sysroot import Node, Sysroot
from radeon_stack.launch.plan import Mount

# ROCm's variables that choose among GPUs; they stack, each counting in what the one before left.
VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
WSL_BRIDGE_INSIDE = "/usr/lib/x86_64-linux-gnu/librocdxg.so"
KEEP_GROUPS = "keep-groups"


@dataclass(frozen=True)
class Access:
    """What a container is given to reach its GPUs, and why."""

    devices: tuple[str, ...]
    devices_why: str
    groups: tuple[str, ...]
    groups_why: str
    user: str
    user_why: str
    security: tuple[str, ...]
    security_why: str
    env: tuple[tuple[str, str, str], ...] = ()
    """Name, value, reason."""
    mounts: tuple[Mount, ...] = ()


def container_access(machine: Machine, gpus: tuple[Gpu, ...], engine: EngineProbe, sysroot: Sysroot) -> Access:
    """MachineError when this engine cannot give a container these GPUs."""
    if gpus and engine.desktop:
        raise MachineError(
            "Docker Desktop runs containers in a virtual machine of its own, which has no /dev/kfd",
            where="--engine docker",
            remedy="use the machine's own engine: export DOCKER_HOST=unix:///var/run/docker.sock, or --engine local",
        )
    devices, why_devices = _devices(machine, gpus, engine, cdi_devices(sysroot), sysroot)
    nodes = [] if machine.wsl else [_node(machine, path) for path in _paths(gpus)]
    groups, why_groups = _groups(machine, nodes, engine)
    user, why_user = _user(machine, engine)
    labels = engine.selinux and machine.selinux
    windows = bool(gpus) and machine.wsl
    return Access(
        devices=devices,
        devices_why=why_devices,
        groups=groups,
        groups_why=why_groups,
        user=user,
        user_why=why_user,
        security=("no-new-privileges", *(("label=disable",) if labels else ())),
        security_why="nothing inside can gain rights"
        + ("; SELinux: your folders keep their labels, which a container may not read otherwise" if labels else ""),
        env=_windows_env() if windows else (),
        mounts=_windows_mounts(sysroot) if windows else (),
    )


def local_env(machine: Machine, gpus: tuple[Gpu, ...]) -> tuple[tuple[tuple[str, str, str], ...], tuple[str, ...]]:
    """For a process without a container: the variable that shows it its GPUs, and those it must not inherit.

    MachineError when the caller may not open a GPU's nodes. Source of the count: libhsakmt's topology.c, which leaves
    a GPU out whose render node is not there.
    """
    if not machine.gpus or any(gpu.node < 0 for gpu in gpus):
        return (), ()
    for path in _paths(gpus):
        if not _node(machine, path).usable:
            raise MachineError(
                f"{path} is not yours to open",
                where="--engine local",
                remedy="sudo usermod -aG render,video $USER, then log in again; or --engine docker",
            )
    first, *others = VISIBLE
    counted = [gpu for gpu in machine.gpus if gpu.render_node in machine.nodes]
    numbers = ",".join(str(counted.index(gpu)) for gpu in gpus)
    reason = "the chosen GPUs, by their place in the kernel's order; no other variable counts on top of it"
    if not gpus:
        reason = "none: the recipe takes no GPU"
    return ((first, numbers, reason),), tuple(others)


def _paths(gpus: tuple[Gpu, ...]) -> list[str]:
    return [KFD, *(gpu.render_node for gpu in gpus)] if gpus else []


def _node(machine: Machine, path: str) -> Node:
    if path not in machine.nodes:
        raise MachineError(f"there is no device node {path}", where="--gpus", remedy="see why: radeon-stack doctor")
    return machine.nodes[path]


def _devices(
    machine: Machine, gpus: tuple[Gpu, ...], engine: EngineProbe, devices: tuple[CdiDevice, ...], sysroot: Sysroot
) -> tuple[tuple[str, ...], str]:
    if not gpus:
        return (), "no GPU is passed"
    if machine.wsl:
        return (DXG,), "WSL2: Windows' own GPU device, in place of /dev/kfd"
    names = names_for(gpus, devices, sysroot) if engine.cdi else None
    if names:
        return (
            names,
            "CDI names, which mean exactly /dev/kfd and the chosen cards' nodes in this machine's specification",
        )
    unfit = "; the CDI specification does not fit them: sudo amd-ctk cdi generate" if engine.cdi and devices else ""
    return tuple(_paths(gpus)), f"the compute interface and the chosen render nodes, no other{unfit}"


def _groups(machine: Machine, nodes: list[Node], engine: EngineProbe) -> tuple[tuple[str, ...], str]:
    if not nodes:
        return (), "no device needs one"
    numbers = sorted({node.gid for node in nodes})
    if not engine.rootless:
        return tuple(map(str, numbers)), "the device nodes' own numbers: names mean others inside"
    closed = [node for node in nodes if node.mode & 0o006 != 0o006]
    if engine.product == "podman":
        without = [node.path for node in nodes if not node.usable]
        if without:
            raise MachineError(
                f"{without[0]} is not yours to open, and rootless podman gives a container no more than you have",
                where="--gpus",
                remedy="sudo usermod -aG render,video $USER, then log in again",
            )
        return (KEEP_GROUPS,), "rootless podman: the process keeps your own groups, which the device nodes ask for"
    if closed:
        raise MachineError(
            f"rootless Docker drops your groups, so that a container cannot open {closed[0].path}",
            where="--engine docker",
            remedy="use rootless podman (DOCKER_HOST=unix:///run/user/$UID/podman/podman.sock), Docker with root, "
            "or --engine local",
        )
    return (), "rootless Docker knows no group of yours; these nodes are open to everyone"


def _user(machine: Machine, engine: EngineProbe) -> tuple[str, str]:
    """The user with whom who calls owns what is written."""
    if engine.rootless:
        return "0:0", "rootless: number 0 inside is you outside, with your rights and no more"
    return f"{machine.user.uid}:{machine.user.gid}", "the caller, so that the caller owns what is written"


def _windows_env() -> tuple[tuple[str, str, str], ...]:
    return (
        ("HSA_ENABLE_DXG_DETECTION", "1", "WSL2: ROCm looks for /dev/dxg"),
        ("LD_LIBRARY_PATH", WSL_LIBRARIES, "WSL2: Windows' GPU libraries"),
    )


def _windows_mounts(sysroot: Sysroot) -> tuple[Mount, ...]:
    for path, what in WSL_FILES.items():
        if not sysroot.exists(path):
            raise MachineError(
                f"there is no {path}: {what}", where="--gpus", remedy="see how to get it: docs/doctor.md#rs118"
            )
    return (
        Mount(WSL_LIBRARIES, WSL_LIBRARIES, read_only=True),
        Mount(WSL_BRIDGE, WSL_BRIDGE_INSIDE, read_only=True),
    )
