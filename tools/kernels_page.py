"""docs/kernels.md: text, and the figures of kernels_audit, flash_attn_audit and liger_audit in benchmarks/."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from radeon_stack.kernels.audit.chips import CHIPS
from radeon_stack.kernels.audit.table import markdown_table, matrix_cell, spills_cell

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
Row = Mapping[str, Any]

# An R9700: WGPs (of two CUs), L2, L3, and bytes a second of its memory.
SIZES = "https://rocm.docs.amd.com/en/latest/reference/gpu-arch-specs.html"
WGPS, L2, L3, BANDWIDTH = 32, 8 << 20, 64 << 20, 640e9
MEASURED = "https://github.com/unslothai/unsloth/pull/3740"
MAIN_PERF = "https://github.com/ROCm/flash-attention/blob/0038a5c5/flash_attn/flash_attn_triton_amd/bwd.py"
FORWARD_MS, BACKWARD_MS = 7.05, 70.68
BASE = "3.5.1"  # the triton of the ROCm 7.1.1 base, with which it was measured

HEAD = """<!-- written by tools/docs.py; edit what it reads -->
# Kernels on AMD GPUs: compiled, not run

Nothing here was run on an AMD GPU. Stock Triton compiles for one on any machine, exactly as a launch there would, and
the binary tells what it needs. It does not tell how fast it is.

    radeon-stack image audit --kernels --arch gfx1201                     # by this Python's triton
    radeon-stack image audit --kernels radeon-stack/train:rocm7.1.1-…     # by an image's own
    make kernels                                                          # two tritons, six GPUs: what has changed
    make kernels ALL=1                                                    # … and what has not
    python -m radeon_stack.kernels.warm --target gfx1201 FOLDER           # as images for GPUs ship them, compiled

With RADEON_STACK_KERNELS=FOLDER a run by the same triton finds the last ones and does not compile them: the launcher
itself made the keys, of the sources, the arguments' types and alignments, the options, Triton's own files and the
variables that change what it makes (TRITON_DEFAULT_FP_FUSION, AMDGCN_USE_BUFFER_OPS and others). FOLDER may be
read-only. That all which the recipes launch is there is tested with stand-ins for tensors; what it takes and saves:
[shipped_kernels.json](../benchmarks/shipped_kernels.json).

`make kernels` takes from [kernels_audit.json](../benchmarks/kernels_audit.json) what has the same digest there: of the
code of a kernel and of all that it calls, constants and types, target, triton, and what judges the binary. One in
twenty of these it compiles all the same, each day others: figures that differ are found, but that code has up to 2 %
more or less, since Triton 3.9 itself does not repeat to the byte. `RECORD=1` writes that file.

Exit 7: a dot without matrix instructions, vector registers or scratch memory spilt in a default configuration, more
than 64 KiB of LDS, no binary, or a record that is wrong.

- **matrix**: WMMA or MFMA instructions as they stand in the code.
- **VGPR**: vector registers of a lane, of 256 that can be addressed (gfx942 and gfx950: 512, accumulation registers
  included). **spills**: registers that did not fit and live in memory; `+…s`: scalar ones, which live in lanes of
  vector registers, cost an instruction each way, and are told without being held against a kernel. **scratch**: bytes
  of memory for each work-item.
- **LDS**: bytes of a workgroup.
- **waves/SIMD**: waves that a SIMD holds when it is full: of 16, on gfx942 and gfx950 of 8; from registers, LDS and
  workgroup size as [LLVM counts them](../radeon_stack/kernels/audit/chips.py), workgroups whole.
"""


FLASH = f"""## What the binary shows about the slow backward on gfx1201

