"""KFD's topology as the kernel gives it: one node per CPU package and per compute GPU (or partition of one).

Sources: include/uapi/linux/kfd_sysfs.h (heap and link types) and drivers/gpu/drm/amd/amdkfd/kfd_topology.c of Linux.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from radeon_stack.host.sysroot import Sysroot, as_number

TOPOLOGY = "/sys/class/kfd/kfd/topology/nodes"
VRAM_VISIBLE, VRAM_HIDDEN = 1, 2  # HSA_MEM_HEAP_TYPE_FB_PUBLIC: the CPU sees it (large BAR); FB_PRIVATE
LINKS = {2: "pcie", 11: "xgmi"}  # HSA_IOLINK_TYPE_*
LINK_FOLDERS = ("io_links", "p2p_links")
MOST_NODES = 256  # four sockets and eight MI300X in CPX are 68


@dataclass(frozen=True)
class Link:
    """A connection to another node; `weight` is the kernel's distance (smaller is nearer)."""

    to: int
    kind: str
    weight: int


@dataclass(frozen=True)
class KfdNode:
    """One node. `properties` are the kernel's numbers by their names, `memory` bytes by heap type."""

    number: int
    gpu_id: int
    properties: Mapping[str, int]
    memory: Mapping[int, int]
    links: tuple[Link, ...]
    problem: str = ""

    def get(self, name: str) -> int:
        """A property, 0 when the kernel does not tell it."""
        return self.properties.get(name, 0)

    @property
    def has_cpu(self) -> bool:
        return self.get("cpu_cores_count") > 0

    @property
    def has_gpu(self) -> bool:
        """True too for the one node that an old APU's CPU and GPU share."""
        return self.get("simd_count") > 0 or self.gpu_id > 0


def nodes(sysroot: Sysroot) -> list[KfdNode]:
    """The nodes in the kernel's order; a node that cannot be read tells its problem."""
    return [_node(sysroot, int(name)) for name in sysroot.names(TOPOLOGY)[:MOST_NODES] if as_number(name) is not None]


def gfx_name(target_version: int) -> str:
    """`gfx1201` of 120001: decimal major * 10000 + minor * 100 + stepping, the last two written in hex.

    "" for what is no version. Source: `gfx_target_version` in kfd_device.c.
    """
    major, rest = divmod(target_version, 10_000)
    minor, stepping = divmod(rest, 100)
    return f"gfx{major}{minor:x}{stepping:x}" if 7 <= major < 100 and minor < 16 and stepping < 16 else ""


def _node(sysroot: Sysroot, number: int) -> KfdNode:
    folder = f"{TOPOLOGY}/{number}"
    # A container that was not given the render node may list the node, and not read it.
    reading = sysroot.read(f"{folder}/properties")
    problem = f"node {number}: properties {reading.problem}" if reading.problem else ""
    memory: dict[int, int] = {}
    for bank in sysroot.names(f"{folder}/mem_banks"):
        told = numbers(sysroot.read(f"{folder}/mem_banks/{bank}/properties").text)
        heap = told.get("heap_type", -1)
        memory[heap] = memory.get(heap, 0) + told.get("size_in_bytes", 0)
    links = []
    # To CPUs and over XGMI; and from card to card over PCIe.
    for place in (f"{folder}/{kind}/{link}" for kind in LINK_FOLDERS for link in sysroot.names(f"{folder}/{kind}")):
        told = numbers(sysroot.read(f"{place}/properties").text)
        if "node_to" in told:
            links.append(Link(told["node_to"], LINKS.get(told.get("type", 0), "other"), told.get("weight", 0)))
    gpu_id = sysroot.number(f"{folder}/gpu_id") or 0
    return KfdNode(number, gpu_id, numbers(reading.text), memory, tuple(links), problem)


def numbers(text: str) -> dict[str, int]:
    """`name value` lines; whatever is not that is left out, the last line too when it was cut short."""
    whole = text if text.endswith("\n") or "\n" not in text else text[: text.rindex("\n")]
    pairs = (line.split() for line in whole.splitlines())
    found = ((pair[0], as_number(pair[1])) for pair in pairs if len(pair) == 2)
    return {name: value for name, value in found if value is not None}
