"""GPUs that ROCm can compute on, read from the kernel's KFD topology: no subprocess, no rocminfo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOPOLOGY = "sys/class/kfd/kfd/topology/nodes"


@dataclass(frozen=True)
class Gpu:
    """One compute GPU: its index among GPUs, ISA name and render node."""

    index: int
    gfx: str
    render_node: str


def gfx_name(target_version: int) -> str:
    """`gfx1201` of 120001: decimal major * 10000 + minor * 100 + stepping, the last two written in hex.

    Source: `gfx_target_version` in the kernel's drivers/gpu/drm/amd/amdkfd/kfd_topology.c.
    """
    major, rest = divmod(target_version, 10_000)
    minor, stepping = divmod(rest, 100)
    return f"gfx{major}{minor:x}{stepping:x}"


def gpus(sysroot: Path = Path("/")) -> list[Gpu]:
    """The compute GPUs of a machine; [] without the amdgpu driver. CPU nodes have no gfx version."""
    found = list(_nodes(sysroot / TOPOLOGY))
    return [
        Gpu(index, gfx_name(node["gfx_target_version"]), f"/dev/dri/renderD{node['drm_render_minor']}")
        for index, node in enumerate(found)
    ]


def _nodes(folder: Path) -> Iterator[dict[str, int]]:
    if not folder.is_dir():
        return
    for entry in sorted((e for e in folder.iterdir() if e.name.isdigit()), key=lambda e: int(e.name)):
        properties = _properties(entry / "properties")
        if properties.get("gfx_target_version") and properties.get("drm_render_minor"):
            yield properties


def _properties(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def driver_version(sysroot: Path = Path("/")) -> str | None:
    """The version of AMD's packaged amdgpu driver, such as 30.20.1; None for the kernel's own, which tells none."""
    try:
        return (sysroot / "sys/module/amdgpu/version").read_text(encoding="ascii", errors="replace").strip() or None
    except OSError:
        return None