On an R9700 with ROCm 7.1.1, flash-attn's Triton backend took {FORWARD_MS} ms forward and {BACKWARD_MS} ms backward
({{shape}}; [measured by others]({MEASURED}), with ROCm/flash-attention's main_perf). Here
flash-attn {{version}} is audited ({{date}}, `tools/flash_attn_audit.py`): its own host code was called at that shape,
and what it would have launched was compiled with the blocks and options it chose. Not causal, unless said:

**Spills.** With triton {{base}} the two kernels of its default backward (`split`) spill {{spills}} vector registers of
a lane, with {{newest}} {{newest_spills}}; the forward {{forward_spills}}. They spill inside the loop: loads and stores
of spilled registers {{dkdv_loop}} WMMA in each pass of dK and dV's, {{dq_loop}} in dQ's.

**Why.** Blocks and warps are fixed in its code, at what suits CDNA: {{warps}} warps are {{cdna_lanes}} work-items where
a wave has 64, and {{lanes}} here, where it has 32. The two accumulators of dK and dV, {{tile}} in float32, alone need
{{accumulators}} registers of each lane: all that a lane can address. For gfx942, where a lane has 512 and twice the
lanes share the work, the same two kernels spill {{cdna_spills}}. There are smaller blocks for RDNA, but for the forward
alone, and only with FLASH_ATTENTION_TRITON_AMD_AUTOTUNE set; the backward is tuned for no GPU.

**What that costs, by arithmetic and not by measurement.** If every pass does all that stands in its loop, the spills of
one backward move {{moved}} GB. From memory at {BANDWIDTH / 1e9:.0f} GB/s that alone would take {{memory_ms}} ms; over
{BACKWARD_MS} ms it is {{rate}} TB/s. The private memory of all waves that the GPU then holds is {{resident}} MiB: more
than L2 ({L2 >> 20} MiB), less than L3 ({L3 >> 20} MiB; [sizes]({SIZES})).

**What it is not.** {{dots}}; none is left to vector instructions in float32. {{occupancy}} waves of a SIMD, for
{{lds}} KiB of LDS, are hardly fewer than the forward's {{forward_occupancy}}. The default has {{atomics}} atomics (the
variant `fused` adds dQ up in bfloat16 with them, and spills more). It does seven products instead of five, {{work}}
GFLOP: {{backward_rate}} TFLOP/s over the measured time, where the forward reached {{forward_rate}}.

**What would help, compiled too and not run.** With 8 warps the same kernels spill {{wider_spills}}, with 16 warps
{{widest_spills}}, and dQ's loop then has {{widest_dq_loop}} loads and stores of spilled registers. Until somebody has
measured it: `attn_implementation="sdpa"`.

**What it does not show.** How long anything takes; what AMD's own build of Triton, which the base has, makes of the
kernels; how much of the spills L2 and L3 absorb; what else is slow beside them. main_perf was not compiled here; a
later state of it [fixes]({MAIN_PERF}) 128 columns and 4 warps too, for every GPU but gfx942.
"""


LIGER = """## Liger's kernels

What `speed.liger` puts into a model, of liger-kernel {version}, compiled too and not run ({date},
`tools/liger_audit.py`; [figures](../benchmarks/liger_audit.json)): {tokens} tokens in bf16, heads of {head}, frozen
weights, blocks and warps as it chooses them. Hidden sizes {sizes}. LDS is at most {lds} bytes. {spilling}
A GeGLU wider than 32768 columns is therefore left to torch; the others are fused.

