"""What the audit of kernels reads from assembly, and how many waves it says fit. Compiling is tests/work's."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from radeon_stack.kernels.audit.apart import NoResultError, call_apart
from radeon_stack.kernels.audit.assembly import dot_layouts, read_assembly
from radeon_stack.kernels.audit.chips import CHIPS, waves_by_registers, waves_per_simd
from radeon_stack.kernels.audit.findings import judge
from radeon_stack.kernels.audit.launcher import Compiled, wave_size
from radeon_stack.kernels.audit.table import text_table
from radeon_stack.kernels.variant import Variant
from tests.conftest import ROOT

ASSEMBLY = """\
\t.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
matmul:
; %bb.0:
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[6:7], v[8:9], a[0:15]
\tv_mfma_f32_16x16x16_f16 a[0:3], v[6:7], v[8:9], a[0:3]
\tv_fma_f32 v1, v2, v3, v4 ; v_mfma_f32_32x32x8_bf16 in a comment
\tscratch_store_dwordx4 off, v[2:5], s33
\tscratch_load_dwordx4 v[2:5], off, s33
\tglobal_atomic_add_f32 v[2:3], v4, off
; codeLenInByte = 5272
\t.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     16
    .args:
      - .offset:         0
        .size:           8
        .value_kind:     global_buffer
    .group_segment_fixed_size: 1024
    .max_flat_workgroup_size: 256
    .name:           matmul
    .private_segment_fixed_size: 380
    .sgpr_count:     50
    .sgpr_spill_count: 38
    .vgpr_count:     112
    .vgpr_spill_count: 110
    .wavefront_size: 64
