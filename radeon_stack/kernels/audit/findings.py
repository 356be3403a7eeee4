"""What must hold for a kernel's binary on an AMD GPU, and what is worth telling."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from radeon_stack.kernels.audit.assembly import MATRIX_LAYOUTS, Binary, dot_layouts, read_assembly
from radeon_stack.kernels.audit.chips import CHIPS, KIB, waves_per_simd
from radeon_stack.kernels.audit.launcher import Compiled
from radeon_stack.kernels.variant import Variant

LDS_LIMIT = 64 * KIB  # of a workgroup, on all of them but gfx950, where the same tiles have to run


@dataclass(frozen=True)
class Row:
    """One variant for one target."""

    name: str
    arch: str
    default: bool
    findings: tuple[str, ...]
    """What does not hold; empty if all does."""
    remarks: tuple[str, ...] = ()
    binary: Binary | None = None
    """None when there is none."""
    lds: int = 0
    """Bytes of a workgroup, Triton's own included."""
    waves_per_simd: float = 0.0
    dots: int = 0
    """tl.dot operations in the kernel, unrolled and pipelined copies included."""
    key: str = ""
    """Triton's: the binary's folder in its cache."""
    digest: str = ""
    """Ours, of all that decides the row: `audit.digest`."""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        told = dataclasses.asdict(self)
        binary = told.pop("binary")
        return told | (binary | {"lds": self.lds} if binary else {})


def judge(variant: Variant, arch: str, compiled: Compiled, seconds: float = 0.0) -> Row:
    """Read what was compiled, and hold it against the rules."""
    binary, layouts = read_assembly(compiled.assembly), dot_layouts(compiled.ttgir)
    lds = binary.lds + compiled.shared
    findings: list[str] = []
    remarks: list[str] = []
    slow = [layout for layout in layouts if layout not in MATRIX_LAYOUTS]
    if variant.dot and not binary.matrix:
        findings.append("a dot without matrix instructions")
    elif slow:
        findings.append(f"{len(slow)} of {len(layouts)} dots without matrix instructions")
    if binary.vgpr_spills or binary.scratch:
        spills = f"spills {binary.vgpr_spills} VGPRs, {binary.scratch} bytes of scratch memory"
        (findings if variant.default else remarks).append(spills)
    if binary.sgpr_spills:
        # Into lanes of a VGPR: an instruction each way, and no memory.
        remarks.append(f"keeps {binary.sgpr_spills} SGPRs in lanes of VGPRs")
    waves = waves_per_simd(CHIPS[arch], vgprs=binary.vgprs, sgprs=binary.sgprs, lds=lds, waves=binary.waves)
    if lds > LDS_LIMIT:
        findings.append(f"{lds} bytes of LDS, more than {LDS_LIMIT}")
    elif not waves:
        findings.append("no workgroup of it fits")
    return Row(
        variant.name,
        arch,
        variant.default,
        tuple(findings),
        tuple(remarks),
        binary,
        lds,
        waves,
        len(layouts),
        compiled.key,
        seconds=round(seconds, 2),
    )
