"""What an AMD GPU binary needs and holds, read from the compiler's assembly and intermediate code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

MATRIX = re.compile(r"^\s+(v_(?:wmma|swmmac|mfma|smfmac)_\w+)", re.MULTILINE)
ATOMIC = re.compile(r"^\s+((?:global|buffer|flat)_atomic_\w+)", re.MULTILINE)
SCRATCH = re.compile(r"^\s+(scratch_(?:load|store)_\w+)", re.MULTILINE)
METADATA = re.compile(r"^\s*\.amdgpu_metadata$(.*?)^\s*\.end_amdgpu_metadata$", re.MULTILINE | re.DOTALL)
CODE_BYTES = re.compile(r"^; codeLenInByte = (\d+)$", re.MULTILINE)
# `%d = tt.dot %a, %b, %c, inputPrecision = tf32 : … -> tensor<64x64xf32, #mma>`
DOT = re.compile(r"= tt\.dot(?:_scaled)? .*-> tensor<[^,>]+, (#\w+)", re.MULTILINE)
LAYOUT = re.compile(r"^(#\w+) = (#ttg\.\w+)", re.MULTILINE)
MATRIX_LAYOUTS = ("#ttg.amd_wmma", "#ttg.amd_mfma")


@dataclass(frozen=True)
class Binary:
    """One kernel as compiled. Counts of instructions are as they stand in the code, not as often as they run."""

    matrix: Mapping[str, int]
    """Matrix instructions by name."""
    vgprs: int
    """Vector registers of a lane; where accumulation registers share the file (CDNA2 and later), those too."""
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch: int
    """Private memory of a work-item in bytes: spilled registers and arrays that are indexed at run time."""
    scratch_instructions: int
    atomics: Mapping[str, int]
    lds: int
    """Bytes of a workgroup that the assembly asks for; Triton adds its own at launch."""
    waves: int
    """Of a workgroup."""
    wave_size: int
    code: int
    """Bytes."""


def read_assembly(text: str) -> Binary:
    """Read the one kernel in it. ValueError when it is none, or lacks a figure.

    The names are those of the code object's metadata, "AMDHSA Code Object V5" in LLVM's AMDGPUUsage.rst:
    `.vgpr_count` counts what is reserved of the file, `.agpr_count` (CDNA alone) is within it.
    """
    found = METADATA.search(text)
    if found is None:
        raise ValueError("no metadata of a kernel in the assembly")
    metadata = found[1]
    workgroup, wave_size = _number(metadata, "max_flat_workgroup_size"), _number(metadata, "wavefront_size")
    code = CODE_BYTES.search(text)
    return Binary(
        matrix=dict(sorted(Counter(MATRIX.findall(text)).items())),
        vgprs=_number(metadata, "vgpr_count"),
        agprs=_number(metadata, "agpr_count", 0),
        sgprs=_number(metadata, "sgpr_count"),
        vgpr_spills=_number(metadata, "vgpr_spill_count"),
        sgpr_spills=_number(metadata, "sgpr_spill_count"),
        scratch=_number(metadata, "private_segment_fixed_size"),
        scratch_instructions=len(SCRATCH.findall(text)),
        atomics=dict(sorted(Counter(ATOMIC.findall(text)).items())),
        lds=_number(metadata, "group_segment_fixed_size"),
        waves=-(-workgroup // wave_size),
        wave_size=wave_size,
        code=int(code[1]) if code else 0,
    )


def dot_layouts(ttgir: str) -> tuple[str, ...]:
    """The layout of each dot's result in Triton's GPU dialect: `#ttg.amd_wmma`, `#ttg.blocked`, …

    A dot in a layout other than the two matrix ones is done with vector instructions, one product at a time.
    """
    layouts = dict(LAYOUT.findall(ttgir))
    return tuple(layouts.get(name, name) for name in DOT.findall(ttgir))


def _number(metadata: str, key: str, absent: int | None = None) -> int:
    # A kernel's own keys stand in a list item: "    .key: value" or "  - .key: value".
    values = re.findall(rf"^(?: {{4}}|  - )\.{key}:\s+(\d+)$", metadata, re.MULTILINE)
    if not values and absent is not None:
        return absent
    if len(values) != 1:
        raise ValueError(f"{len(values)} kernels in the assembly tell .{key}: one was expected")
    return int(values[0])
