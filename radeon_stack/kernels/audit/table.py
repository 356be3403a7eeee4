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
    """Columns that hold nothing but numbers to the right."""
    numbers = [all(row[place].replace(".", "").isdigit() for row in rows) for place in range(len(columns))]
    edges = ["--:" if number else ":--" for number in numbers]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, edges, *rows])


def row_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One row's cells, in the order of COLUMNS."""
    told = "; ".join([*(f"✗ {text}" for text in row["findings"]), *(f"· {text}" for text in row["remarks"])])
    name = row["name"] + ("" if row["default"] else " °")
    if "vgprs" not in row:
        return (name, row["arch"], *[""] * 8, told)
    figures = (row["vgprs"], row["agprs"], row["sgprs"], spills_cell(row), row["scratch"], row["lds"])
    return (name, row["arch"], matrix_cell(row["matrix"]), *map(str, figures), f"{row['waves_per_simd']:g}", told)


def matrix_cell(matrix: Mapping[str, int]) -> str:
    """ "32 wmma_f32_16x16x16_bf16", with every name that occurs."""
    return ", ".join(f"{count} {name.removeprefix('v_')}" for name, count in matrix.items()) or "-"


def spills_cell(row: Mapping[str, Any]) -> str:
    """Vector registers that are spilled, and after a plus scalar ones, if any."""
    return f"{row['vgpr_spills']}" + (f"+{row['sgpr_spills']}s" if row["sgpr_spills"] else "")
