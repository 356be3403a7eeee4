"""How many waves a SIMD can hold: the registers, memory and slots that an architecture has for them.

Sources, in LLVM's AMDGPU backend (llvm/lib/Target/AMDGPU):
- vector registers of a SIMD: `IsaInfo::getTotalNumVGPRs`, handed out in steps of `getVGPRAllocGranule`
  (Utils/AMDGPUBaseInfo.cpp). With `Feature1_5xVGPRs` and wave32 1536 in steps of 24; AMDGPU.td gives that feature
  to gfx1100, gfx1101, gfx1151 and all of gfx120x, not to gfx1102, gfx1103, gfx1150 and gfx1152, which have 1024 in
  steps of 16. With `FeatureGFX90AInsts` (gfx90a, gfx942, gfx950) 512 in steps of 8, accumulation registers included.
- waves of a SIMD: `getMaxWavesPerEU`: 16 from gfx1030 on, 8 with `FeatureGFX90AInsts`.
- LDS that a workgroup's waves share: `getLocalMemorySize`. On gfx10 and later a workgroup runs on a WGP of two CUs
  unless compiled for CU mode, so that is twice the 64 KiB which one workgroup can address, and four SIMDs
  (`getEUsPerCU`). CDNA: 64 KiB on gfx942, 160 KiB on gfx950 (`FeatureAddressableLocalMemorySize163840`), four SIMDs.
- scalar registers: from gfx10 on each wave has its own; before, 800 of a SIMD in steps of 16, of which the HSA trap
  handler takes 16 of each wave (`getMaxNumSGPRs`, and the amdhsa runs of test/CodeGen/AMDGPU/occupancy-levels.ll).
- workgroups: `getMaxWorkGroupsPerCU`: 16 barriers of a CU, 32 of a WGP; a workgroup of one wave needs none.

LDS is handed out in blocks, which LLVM leaves out of account (`getOccupancyWithWorkGroupSizes`), and so do we.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
SGPR_GRANULE = 16
TRAP_HANDLER_SGPRS = 16


@dataclass(frozen=True)
class Chip:
    """What waves share. A "unit" is what a workgroup runs on: a CU, or from RDNA on a WGP of two."""

    arch: str
    vgprs: int
    """Of a SIMD, for each lane."""
    granule: int
    """Vector registers come in multiples of this."""
    lds: int
    """Bytes of a unit."""
    slots: int
    """Waves of a SIMD at most."""
    barriers: int
    """Workgroups of more than one wave that a unit runs at most."""
    sgprs: int = 0
    """Scalar registers of a SIMD; 0 where each wave has its own."""
    simds: int = 4
    """Of a unit."""


def _rdna(arch: str) -> Chip:
    return Chip(arch, vgprs=1536, granule=24, lds=128 * KIB, slots=16, barriers=32)


def _cdna(arch: str, lds: int) -> Chip:
    return Chip(arch, vgprs=512, granule=8, lds=lds, slots=8, barriers=16, sgprs=800)


CHIPS = {
    chip.arch: chip
    for chip in (
        *(_rdna(arch) for arch in ("gfx1201", "gfx1200", "gfx1100", "gfx1151")),
        _cdna("gfx942", 64 * KIB),
        _cdna("gfx950", 160 * KIB),
    )
}


def waves_by_registers(chip: Chip, vgprs: int, sgprs: int) -> int:
    """Waves of a SIMD for which its registers suffice; what LLVM writes as "Occupancy" where LDS is not known to it."""
    reserved = -(-max(vgprs, 1) // chip.granule) * chip.granule
    waves = min(chip.vgprs // reserved, chip.slots)
    while chip.sgprs and waves > 1 and sgprs > _sgprs_of_a_wave(chip, waves):
        waves -= 1
    return waves


def waves_per_simd(chip: Chip, *, vgprs: int, sgprs: int, lds: int, waves: int) -> float:
    """Waves of a SIMD when the unit is full of workgroups of so many waves and bytes of LDS; 0.0 if none fits.

    A workgroup starts as a whole, so what is left beside the last one stays empty: a fraction means that some SIMDs
    of a unit hold one wave more than others.
    """
    workgroups = waves_by_registers(chip, vgprs, sgprs) * chip.simds // waves
    if lds:
        workgroups = min(workgroups, chip.lds // lds)
    if waves > 1:
        workgroups = min(workgroups, chip.barriers)
    return workgroups * waves / chip.simds


def _sgprs_of_a_wave(chip: Chip, waves: int) -> int:
    return (chip.sgprs // waves - TRAP_HANDLER_SGPRS) // SGPR_GRANULE * SGPR_GRANULE
