"""Machines as trees of files, for `--sysroot`: what the kernel shows of them, written down.

Sources: Documentation/gpu/amdgpu and drivers/gpu/drm/amd/amdkfd/{kfd_topology,kfd_crat}.c of Linux (names and order of
the properties; one bank of heap 1 or 2); a public dump of an R9700 (128 SIMDs, 2 per CU, location 1280, 34208743424
bytes); testdata/topo-mi300-cpx of ROCm/k8s-device-plugin (MI300X in CPX: locations 1280 to 1287, one unique id for all,
a platform device amdgpu_xcp_N for each further partition); ROCm/legacy-rocm-build issue 6004 (Strix Halo: GTT 128 GiB,
of which ROCm gives out 62.47); data/amdgpu.ids of libdrm (devices and revisions); ROCm/rocm-install-on-linux issue 684
(the driver's own number). What no dump gave (other unique ids, Raphael's sizes) is made up and of the right form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

RENDER, VIDEO = 992, 44  # groups on Ubuntu 24.04; on others other numbers


@dataclass(frozen=True)
class Card:
    """One KFD node of a GPU. `heap` 1: the CPU sees all its memory; 2: it does not (no large BAR)."""

    version: int
    device: int
    revision: int
    simds: int
    vram: int
    bus: int
    minor: int
    simd_per_cu: int = 2
    gtt: int = 32 << 30
    heap: int = 1
    unique_id: int = 0
    driver: str = "amdgpu"
    partition: int | None = None
    bank: int | None = None
    """What KFD gives out, where that is not `vram`: an APU's."""
    extra: Mapping[str, int] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"0000:{self.bus:02x}:00.0"


R9700 = Card(120001, 0x7551, 0xC0, 128, 34208743424, 5, 128, unique_id=0x5A1C2D3E4F506172)
RX9070 = replace(R9700, device=0x7550, revision=0xC3, simds=112, vram=17095983104, unique_id=0x11223344556677)
RX9060XT = Card(120000, 0x7590, 0xC0, 64, 17095983104, 9, 129, unique_id=0x21223344556677)
RX7900XTX = Card(110000, 0x744C, 0xC8, 192, 25753026560, 3, 128, unique_id=0x9A8B7C6D5E4F3021)
STRIX_HALO = Card(110501, 0x1586, 0xC1, 80, 536870912, 0xC5, 128, gtt=128 << 30, bank=67076653056)
RAPHAEL = Card(100306, 0x164E, 0xD8, 4, 536870912, 0x12, 130, gtt=16 << 30, bank=16 << 30)
MI300X = Card(90402, 0x74A1, 0, 1216, 206141652992, 5, 128, simd_per_cu=4, unique_id=16404946649897475633)


