"""What an AMD GPU binary needs and holds, read from the compiler's assembly and intermediate code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

MATRIX = re.compile(r"^\s+(v_(?:wmma|swmmac|mfma|smfmac)_\w+)", re.MULTILINE)
ATOMIC = re.compile(r"^\s+((?:global|buffer|flat)_atomic_\w+)", re.MULTILINE)
SCRATCH = re.compile(r"^\s+(scratch_(?:load|store)_\w+)", re.MULTILINE)
INSTRUCTION = re.compile(r"^\s+[a-z]\w+", re.MULTILINE)
LABEL_OR_BRANCH = re.compile(r"^(?:(\.LBB\w+):|\s+s_c?branch\w*\s+(\.LBB\w+))", re.MULTILINE)
SCRATCH_BYTES = {"b8": 1, "u8": 1, "i8": 1, "b16": 2, "u16": 2, "i16": 2, "b64": 8, "b96": 12, "b128": 16}
SCRATCH_BYTES |= {"dwordx2": 8, "dwordx3": 12, "dwordx4": 16}  # gfx9's names; what is left is of four bytes
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


@dataclass(frozen=True)
class Loop:
    """An innermost loop, as it stands in the code: what one pass of one wave executes if no branch skips any of it."""

    matrix: int
    """Matrix instructions."""
    scratch: int
    """Loads and stores of private memory."""
    scratch_bytes: int
    """… and the bytes that they move for each work-item."""
    instructions: int


def inner_loops(text: str) -> tuple[Loop, ...]:
    """The innermost loops that hold matrix instructions, in the order of the code.

    A loop is what stands between a label and the last branch back to it.
    """
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    for found in LABEL_OR_BRANCH.finditer(text):
        label, target = found.groups()
        if label:
            starts[label] = found.end()
        elif target in starts:
            ends[target] = found.start()
    spans: list[tuple[int, int]] = []
    for start, end in sorted((starts[label], end) for label, end in ends.items()):
        if spans and start < spans[-1][1] < end:  # entered in the middle: two that overlap are one
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    inner = [one for one in spans if not any(one[0] < start and end <= one[1] for start, end in spans)]
    loops = [_loop(text[start:end]) for start, end in inner]
    return tuple(loop for loop in loops if loop.matrix)


def _loop(body: str) -> Loop:
    scratch = SCRATCH.findall(body)
    return Loop(
        matrix=len(MATRIX.findall(body)),
        scratch=len(scratch),
        scratch_bytes=sum(SCRATCH_BYTES.get(name.rpartition("_")[2], 4) for name in scratch),
        instructions=len(INSTRUCTION.findall(body)),
    )


def _number(metadata: str, key: str, absent: int | None = None) -> int:
    # A kernel's own keys stand in a list item: "    .key: value" or "  - .key: value".
    values = re.findall(rf"^(?: {{4}}|  - )\.{key}:\s+(\d+)$", metadata, re.MULTILINE)
    if not values and absent is not None:
        return absent
    if len(values) != 1:
        raise ValueError(f"{len(values)} kernels in the assembly tell .{key}: one was expected")
    return int(values[0])
