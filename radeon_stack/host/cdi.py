"""CDI specifications: names for devices that an engine can resolve itself (`amd.com/gpu=0`).

Format: the Container Device Interface specification, SPEC.md, `cdiVersion` 0.3 to 1.0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from radeon_stack.host.gpus import PCI, Gpu
from radeon_stack.host.sysroot import Sysroot

FOLDERS = ("/etc/cdi", "/var/run/cdi")
KIND = "amd.com/gpu"
SHARED = frozenset({"/dev/kfd"})


@dataclass(frozen=True)
class CdiDevice:
    """One named device: the nodes it brings, `plain` when it brings nothing else (no hook, mount or variable)."""

    name: str
    nodes: frozenset[str]
    plain: bool


def cdi_devices(sysroot: Sysroot) -> tuple[CdiDevice, ...]:
    """What the machine's JSON specifications say of AMD's GPUs; a damaged one says nothing."""
    found = []
    for folder in FOLDERS:
        for name in sysroot.names(folder):
            if name.endswith(".json"):
                found += _devices(sysroot.text(f"{folder}/{name}") or "")
    return tuple(found)


def names_for(gpus: tuple[Gpu, ...], devices: tuple[CdiDevice, ...], sysroot: Sysroot) -> tuple[str, ...] | None:
    """The CDI names that give exactly these GPUs and nothing else; None when the specification does not fit them."""
    names = []
    for gpu in gpus:
        own = SHARED | {gpu.render_node, *_card_nodes(gpu, sysroot)}
        fitting = [d.name for d in devices if d.plain and gpu.render_node in d.nodes and d.nodes <= own]
        if len(fitting) != 1 or "/dev/kfd" not in next(d.nodes for d in devices if d.name == fitting[0]):
            return None
        names.append(f"{KIND}={fitting[0]}")
    return tuple(names)


def _card_nodes(gpu: Gpu, sysroot: Sysroot) -> set[str]:
    if gpu.partition is not None:
        return set()  # a card node is the whole card's
    return {f"/dev/dri/{name}" for name in sysroot.names(f"{PCI}/{gpu.pci}/drm") if name.startswith("card")}


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
