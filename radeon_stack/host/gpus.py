"""The compute GPUs of a machine, from sysfs alone: no subprocess, no rocminfo, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from radeon_stack.host.gpu_names import marketing_name
from radeon_stack.host.kfd import VRAM_HIDDEN, VRAM_VISIBLE, KfdNode, Link, gfx_name, nodes
from radeon_stack.host.sysroot import Sysroot, as_number

PCI = "/sys/bus/pci/devices"
DRM = "/sys/class/drm"
FIRST_RENDER_MINOR, LAST_RENDER_MINOR = 128, 255  # libhsakmt's fmm.c, DRM_FIRST_RENDER_NODE and DRM_LAST_RENDER_NODE
AMD = 0x1002
DISPLAY_CLASSES = ("0x03", "0x12")  # PCI base classes: display controllers; processing accelerators (Instinct)

# The APUs among AMD's processors: "Target Architecture" APU in LLVM's AMDGPUUsage, "AMDGPU Processors"; 1037, 1154,
# 1170 and 1171: gfx_target_version in kfd_device.c of Linux and its patches.
APUS = frozenset(
    f"gfx{name}"
    for name in (
        *("700", "801", "902", "909", "90c", "1013", "1033", "1035", "1036", "1037"),
        *("1103", "1150", "1151", "1152", "1153", "1154", "1170", "1171"),
    )
)
# An APU that people buy to compute on: its GPU has the whole memory, and is a card like any other.
STRIX_HALO = "gfx1151"


@dataclass(frozen=True)
class Gpu:
    """One compute GPU, or one partition of one. Memory in bytes.

    `index` counts in the kernel's order, as ROCR and HIP do. `vram` is its own memory; `visible_vram` what of that
    the CPU sees (all of it with a large BAR); `gtt` the system memory it may map; `pool` what KFD gives out: an APU's
    own memory or a part of the system's, as kernel and firmware decide. `problem` says why it cannot be used.
    """

    index: int
    node: int
    gfx: str
    name: str
    vram: int
    visible_vram: int
    gtt: int
    pool: int
    compute_units: int
    render_node: str
    pci: str
    pci_id: str
    numa_node: int | None
    unique_id: str
    integrated: bool
    partition: int | None
    links: tuple[Link, ...]
    problem: str = ""

    @property
    def memory(self) -> int:
        """What a model may fill: a card's own memory; of an APU what KFD gives out."""
        return (self.pool or max(self.vram, self.gtt)) if self.gfx in APUS else self.vram


@dataclass(frozen=True)
class PciGpu:
    """An AMD GPU on the PCI bus, with a driver or without."""

    address: str
    pci_id: str
    driver: str


@dataclass(frozen=True)
class Topology:
    """All that was seen; `problems` are nodes that could not be read or made sense of."""

    gpus: tuple[Gpu, ...]
    cpus: int
    pci: tuple[PciGpu, ...]
    problems: tuple[str, ...]


def topology(sysroot: Sysroot) -> Topology:
    """GPUs, CPU nodes and what is on the bus; never an error, whatever the files hold."""
    gpus: list[Gpu] = []
    problems: list[str] = []
    found = nodes(sysroot)
    partitions = _partitions(found)
    for node in found:
        if node.problem:
            problems.append(node.problem)
        elif node.has_gpu:
            gpu = _gpu(sysroot, node, len(gpus), partitions)
            if gpu is None:
                problems.append(f"node {node.number}: a GPU without a gfx_target_version that makes sense")
            else:
                gpus.append(gpu)
    return Topology(tuple(gpus), sum(node.has_cpu for node in found), tuple(pci_gpus(sysroot)), tuple(problems))


def pci_gpus(sysroot: Sysroot) -> list[PciGpu]:
    """AMD's display controllers and accelerators on the PCI bus."""
    found = []
    for address in sysroot.names(PCI):
        folder = f"{PCI}/{address}"
        kind = sysroot.text(f"{folder}/class") or ""
        if kind.startswith(DISPLAY_CLASSES) and sysroot.text(f"{folder}/vendor") == f"0x{AMD:04x}":
            found.append(PciGpu(address, _pci_id(sysroot, folder), sysroot.target(f"{folder}/driver")))
    return found