VGPR · waves/SIMD (spills):
"""


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    ours, theirs = BENCHMARKS / "kernels_audit.json", BENCHMARKS / "flash_attn_audit.json"
    if ours.is_file():
        parts += _ours(json.loads(ours.read_text(encoding="utf-8")))
    if theirs.is_file():
        parts += _theirs(json.loads(theirs.read_text(encoding="utf-8")))
    liger = BENCHMARKS / "liger_audit.json"
    if liger.is_file():
        parts += _ligers(json.loads(liger.read_text(encoding="utf-8")))
    return "\n".join(parts)


def _ligers(record: Mapping[str, Any]) -> list[str]:
    shape, rows = record["shape"], [row for found in record["triton"].values() for row in found]
    widths = {row["hidden"]: row["columns"] for row in rows}
    spilling: dict[str, list[int]] = {}
    for row in rows:
        if row.get("vgpr_spills"):
            spilling.setdefault(f"{row['call']} of {widths[row['hidden']]} columns", []).append(row["vgpr_spills"])
    told = [f"{name} {min(found)} to {max(found)}" for name, found in sorted(spilling.items())]
    text = LIGER.format(
        version=record["liger_kernel"],
        date=record["date"],
        tokens=shape["tokens"],
        head=shape["head_dim"],
        sizes=", ".join(f"{hidden} (MLP {width})" for hidden, width in widths.items()),
        lds=max(row.get("lds", 0) for row in rows),
        spilling=f"Registers spilt: {'; '.join(told)}; elsewhere none." if told else "Nothing spills.",
    )
    parts = ["\n\n".join(_filled(one) if not one.startswith("##") else one for one in text.split("\n\n")), ""]
    for version, found in record["triton"].items():
        kinds = dict.fromkeys((row["call"], row["pass"]) for row in found)
        places = dict.fromkeys((row["gfx"], row["hidden"]) for row in found)
        by_place = {(row["call"], row["pass"], row["gfx"], row["hidden"]): row for row in found}
        lines = [[" ".join(kind), *(_plain_cell(by_place.get((*kind, *place))) for place in places)] for kind in kinds]
        columns = ["kernel", *(f"{arch}, {hidden}" for arch, hidden in places)]
        parts += [
            f"### liger-kernel {record['liger_kernel']}, triton {version}",
            "",
            markdown_table(columns, lines),
            "",
        ]
    return parts


def _plain_cell(row: Row | None) -> str:
    """Of a kernel without products."""
    return "–" if row is None or "vgprs" not in row else _cell(row).removeprefix("0 · ")


def _ours(record: Mapping[str, Any]) -> list[str]:
    parts = ["## radeon-stack's kernels", ""]
    for version, audited in record["triton"].items():
        rows = audited["rows"]
        failed = [row for row in rows if row.get("findings")]
        told = f"{len(rows)} binaries, {len(failed)} that do not hold" if failed else f"{len(rows)} binaries, all hold"
        parts += [f"### triton {version} ({record['date']})", "", f"{told}. matrix · VGPR · waves/SIMD:", ""]
        names = list(dict.fromkeys(row["name"] for row in rows if row.get("default")))
        by_place = {(row["name"], row["arch"]): row for row in rows}
        lines = [[name, *(_cell(by_place.get((name, arch))) for arch in CHIPS)] for name in names]
        parts += [markdown_table(["kernel", *CHIPS], lines), ""]
        others = [row for row in rows if not row.get("default")]
        spilling = sum(1 for row in others if row.get("vgpr_spills"))
        if others:
            parts += [f"Besides the defaults, for tuning: {len(others)}, of which {spilling} spill.", ""]
        parts += [f"- {row['arch']} {row['name']}: {'; '.join(row['findings'])}" for row in failed]
    return [*parts, ""]


def _cell(row: Row | None) -> str:
    if row is None or "vgprs" not in row:
        return "–"
    spills = row.get("vgpr_spills", 0)
    cell = f"{sum(row.get('matrix', {}).values())} · {row['vgprs']} · {row['waves_per_simd']:g}"
    return f"{cell} ({spills} spilt)" if spills else cell


def _theirs(record: Mapping[str, Any]) -> list[str]:
    parts = ["\n\n".join(_filled(text) for text in FLASH.format(**_figures(record)).split("\n\n")), ""]
    for version, rows in record["triton"].items():
        parts += [f"### flash-attn {record['flash_attn']}, triton {version}", "", _flash_table(rows), ""]
        parts += [f"{row['case']}{_causal(row)}: {row['error']}\n" for row in rows if "error" in row]
        if any("error" in row for row in rows):
            parts += ["The package's interface imports every variant, so this triton cannot use it at all."]
        parts += [""]
    return parts


def _filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, 118, break_long_words=False, break_on_hyphens=False)


def _figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the text of the section is filled with."""
    shape, by_version = record["shape"], record["triton"]
    newest = list(by_version)[-1]
    rows = by_version[BASE]
    forward = _one(rows, "forward", "attn_fwd")
    names = [f"_bwd_kernel_{name}_noncausal" for name in ("dkdv", "dq")]

    def split(rows: Sequence[Row], **where: Any) -> list[Row]:
        return [_one(rows, "backward, split", name, **where) for name in names]

    default, wider, widest = split(rows), *(split(rows, changed={"num_warps": warps}) for warps in (8, 16))
    dkdv, dq = default
    product = 2 * shape["batch"] * shape["heads"] * shape["tokens"] ** 2 * shape["head_dim"]
    warps, tile = dkdv["options"]["num_warps"], dkdv["blocks"]["BLOCK_N"] * shape["head_dim"]
    moved = sum(_scratch_traffic(row, shape["tokens"]) for row in default)
    resident = WGPS * 4 * dkdv["waves_per_simd"] * 32 * dkdv["scratch"]
    bare = [row for row in (forward, *default) if any("matrix" in finding for finding in row["findings"])]
    sizes = f"batch {shape['batch']}, {shape['tokens']} tokens, {shape['heads']} heads of {shape['head_dim']}"
    return {
        "shape": f"{sizes}, {shape['dtype']}",
        "version": record["flash_attn"],
        "date": record["date"],
        "base": BASE,
        "newest": newest,
        "spills": _spills(default),
        "newest_spills": _spills(split(by_version[newest])),
        "forward_spills": forward["vgpr_spills"],
        "cdna_spills": _spills(split(rows, gfx="gfx942")),
        "wider_spills": _spills(wider),
        "widest_spills": _spills(widest),
        "widest_dq_loop": widest[1]["loops"][0]["scratch"],
        "dkdv_loop": _loop(dkdv),
        "dq_loop": _loop(dq),
        "warps": warps,
        "lanes": 32 * warps,
        "cdna_lanes": 64 * warps,
        "tile": f"{dkdv['blocks']['BLOCK_N']}×{shape['head_dim']}",
        "accumulators": f"2 × {tile} / {32 * warps} = {2 * tile // (32 * warps)}",
        "moved": f"{moved / 1e9:.0f}",
        "memory_ms": f"{1000 * moved / BANDWIDTH:.0f}",
        "rate": f"{moved / BACKWARD_MS / 1e9:.2f}",
        "resident": f"{resident / 2**20:.0f}",
        "dots": "Every dot is done by WMMA" if not bare else f"Not every dot of {len(bare)} kernels is done by WMMA",
        "occupancy": f"{dkdv['waves_per_simd']:g}",
        "forward_occupancy": f"{forward['waves_per_simd']:g}",
        "lds": dkdv["lds"] >> 10,
        "atomics": sum(sum(row["atomics"].values()) for row in default),
        "work": f"{7 * product / 1e9:.0f}",
        "backward_rate": f"{7 * product / BACKWARD_MS / 1e9:.1f}",
        "forward_rate": f"{2 * product / FORWARD_MS / 1e9:.1f}",
    }


