"""Which rows of which expert a program works on, read off the experts' offsets: no table, no host."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(offsets, tile, EXPERTS: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, row after the expert's last) of the tile-th block of BLOCK_M sorted rows.

    offsets: int32 [EXPERTS + 1]. Experts have whole tiles of their own; past the last tile, expert >= EXPERTS.
    PADDED: EXPERTS rounded up to a power of two.
    """
    number = tl.arange(0, PADDED)
    here = number < EXPERTS
    begin = tl.load(offsets + number, mask=here, other=0)
    end = tl.load(offsets + number + 1, mask=here, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    after = tl.cumsum(tiles, 0)
    expert = tl.sum((after <= tile).to(tl.int32), 0)
    mine = number == expert
    first = tl.sum(tl.where(mine, begin + (tile - after + tiles) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def swizzle(program, rows, columns, GROUP: tl.constexpr):
    """(row tile, column tile) of a program, GROUP row tiles wide: neighbours share weights and rows in L2."""
    band = program // (GROUP * columns)
    first = band * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % height, inside // height