def cpx(card: Card) -> tuple[Card, ...]:
    """A card in eight partitions: nodes of its own for each, with a render node, an eighth of its CUs and memory."""
    return tuple(
        replace(card, simds=card.simds // 8, vram=card.vram // 8, minor=card.minor + n, partition=n) for n in range(8)
    )


@dataclass(frozen=True)
class Stage:
    """A machine: its cards, and what differs from a healthy one."""

    cards: tuple[Card, ...] = ()
    user_groups: tuple[int, ...] = (1000, VIDEO, RENDER)
    usable: bool = True
    kfd: bool = True
    topology: bool = True
    module: bool = True
    kernel: str = "6.14.0-37-generic"
    driver: str = "6.16.6"
    cmdline: str = "root=/dev/nvme0n1p2 ro quiet iommu=pt"
    files: Mapping[str, str] = field(default_factory=dict)
    overlay: Mapping[str, Any] = field(default_factory=dict)
    dxg: bool = False


ENGINE = {
    "version": {"Version": "28.5.2", "ApiVersion": "1.51", "Components": [{"Name": "Engine"}]},
    "info": {"Driver": "overlay2", "DockerRootDir": "/var/lib/docker", "OperatingSystem": "Ubuntu 24.04.3 LTS"},
    "buildx": True,
    "free": 400 << 30,
    "images": [{"name": "radeon-stack/train", "kind": "train", "rocm": "7.1.1", "gfx": "gfx1201"}],
}


def images(*gfx: str) -> dict[str, Any]:
    """The engine with a train image of ROCm 7.1.1 for each of these."""
    made = [{"name": f"radeon-stack/train:rocm7.1.1-{g}", "kind": "train", "rocm": "7.1.1", "gfx": g} for g in gfx]
    return {**ENGINE, "images": made}


WINDOWS = "6.6.87.2-microsoft-standard-WSL2"
STAGES: dict[str, Stage] = {
    "r9700": Stage((R9700,), overlay={"engine": images("gfx1201")}),
    "two-r9700-and-igpu": Stage(
        (R9700, replace(R9700, bus=8, minor=129, unique_id=0x6A1C2D3E4F506173), RAPHAEL),
        overlay={"engine": images("gfx1201")},
    ),
    "three-r9700": Stage(
        tuple(replace(R9700, bus=5 + 3 * n, minor=128 + n, unique_id=0x5A1C2D3E4F506172 + n) for n in range(3)),
        cmdline="root=/dev/nvme0n1p2 ro quiet",
        overlay={"engine": images("gfx1201")},
    ),
    "rx7900xtx": Stage((RX7900XTX,), overlay={"engine": images("gfx1100")}),
    "strix-halo": Stage((STRIX_HALO,), driver="", overlay={"engine": images("gfx1151")}),
    "rx9070-and-rx9060xt": Stage((RX9070, RX9060XT), overlay={"engine": images("gfx1201", "gfx1200")}),
    "mi300x-spx": Stage(
        (MI300X, replace(MI300X, bus=0x22, minor=129, unique_id=16404946649897475634)),
        overlay={"engine": images("gfx942")},
    ),
    "mi300x-cpx": Stage(cpx(MI300X), overlay={"engine": images("gfx942")}),
    "wsl2": Stage(
        dxg=True,
        kfd=False,
        topology=False,
        module=False,
        kernel=WINDOWS,
        files={"/usr/lib/wsl/lib/libd3d12.so": "", "/opt/rocm/lib/librocdxg.so.1": ""},
        overlay={"engine": images("gfx1201")},
    ),
    "no-driver": Stage(
        (replace(R9700, driver=""),), kfd=False, topology=False, module=False, overlay={"engine": images("gfx1201")}
    ),
    "no-permission": Stage((R9700,), user_groups=(1000,), usable=False, overlay={"engine": images("gfx1201")}),
    "virtual-machine": Stage(
        (R9700,),
        topology=False,
        driver="",
        files={"/sys/class/dmi/id/sys_vendor": "QEMU\n"},
        overlay={"engine": images("gfx1201")},
    ),
}


def build(stage: Stage, root: Path) -> Path:
    """Write the machine below `root`; returns it."""
    _write(root, "/proc/sys/kernel/osrelease", f"{stage.kernel}\n")
    _write(root, "/proc/cmdline", f"{stage.cmdline}\n")
    _write(root, "/proc/meminfo", "MemTotal:       65843232 kB\nMemFree:        50000000 kB\n")
    _write(root, "/etc/os-release", 'ID=ubuntu\nVERSION_ID="24.04"\n')
    _write(root, "/etc/group", f"root:x:0:\nvideo:x:{VIDEO}:me\nrender:x:{RENDER}:me\n")
    if stage.module:
        _write(root, "/sys/module/amdgpu/initstate", "live\n")
        if stage.driver:
            _write(root, "/sys/module/amdgpu/version", f"{stage.driver}\n")
    if stage.topology:
        _node(root, 0, {"cpu_cores_count": 32, "simd_count": 0, "gfx_target_version": 0, "drm_render_minor": 0}, 0)
    nodes: dict[str, Any] = {}
    if stage.kfd:
        nodes["/dev/kfd"] = {"gid": RENDER, "mode": "660", "usable": stage.usable}
    if stage.dxg:
        nodes["/dev/dxg"] = {"gid": 0, "mode": "666", "usable": True}
    for index, card in enumerate(stage.cards):
        _pci(root, card)
        if stage.topology:
            _gpu(root, index + 1, card)
        if card.driver and stage.module:
            nodes[f"/dev/dri/renderD{card.minor}"] = {"gid": RENDER, "mode": "660", "usable": stage.usable}
    for path, text in stage.files.items():
        _write(root, path, text)
    user = {"uid": 1000, "gid": 1000, "groups": list(stage.user_groups), "name": "me"}
    overlay = {"nodes": nodes, "user": user, "environment": {}, "engine": ENGINE, "home_free": 500 << 30}
    _write(root, "/radeon-stack.json", json.dumps(overlay | dict(stage.overlay), indent=1))
    return root


def _gpu(root: Path, number: int, card: Card) -> None:
    location = (card.bus << 8) | (card.partition or 0)
    properties = {
        "cpu_cores_count": 0,
        "simd_count": card.simds,
        "mem_banks_count": 1,
        "io_links_count": 1,
        "max_waves_per_simd": 16,
        "lds_size_in_kb": 64,
        "wave_front_size": 64 if card.version < 100000 else 32,
        "simd_per_cu": card.simd_per_cu,
        "gfx_target_version": card.version,
        "vendor_id": 4098,
        "device_id": card.device,
        "location_id": location,
        "domain": 0,
        "drm_render_minor": card.minor,
        "unique_id": card.unique_id,
        "num_xcc": 1,
    }
    _node(root, number, properties | dict(card.extra), 1000 + number)
    folder = f"/sys/class/kfd/kfd/topology/nodes/{number}"
    _write(
        root,
        f"{folder}/mem_banks/0/properties",
        f"heap_type {card.heap}\nsize_in_bytes {card.bank or card.vram}\nflags 0\n",
    )
    _write(root, f"{folder}/io_links/0/properties", f"type 2\nnode_from {number}\nnode_to 0\nweight 20\n")


def _node(root: Path, number: int, properties: Mapping[str, int], gpu_id: int) -> None:
    folder = f"/sys/class/kfd/kfd/topology/nodes/{number}"
    _write(root, f"{folder}/gpu_id", f"{gpu_id}\n")
    _write(root, f"{folder}/properties", "".join(f"{name} {value}\n" for name, value in properties.items()))


def _pci(root: Path, card: Card) -> None:
    folder = f"/sys/bus/pci/devices/{card.address}"
    if card.partition:  # one PCI device for all partitions; the others have a platform device each
        return _drm(root, card, f"/sys/devices/platform/amdgpu_xcp_{card.partition - 1}")
    _write(root, f"{folder}/vendor", "0x1002\n")
    _write(root, f"{folder}/device", f"0x{card.device:04x}\n")
    _write(root, f"{folder}/revision", f"0x{card.revision:02x}\n")
    _write(root, f"{folder}/class", "0x120000\n" if card.version // 100 == 904 else "0x030000\n")
    _write(root, f"{folder}/numa_node", "-1\n" if card.version > 100000 else "0\n")
    if card.driver:
        _write(root, f"/sys/bus/pci/drivers/{card.driver}/bind", "")
        _link(root, f"{folder}/driver", f"../../drivers/{card.driver}")
        whole = card.vram * (8 if card.partition == 0 else 1)
        _write(root, f"{folder}/mem_info_vram_total", f"{whole}\n")
        _write(root, f"{folder}/mem_info_vis_vram_total", f"{whole if card.heap == 1 else 256 << 20}\n")
        _write(root, f"{folder}/mem_info_gtt_total", f"{card.gtt}\n")
        _drm(root, card, folder)
    return None


def _drm(root: Path, card: Card, folder: str) -> None:
    for name in (f"card{card.minor - 127}", f"renderD{card.minor}"):
        (root / folder.lstrip("/") / "drm" / name).mkdir(parents=True, exist_ok=True)
    (root / f"sys/class/drm/renderD{card.minor}").mkdir(parents=True, exist_ok=True)
    _link(root, f"/sys/class/drm/renderD{card.minor}/device", f"../../../{folder.removeprefix('/sys/')}")


def _link(root: Path, path: str, target: str) -> None:
    place = root / path.lstrip("/")
    place.unlink(missing_ok=True)
    place.symlink_to(target)


def _write(root: Path, path: str, text: str) -> None:
    place = root / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)


def specification(*cards: tuple[str, ...], numbers: bool = True) -> str:
    """A CDI specification as amd-ctk writes it: internal/cdi/cdi.go of ROCm/container-toolkit.

    Without `numbers` an engine takes the nodes' own.
    """
    more = {"type": "c", "major": 226, "minor": 1, "fileMode": 432, "uid": 0, "gid": RENDER} if numbers else {}

    def device(name: str, nodes: tuple[str, ...]) -> dict[str, Any]:
        paths = [*(f"/dev/dri/{node}" for node in nodes), "/dev/kfd"]
        return {
            "name": name,
            "containerEdits": {"deviceNodes": [{"path": path, "permissions": "rwm", **more} for path in paths]},
        }

    devices = [device(str(n), nodes) for n, nodes in enumerate(cards)]
    devices.append(device("all", tuple(node for nodes in cards for node in nodes)))
    return json.dumps({"cdiVersion": "0.6.0", "kind": "amd.com/gpu", "devices": devices, "containerEdits": {}})
