"""Is there a GPU, is its driver there, and may this user open it?"""

from __future__ import annotations

from radeon_stack.host.checks.finding import Check, Finding, Fix, as_root, fail, ok, skipped, warn
from radeon_stack.host.facts import Facts
from radeon_stack.host.machine import DXG, KFD
from radeon_stack.host.sysroot import Node

NONE = "no AMD GPU in this machine"
NO_NODES = "no GPU that ROCm sees"
VIRTUAL = ("QEMU", "VMware", "innotek", "Xen", "Microsoft Corporation", "Amazon EC2", "Google", "Parallels")


def readable(facts: Facts) -> Finding:
    """A read that never comes back is a driver that hangs. What cannot be made sense of is told too."""
    if facts.broken:
        said = "; ".join(f"{name}: {why}" for name, why in sorted(facts.broken.items()))
        return (fail if "files" in facts.broken else warn)(f"this could not be made out ({said}); please tell us")
    if "files" not in facts.late:
        return ok("this machine's files answer")
    return fail(
        "a file below /sys or /proc does not answer: a driver hangs; nothing more can be said of the GPUs",
        as_root(facts, "dmesg | tail -50"),
        as_root(facts, "reboot"),
    )


def present(facts: Facts) -> Finding:
    """AMD's GPUs, as KFD lists them; else those on the PCI bus, which a driver has yet to take.

    Without any this machine still trains: presets for the CPU are the same code on a small model.
    """
    found, gpus = facts.machine.topology.pci, facts.machine.gpus
    if facts.machine.wsl:
        return ok("WSL2: a GPU of Windows', of which WSL tells no name")
    if gpus:
        return ok("; ".join(f"{gpu.index}: {gpu.name} ({gpu.gfx}, {gpu.memory / 2**30:.1f} GiB)" for gpu in gpus))
    if found:
        return ok(f"{len(found)} on the PCI bus: " + ", ".join(f"{gpu.address} ({gpu.pci_id})" for gpu in found))
    return skipped(f"{NONE}; presets for the CPU work without one: radeon-stack run train-llama --preset demo")


def driver(facts: Facts) -> Finding:
    """Is amdgpu loaded, and has it taken the card? It is part of Linux; AMD's package (amdgpu-dkms) is a newer one.

    A card held by vfio-pci is kept for a virtual machine.
    """
    if not _expected(facts):
        return skipped(NONE if not facts.machine.wsl else "WSL2: the driver is Windows'")
    cards = facts.machine.topology.pci
    others = [gpu for gpu in cards if gpu.driver not in ("", "amdgpu")]
    bare = [gpu for gpu in cards if not gpu.driver]
    if cards and len(others) == len(cards):
        passed_on = others[0].driver == "vfio-pci"
        why = "is kept for a virtual machine (vfio-pci)" if passed_on else f"has the driver {others[0].driver}"
        return warn(f"{others[0].address} {why}, with which ROCm does not work")
    if not facts.module:
        load = Fix(("modprobe", "amdgpu"), ("modprobe", "-r", "amdgpu"))
        return fail("the amdgpu module is not loaded", as_root(facts, "modprobe amdgpu"), fixes=(load,))
    if bare and len(bare) + len(others) == len(cards):
        return fail(
            f"amdgpu is loaded and has not taken {bare[0].address}",
            as_root(facts, "dmesg | grep -i amdgpu | tail -20"),
        )
    version = f"AMD's package, {facts.machine.driver}" if facts.machine.driver else f"of Linux {facts.machine.kernel}"
    return ok(f"amdgpu, {version}")


def topology(facts: Facts) -> Finding:
    """KFD, the compute part of the driver, has a node for each GPU: without one ROCm sees nothing.

    A node that cannot be read belongs to a card that this container was not given, or to a driver in trouble.
    """
    if not _expected(facts):
        return skipped(NONE if not facts.machine.wsl else "WSL2 has no KFD")
    problems = [*facts.machine.topology.problems]
    problems += [f"GPU {gpu.index}: {gpu.problem}" for gpu in facts.machine.gpus if gpu.problem]
    if problems and not any(not gpu.problem for gpu in facts.machine.gpus):
        return fail("; ".join(problems), as_root(facts, "dmesg | grep -i kfd | tail -20"))
    if problems:
        return warn("; ".join(problems))
    if not facts.machine.gpus:
        if not facts.module:
            return skipped("no driver, so no KFD (RS102)")
        inside = f"; this is a virtual machine ({facts.vendor}), see RS-KI-021" if _virtual(facts) else ""
        return fail(
            f"the driver is loaded, and KFD lists no GPU{inside}",
            as_root(facts, "dmesg | grep -iE 'amdgpu|kfd' | tail -20"),
        )
    return ok(f"{len(facts.machine.gpus)} GPU node(s) beside {facts.machine.topology.cpus} CPU node(s)")


def kfd_exists(facts: Facts) -> Finding:
    """/dev/kfd is the door to all compute; one for all GPUs. On WSL2 /dev/dxg is in its place."""
    if facts.machine.wsl:
        return ok(f"WSL2: {DXG} in its place")
    if not _expected(facts):
        return skipped(NONE)
    if KFD in facts.machine.nodes:
        return ok(_owned(facts.machine.nodes[KFD]))
    if not facts.module:
        return skipped("no driver, so no /dev/kfd (RS102)")
    return fail("there is no /dev/kfd", as_root(facts, "dmesg | grep -i kfd | tail -20"))


def kfd_usable(facts: Facts) -> Finding:
    """May you open /dev/kfd? Its group is `render` on most systems.

    An engine with root gives containers that group by its number, so only runs without a container need yours.
    """
    node = facts.machine.nodes.get(KFD)
    return skipped("no /dev/kfd") if node is None else _usable(facts, [node])


