"""A tile of a weight matrix, whatever it is stored as."""

from __future__ import annotations

import triton
import triton.language as tl

NF4_BLOCK = tl.constexpr(64)  # values that share an absmax: bitsandbytes' block size
NESTED_BLOCK = tl.constexpr(256)  # absmax values that share one of their own: its double quantisation


@triton.jit
def nf4_scales(absmax, nested_absmax, nested_code, nested_offset, index, mask, NESTED: tl.constexpr):
    """absmax of the blocks `index`, float32.

    Doubly quantised they are bytes: nested_code[byte] · nested_absmax[index / 256] + offset, rounded after each of the
    two operations as bitsandbytes rounds (the launch turns fused multiply-add off).
    """
    if NESTED:
        byte = tl.load(absmax + index, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested_code + byte) * tl.load(nested_absmax + index // NESTED_BLOCK, mask=mask, other=0.0)
        return scale + tl.load(nested_offset)
    return tl.load(absmax + index, mask=mask, other=0.0)


@triton.jit
def weight_tile(
    w,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    row,
    row_ok,
    column,
    columns,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    WIDTH: tl.constexpr,
    dtype: tl.constexpr,
):
    """[rows, WIDTH] of a row-major matrix of `columns` columns, from column `column` on, in `dtype`.

    row: int64 [R], rows counted over all experts; row_ok: bool [R]. What lies outside is 0.
    NF4: two values a byte, the first in its high half; `columns` and `column` are multiples of 64.
    """
    if NF4:
        half = column // 2 + tl.arange(0, WIDTH // 2)
        ok = row_ok[:, None] & (half < columns // 2)[None, :]
        packed = tl.load(w + (row * (columns // 2))[:, None] + half[None, :], mask=ok, other=0).to(tl.int32)
        values = tl.join(tl.load(code + (packed >> 4)), tl.load(code + (packed & 15)))
        block = column // NF4_BLOCK + tl.arange(0, WIDTH // NF4_BLOCK)
        block_ok = row_ok[:, None] & (block < columns // NF4_BLOCK)[None, :]
        index = (row * (columns // NF4_BLOCK))[:, None] + block[None, :]
        scale = nf4_scales(absmax, nested_absmax, nested_code, nested_offset, index, block_ok, NESTED)
        shape: tl.constexpr = (row.shape[0], WIDTH // NF4_BLOCK, NF4_BLOCK)
        values = tl.reshape(values, shape) * scale[:, :, None]
        return tl.reshape(values, (row.shape[0], WIDTH)).to(dtype)
    place = column + tl.arange(0, WIDTH)
    ok = row_ok[:, None] & (place < columns)[None, :]
    return tl.load(w + (row * columns)[:, None] + place[None, :], mask=ok, other=0.0).to(dtype)