def _spills(rows: Sequence[Row]) -> str:
    return " and ".join(str(row["vgpr_spills"]) for row in rows)


def _loop(row: Row) -> str:
    return f"{row['loops'][0]['scratch']} beside {row['loops'][0]['matrix']}"


def _scratch_traffic(row: Row, tokens: int) -> float:
    """Bytes that a launch's loop over all tokens moves for spilled registers."""
    step = min(row["blocks"]["BLOCK_M"], row["blocks"]["BLOCK_N"])
    items = 32 * row["options"]["num_warps"]
    for size in row["workgroups"]:
        items *= size
    return float(items * (tokens // step) * row["loops"][0]["scratch_bytes"])


def _one(
    rows: Sequence[Row], case: str, kernel: str, *, gfx: str = "gfx1201", changed: Mapping[str, int] | None = None
) -> Row:
    wanted = (case, kernel, gfx, changed or {}, False)
    keys = ("case", "kernel", "gfx", "changed", "causal")
    return next(row for row in rows if tuple(row.get(key) for key in keys) == wanted)


def _flash_table(rows: Sequence[Row]) -> str:
    columns = ("call", "kernel", "gfx", "blocks", "warps", "matrix", "VGPR", "spills", "scratch", "LDS", "waves/SIMD")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if "error" in row or (row["changed"] and not row["loops"]):
            continue
        changed = f" with {row['changed']['num_warps']} warps" if row["changed"] else ""
        blocks = [str(size) for name, size in row["blocks"].items() if "D_MODEL" not in name]
        line = (
            f"{row['case']}{changed}{_causal(row)}",
            f"`{row['kernel']}`",
            row["gfx"],
            "×".join(blocks),
            str(row["options"]["num_warps"]),
            matrix_cell(row["matrix"]),
            str(row["vgprs"]),
            spills_cell(row),
            str(row["scratch"]),
            str(row["lds"]),
            f"{row['waves_per_simd']:g}",
            "; ".join(f"{loop['scratch']} beside {loop['matrix']}" for loop in row["loops"]) or "–",
        )
        if line not in lines:  # configurations that differ only in what the compiler made nothing of
            lines.append(line)
    return markdown_table((*columns, "spill accesses in a loop"), lines)


def _causal(row: Row) -> str:
    return ", causal" if row["causal"] else ""