def render_nodes_exist(facts: Facts) -> Finding:
    """Each GPU has a render node, /dev/dri/renderD128 and on; udev makes it."""
    gpus = [gpu for gpu in facts.machine.gpus if gpu.render_node]
    if not gpus:
        return skipped(NO_NODES)
    missing = [gpu for gpu in gpus if gpu.render_node not in facts.machine.nodes]
    if missing:
        return fail(
            f"GPU {missing[0].index} has no {missing[0].render_node}",
            as_root(facts, "udevadm trigger --subsystem-match=drm"),
        )
    return ok(", ".join(gpu.render_node for gpu in gpus))


def render_nodes_usable(facts: Facts) -> Finding:
    """May you open the render nodes? As for /dev/kfd."""
    nodes = [
        facts.machine.nodes[gpu.render_node] for gpu in facts.machine.gpus if gpu.render_node in facts.machine.nodes
    ]
    return _usable(facts, nodes) if nodes else skipped(NO_NODES)


def groups(facts: Facts) -> Finding:
    """Are you in the groups of the device nodes: by /etc/group, and in this login?

    Groups are given at login: a membership that is newer than it does not count yet.
    """
    user = facts.machine.user
    wanted = {node.gid for path, node in facts.machine.nodes.items() if path == KFD or "/renderD" in path}
    wanted -= {0}
    if not wanted:
        return skipped(NO_NODES)
    names = {group.gid: name for name, group in facts.groups.items()}
    lacking = sorted(wanted - user.groups)
    if not lacking or user.uid == 0:
        return ok("in " + ", ".join(names.get(gid, str(gid)) for gid in sorted(wanted)) if user.uid else "root")
    told = [gid for gid in lacking if gid in names and user.name in facts.groups[names[gid]].members]
    if len(told) == len(lacking):
        return warn(
            f"{user.name} is in {_named(lacking, names)}, and this login is older: log out and in again",
            f"newgrp {names[lacking[0]]}",
        )
    nodes = [node for path, node in facts.machine.nodes.items() if path == KFD or "/renderD" in path]
    missing = _named(lacking, names)
    join = tuple(
        Fix(("usermod", "-aG", names[g], user.name), ("gpasswd", "-d", user.name, names[g]))
        for g in lacking
        if g in names and user.name
    )
    said = f"not in {missing}, to which the device nodes belong; after joining, log out and in again"
    commands = _join(facts, lacking)
    rootful = facts.engine is not None and facts.engine.answers and not facts.engine.rootless
    if all(node.usable for node in nodes) or rootful:
        # A rootful engine gives containers the groups itself.
        return warn(f"{said}; containers of an engine with root work without", *commands, fixes=join)
    return fail(said, *commands, fixes=join)


def integrated(facts: Facts) -> Finding:
    """A processor's own GPU beside a card is left out of runs: libraries have no code for it, and programs crash.

    `--gpus NUMBER` takes it nevertheless. A Strix Halo's GPU is a card like any other.
    """
    both = [gpu for gpu in facts.machine.gpus if gpu.integrated]
    if not both or len(both) == len(facts.machine.gpus):
        return skipped("no integrated GPU beside a card")
    which = f"GPU {both[0].index} ({both[0].gfx})"
    return ok(f"{which} is integrated: left out of runs, since programs that use all GPUs crash on it (RS-KI-018)")


def _expected(facts: Facts) -> bool:
    """Is there a card that a driver of Linux should have?"""
    return bool(facts.machine.topology.pci or facts.machine.gpus) and not facts.machine.wsl


def _virtual(facts: Facts) -> bool:
    return facts.vendor.startswith(VIRTUAL)


def _owned(node: Node) -> str:
    return f"{node.path} (group {node.gid}, mode {node.mode:o})"


def _usable(facts: Facts, nodes: list[Node]) -> Finding:
    closed = [node for node in nodes if not node.usable]
    if not closed:
        return ok(", ".join(node.path for node in nodes) + ": open to you")
    said = f"{_owned(closed[0])} is not open to you"
    if facts.machine.user.uid == 0:
        return fail(f"{said}, though you are root: this is a container that was not given it")
    engine = facts.engine
    if engine is not None and engine.answers and not engine.rootless and not engine.desktop:
        return warn(f"{said}; containers of {engine.what} are given its group, only --engine local is not (RS109)")
    return fail(f"{said} (RS109)", *_join(facts, sorted({node.gid for node in closed} - {0})))


def _join(facts: Facts, gids: list[int]) -> list[str]:
    """How to become a member; a group that has a number only is given a name first, as udev would have."""
    names = {group.gid: name for name, group in facts.groups.items()}
    make = [f"groupadd --gid {gid} radeon{gid}" for gid in gids if gid not in names]
    mine = ",".join(names.get(gid, f"radeon{gid}") for gid in gids)
    return [as_root(facts, command) for command in (*make, *([f"usermod -aG {mine} $USER"] if gids else []))]


def _named(gids: list[int], names: dict[int, str]) -> str:
    return ",".join(names.get(gid, str(gid)) for gid in gids)


CHECKS = (
    Check("RS100", "files of the kernel", readable),
    Check("RS101", "AMD GPU", present),
    Check("RS102", "amdgpu driver", driver),
    Check("RS104", "KFD topology", topology),
    Check("RS105", "/dev/kfd", kfd_exists),
    Check("RS106", "/dev/kfd may be opened", kfd_usable),
    Check("RS107", "render nodes", render_nodes_exist),
    Check("RS108", "render nodes may be opened", render_nodes_usable),
    Check("RS109", "groups", groups),
    Check("RS111", "integrated GPU", integrated),
)
