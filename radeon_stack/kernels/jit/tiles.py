"""Which rows of which expert a program works on, read off the experts' offsets: no table, no host."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(offsets, tile, EXPERTS: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr):
    """(expert, first row, row after the last that counts) of the tile-th block of BLOCK_M sorted rows.

    offsets: int32 [EXPERTS + 1]. Experts have whole tiles of their own; past the last tile, expert >= EXPERTS.
    TAIL: an expert's last tile takes up to as many rows more, and `last - first` then is the tile's own number of rows;
    else `last` is the expert's. PADDED: EXPERTS rounded up to a power of two.
    """
    number = tl.arange(0, PADDED)
    here = number < EXPERTS
    begin = tl.load(offsets + number, mask=here, other=0)
    end = tl.load(offsets + number + 1, mask=here, other=0)
    if TAIL > 0:
        rows = end - begin
        tiles = tl.minimum(rows, tl.maximum((rows - TAIL + BLOCK_M - 1) // BLOCK_M, 1))
    else:
        tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    after = tl.cumsum(tiles, 0)
    expert = tl.sum((after <= tile).to(tl.int32), 0)
    mine = number == expert
    first = tl.sum(tl.where(mine, begin + (tile - after + tiles) * BLOCK_M, 0), 0)
    last = tl.sum(tl.where(mine, end, 0), 0)
    if TAIL > 0:
        last = tl.where(last - first > BLOCK_M + TAIL, first + BLOCK_M, last)
    return expert, first, last


@triton.jit
def rows_of(first, last, ROWS: tl.constexpr):
    """(positions, which of them count): ROWS of them from `first` on, int64.

    Those past the end repeat the last one: loads need no mask, and their results are not stored.
    """
    position = first + tl.arange(0, ROWS)
    inside = position < last
    return tl.minimum(position, last - 1).to(tl.int64), inside


@triton.jit
def swizzle(program, rows, columns, GROUP: tl.constexpr):
    """(row tile, column tile) of a program, GROUP row tiles wide: neighbours share weights and rows in L2."""
    band = program // (GROUP * columns)
    first = band * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % height, inside // height