def driver_version(sysroot: Sysroot) -> str | None:
    """The number of AMD's packaged amdgpu driver, such as 6.16.6 (AMD's release 30.20); the kernel's own has none."""
    return sysroot.text("/sys/module/amdgpu/version") or None


def _gpu(sysroot: Sysroot, node: KfdNode, index: int, partitions: dict[tuple[int, int], int]) -> Gpu | None:
    gfx = gfx_name(node.get("gfx_target_version"))
    if not gfx:
        return None
    many = partitions[_slot(node)] > 1
    pci = _address(sysroot, node, many)
    folder = f"{PCI}/{pci}"
    render_node, problem = _render_node(sysroot, node, pci, many)
    hidden, visible = node.memory.get(VRAM_HIDDEN, 0), node.memory.get(VRAM_VISIBLE, 0)
    vram = sysroot.number(f"{folder}/mem_info_vram_total") if not many else None
    seen = sysroot.number(f"{folder}/mem_info_vis_vram_total") if not many else None
    unique = node.get("unique_id")
    numa = sysroot.text(f"{folder}/numa_node") or ""
    return Gpu(
        index=index,
        node=node.number,
        gfx=gfx,
        name=marketing_name(sysroot, folder, gfx),
        vram=vram or hidden + visible,
        # MI300A tells 0 of both: its memory is only in KFD's banks.
        visible_vram=seen if vram and seen is not None else visible,
        gtt=sysroot.number(f"{folder}/mem_info_gtt_total") or 0,
        pool=hidden + visible,
        compute_units=node.get("simd_count") // max(1, node.get("simd_per_cu")),
        render_node=render_node,
        pci=pci,
        pci_id=_pci_id(sysroot, folder) or f"{node.get('vendor_id'):04x}:{node.get('device_id'):04x}",
        numa_node=as_number(numa),  # -1 where the firmware tells none
        unique_id=f"GPU-{unique:016x}" if unique else "",
        integrated=gfx in APUS and gfx != STRIX_HALO,
        partition=_partition(node) if many else None,
        links=node.links,
        problem=problem,
    )


def _slot(node: KfdNode) -> tuple[int, int]:
    """Domain, and bus with device: what the partitions of one card share."""
    return node.get("domain"), (node.get("location_id") & 0xFFFF) >> 3


def _partitions(found: list[KfdNode]) -> dict[tuple[int, int], int]:
    count: dict[tuple[int, int], int] = {}
    for node in found:
        if node.has_gpu:
            count[_slot(node)] = count.get(_slot(node), 0) + 1
    return count


def _partition(node: KfdNode) -> int:
    # Kernels write a partition's number into bits 31:28, others into the function's three bits; never into both.
    location = node.get("location_id")
    return (location >> 28) & 0xF or location & 7


def _address(sysroot: Sysroot, node: KfdNode, many: bool) -> str:
    """`0000:03:00.0`; of a partition, its card's."""
    domain, slot = _slot(node)
    function = node.get("location_id") & 7
    address = f"{domain & 0xFFFFFFFF:04x}:{slot >> 5:02x}:{slot & 31:02x}"
    if many and sysroot.target(f"{PCI}/{address}.{function}/driver") != "amdgpu":
        function = 0  # it was the partition's number
    return f"{address}.{function}"


def _render_node(sysroot: Sysroot, node: KfdNode, pci: str, many: bool) -> tuple[str, str]:
    """The render node's path, or "" and why there is none."""
    minor = node.get("drm_render_minor")
    if FIRST_RENDER_MINOR <= minor <= LAST_RENDER_MINOR:
        return f"/dev/dri/renderD{minor}", ""
    if minor:
        return "", f"drm_render_minor {minor} is outside {FIRST_RENDER_MINOR} to {LAST_RENDER_MINOR}"
    # Where the minor is not told, the render node of the same PCI device is it.
    if not many:
        for name in sysroot.names(f"{PCI}/{pci}/drm"):
            if name.startswith("renderD") and as_number(name[len("renderD") :]) is not None:
                return f"/dev/dri/{name}", ""
    return "", "the kernel tells no render node for it (drm_render_minor)"


def _pci_id(sysroot: Sysroot, folder: str) -> str:
    vendor, device = sysroot.text(f"{folder}/vendor") or "", sysroot.text(f"{folder}/device") or ""
    return f"{vendor[2:6]}:{device[2:6]}" if vendor.startswith("0x") and device.startswith("0x") else ""
