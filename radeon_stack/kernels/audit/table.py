"""The audit's rows as a table of plain text, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("kernel", "gfx", "matrix", "VGPR", "AGPR", "SGPR", "spills", "scratch", "LDS", "waves/SIMD", "")
LEFT = ("kernel", "gfx", "matrix", "")


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned columns; rows as `Row.as_json` gives them."""
    cells = [COLUMNS, *(row_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if title in LEFT else cell.rjust(width)
            for title, cell, width in zip(COLUMNS, line, widths, strict=True)
        ).rstrip()
        for line in cells
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers to the right."""
    edges = [":--" if column in LEFT else "--:" for column in columns]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, edges, *rows])


def row_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One row's cells, in the order of COLUMNS."""
    told = "; ".join([*(f"✗ {text}" for text in row["findings"]), *(f"· {text}" for text in row["remarks"])])
    name = row["name"] + ("" if row["default"] else " °")
    if "vgprs" not in row:
        return (name, row["arch"], *[""] * 8, told)
    spills = f"{row['vgpr_spills']}" + (f"+{row['sgpr_spills']}s" if row["sgpr_spills"] else "")
    figures = (row["vgprs"], row["agprs"], row["sgprs"], spills, row["scratch"], row["lds"])
    return (name, row["arch"], matrix_cell(row["matrix"]), *map(str, figures), f"{row['waves_per_simd']:g}", told)


def matrix_cell(matrix: Mapping[str, int]) -> str:
    """ "32 wmma_f32_16x16x16_bf16", with every name that occurs."""
    return ", ".join(f"{count} {name.removeprefix('v_')}" for name, count in matrix.items()) or "-"