amdhsa.target:   amdgcn-amd-amdhsa--gfx942
...
\t.end_amdgpu_metadata
"""
TTGIR = """\
#blocked = #ttg.blocked<{sizePerThread = [2, 8]}>
#mma = #ttg.amd_mfma<{version = 3}>
%0 = tt.dot %a, %b, %c : tensor<8x8xbf16, #ttg.dot_op<{parent = #mma}>> * tensor<8x8xf16> -> tensor<8x8xf32, #mma>
%1 = tt.dot %a, %b, %c, inputPrecision = ieee : tensor<8x8xf32> * tensor<8x8xf32> -> tensor<8x8xf32, #blocked>
"""
COMPILED = Compiled(ASSEMBLY, TTGIR.replace("-> tensor<8x8xf32, #blocked>", "-> tensor<8x8xf32, #mma>"), 16384, "key")
SPILLS = "spills 110 VGPRs, 380 bytes of scratch memory"
SPILLING = Variant("matmul", None, {}, {}, 4, 2, dot=True, default=True)
NO_SPILLS = re.sub(r"(_spill_count|private_segment_fixed_size): \d+", r"\1: 0", ASSEMBLY)
SOUND = replace(COMPILED, assembly=NO_SPILLS)


def test_the_reader_counts_matrix_instructions_by_name_and_takes_figures_from_the_metadata() -> None:
    binary = read_assembly(ASSEMBLY)
    assert binary.matrix == {"v_mfma_f32_16x16x16_f16": 1, "v_mfma_f32_32x32x8_bf16": 2}
    assert (binary.vgprs, binary.agprs, binary.sgprs) == (112, 16, 50)
    assert (binary.vgpr_spills, binary.sgpr_spills, binary.scratch, binary.scratch_instructions) == (110, 38, 380, 2)
    assert (binary.lds, binary.waves, binary.wave_size, binary.code) == (1024, 4, 64, 5272)
    assert binary.atomics == {"global_atomic_add_f32": 1}


def test_where_there_are_no_accumulation_registers_there_are_none() -> None:
    assert read_assembly(ASSEMBLY.replace("  - .agpr_count:     16\n    .args:", "  - .args:")).agprs == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no metadata"),
        (ASSEMBLY.replace(".vgpr_spill_count:", ".vgpr_spilled:"), "0 kernels in the assembly tell .vgpr_spill_count"),
        (ASSEMBLY.replace("amdhsa.target", "  - .vgpr_count: 3\namdhsa.target"), "2 kernels in the assembly"),
    ],
)
def test_assembly_without_one_kernels_figures_is_refused_not_guessed_at(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_assembly(text)


def test_the_layout_of_each_dot_tells_whether_it_uses_matrix_instructions() -> None:
    assert dot_layouts(TTGIR) == ("#ttg.amd_mfma", "#ttg.blocked")


# Columns GFX950 and GFX1100W32 (gfx1100, gfx1101, gfx1151, gfx1200) of LLVM's test/CodeGen/AMDGPU/occupancy-levels.ll.
VGPRS = [
    (24, 8, 16),
    (64, 8, 16),
    (72, 7, 16),
    (80, 6, 16),
    (84, 5, 16),
    (96, 5, 16),
    (100, 4, 12),
    (112, 4, 12),
    (128, 4, 10),
    (144, 3, 10),
    (168, 3, 9),
    (200, 2, 7),
    (256, 2, 5),
]


@pytest.mark.parametrize(("vgprs", "gfx950", "gfx1100"), VGPRS)
def test_vector_registers_leave_room_for_as_many_waves_as_llvm_says(vgprs: int, gfx950: int, gfx1100: int) -> None:
    for arch in ("gfx950", "gfx942"):
        assert waves_by_registers(CHIPS[arch], vgprs, 0) == gfx950
    for arch in ("gfx1100", "gfx1151", "gfx1200", "gfx1201"):
        assert waves_by_registers(CHIPS[arch], vgprs, 0) == gfx1100


# GFX950TRAP of the same file; a kernel's count has six more than it names: VCC, flat scratch and XNACK's mask.
@pytest.mark.parametrize(("named", "waves"), [(24, 8), (80, 7), (88, 7), (100, 6), (101, 6)])
def test_scalar_registers_limit_cdna_alone(named: int, waves: int) -> None:
    assert waves_by_registers(CHIPS["gfx950"], 24, named + 6) == waves
    assert waves_by_registers(CHIPS["gfx1201"], 24, named + 6) == 16


# `used_lds_8252_max_group_size_…` of the same file, which rounds up what we tell exactly.
@pytest.mark.parametrize(("size", "gfx950", "gfx1100"), [(64, 5, 8), (96, 8, 12), (128, 8, 15)])
def test_lds_leaves_room_for_as_many_waves_as_llvm_says(size: int, gfx950: int, gfx1100: int) -> None:
    for arch, waves in (("gfx950", gfx950), ("gfx1100", gfx1100), ("gfx1201", gfx1100)):
        chip = CHIPS[arch]
        found = waves_per_simd(chip, vgprs=24, sgprs=24, lds=8252, waves=-(-size // wave_size(arch)))
        assert min(math.ceil(found), chip.slots) == waves


def test_a_workgroup_runs_as_a_whole_or_not_at_all() -> None:
    # 9 waves of 168 registers fit each of four SIMDs: 36, which hold four workgroups of 8, not four and a half.
    assert waves_per_simd(CHIPS["gfx1201"], vgprs=168, sgprs=0, lds=0, waves=8) == 8.0
    assert waves_per_simd(CHIPS["gfx942"], vgprs=24, sgprs=24, lds=65537, waves=4) == 0.0
    assert waves_per_simd(CHIPS["gfx942"], vgprs=24, sgprs=24, lds=0, waves=1) == 8.0, "a wave alone needs no barrier"
    assert waves_per_simd(CHIPS["gfx942"], vgprs=24, sgprs=24, lds=0, waves=2) == 8.0
    assert waves_per_simd(CHIPS["gfx1201"], vgprs=24, sgprs=24, lds=0, waves=2) == 16.0


def test_a_sound_kernel_has_no_findings() -> None:
    row = judge(SPILLING, "gfx942", SOUND)
    assert (row.findings, row.remarks, row.dots) == ((), (), 2)
    assert (row.lds, row.waves_per_simd) == (1024 + 16384, 3.0)


def test_a_spill_is_a_finding_in_a_default_and_told_elsewhere() -> None:
    scalars = "keeps 38 SGPRs in lanes of VGPRs"
    row = judge(SPILLING, "gfx942", COMPILED)
    assert (row.findings, row.remarks) == ((SPILLS,), (scalars,))
    row = judge(replace(SPILLING, default=False), "gfx942", COMPILED)
    assert (row.findings, row.remarks) == ((), (SPILLS, scalars))


def test_scalars_kept_in_lanes_of_vector_registers_touch_no_memory_and_are_told() -> None:
    text = re.sub(r"(vgpr_spill_count|private_segment_fixed_size): \d+", r"\1: 0", COMPILED.assembly)
    row = judge(SPILLING, "gfx942", replace(COMPILED, assembly=text))
    assert (row.findings, row.remarks) == ((), ("keeps 38 SGPRs in lanes of VGPRs",))


def test_a_dot_without_matrix_instructions_is_a_finding() -> None:
    bare = replace(SOUND, assembly=NO_SPILLS.replace("v_mfma", "v_other"), ttgir="")
    assert judge(SPILLING, "gfx942", bare).findings == ("a dot without matrix instructions",)
    assert judge(replace(SPILLING, dot=False), "gfx942", bare).findings == ()


def test_one_dot_of_several_without_matrix_instructions_is_a_finding() -> None:
    mixed = replace(SOUND, ttgir=TTGIR)
    assert judge(SPILLING, "gfx942", mixed).findings == ("1 of 2 dots without matrix instructions",)


@pytest.mark.parametrize(("shared", "found"), [(64512, 0), (64513, 1)])
def test_more_lds_than_a_workgroup_may_have_is_a_finding(shared: int, found: int) -> None:
    row = judge(SPILLING, "gfx950", replace(SOUND, shared=shared))
    assert len(row.findings) == found
    assert all("bytes of LDS" in text for text in row.findings)


def test_a_row_is_json_and_a_line_of_the_table() -> None:
    rows = [judge(SPILLING, "gfx942", COMPILED).as_json(), judge(SPILLING, "gfx942", SOUND).as_json()]
    assert json.loads(json.dumps(rows))[0]["vgprs"] == 112
    lines = text_table(rows).splitlines()
    assert "110+38s" in lines[1] and "✗ spills" in lines[1] and "✗" not in lines[2]
    assert lines[0].index("LDS") + 3 == lines[1].index("17408") + 5, "numbers stand under the end of their title"


def test_the_page_is_made_from_what_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    kernels, kernels_page = import_module("kernels"), import_module("kernels_page")
    monkeypatch.setattr(kernels, "RECORD", tmp_path / "kernels_audit.json")
    monkeypatch.setattr(kernels_page, "BENCHMARKS", tmp_path)
    assert "radeon-stack's kernels" not in kernels_page.page()
    tuning = replace(SPILLING, name="tuned", default=False)
    rows = [judge(SPILLING, "gfx942", SOUND), judge(SPILLING, "gfx950", COMPILED), judge(tuning, "gfx942", COMPILED)]
    kernels.write([{"triton": "3.5.1", "rows": [row.as_json() for row in rows]}])
    page = kernels_page.page()
    assert "compiled, not run" in page and "3 binaries, 1 that do not hold" in page
    (line,) = [line for line in page.splitlines() if line.startswith("| matmul |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["matmul", *["–"] * 4, "3 · 112 · 3", "3 · 112 · 4 (110 spilt)"]
    assert "for tuning: 1, of which 1 spill" in page
    assert f"- gfx950 matmul: {SPILLS}" in page


def test_each_call_ends_alone_and_tells_how() -> None:
    def abort() -> int:
        os.write(2, b"LLVM ERROR: Cannot select\nstack dump\n")
        os.abort()

    def fail() -> int:
        quoted = "at 7:4:\n  x = tl.dot(a, b)\n      ^\n64 and 16 do not fit"
        raise RuntimeError("a line of the kernel that called it") from ValueError(quoted)

    def hang() -> int:
        time.sleep(60)
        return 1

    calls = [lambda: 1, abort, fail, hang, lambda: os._exit(3), lambda: 2]
    results = dict(call_apart(calls, at_once=2, seconds=2.0))
    assert (results[0], results[5]) == (1, 2)
    assert str(results[1]) == f"crashed: {signal.SIGABRT.name} (LLVM ERROR: Cannot select)"
    assert str(results[2]) == "ValueError: at 7:4: … 64 and 16 do not fit"
    assert str(results[3]) == "did not end within 2 s"
    assert str(results[4]) == "ended with 3"
    assert all(isinstance(results[index], NoResultError) for index in (1, 2, 3, 4))


def test_leaving_early_leaves_no_process_behind() -> None:
    def stay() -> int:
        time.sleep(60)
        return 0

    running = call_apart([os.getpid, stay, stay], at_once=3)
    assert next(running)[0] == 0
    assert len(multiprocessing.active_children()) == 2
    running.close()
    assert multiprocessing.active_children() == []
