"""CDI specifications: names for devices that an engine can resolve itself (`amd.com/gpu=0`).

Format: the Container Device Interface specification, SPEC.md, `cdiVersion` 0.3 to 1.0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from radeon_stack.host.gpus import DRM, Gpu
from radeon_stack.host.sysroot import Sysroot

FOLDERS = ("/etc/cdi", "/var/run/cdi")
KIND = "amd.com/gpu"
KFD, ALL = "/dev/kfd", "all"


@dataclass(frozen=True)
class CdiDevice:
    """One named device: the nodes it brings, `plain` when it brings nothing else (no hook, mount or variable)."""

    name: str
    nodes: frozenset[str]
    plain: bool


def cdi_devices(sysroot: Sysroot) -> tuple[CdiDevice, ...]:
    """What the machine's JSON specifications say of AMD's GPUs; a damaged one says nothing.

    Of two with one name the later folder's counts.
    """
    found: dict[str, CdiDevice] = {}
    for folder in FOLDERS:
        for name in sysroot.names(folder):
            if name.endswith(".json"):
                found |= {device.name: device for device in _devices(sysroot.text(f"{folder}/{name}") or "")}
    return tuple(found.values())


def names_for(gpus: tuple[Gpu, ...], devices: tuple[CdiDevice, ...], sysroot: Sysroot) -> tuple[str, ...] | None:
    """The CDI names that give exactly these GPUs and nothing else; None when the specification does not fit them."""
    names = []
    for gpu in gpus:
        least = {KFD, gpu.render_node}
        most = least | _card_nodes(gpu, sysroot)
        # Where there is one GPU, `all` means the same.
        fitting = sorted((d.name == ALL, d.name) for d in devices if d.plain and least <= d.nodes <= most)
        if not fitting:
            return None
        names.append(f"{KIND}={fitting[0][1]}")
    return tuple(names)


def _card_nodes(gpu: Gpu, sysroot: Sysroot) -> set[str]:
    """The card nodes of the same DRM device; a partition has one of its own."""
    folder = f"{DRM}/{gpu.render_node.rpartition('/')[2]}/device/drm"
    return {f"/dev/dri/{name}" for name in sysroot.names(folder) if name.startswith("card")}


def _devices(text: str) -> list[CdiDevice]:
    try:
        spec = json.loads(text)
        if spec["kind"] != KIND:
            return []
        common, plain = _edits(spec.get("containerEdits") or {})
        found = []
        for device in spec["devices"]:
            nodes, own = _edits(device.get("containerEdits") or {})
            found.append(CdiDevice(str(device["name"]), common | nodes, plain and own))
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _edits(edits: dict[str, Any]) -> tuple[frozenset[str], bool]:
    listed = edits.get("deviceNodes") or []
    # A node may be found on the host under another path than the container sees.
    same = all(node.get("hostPath", node["path"]) == node["path"] for node in listed)
    others = [key for key, value in edits.items() if key != "deviceNodes" and value]
    return frozenset(str(node["path"]) for node in listed), same and not others
