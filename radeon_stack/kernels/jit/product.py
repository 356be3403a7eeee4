"""The loop that all products share: rows of activations times a tile of a weight, however it is stored."""

from __future__ import annotations

import triton
import triton.language as tl

from radeon_stack.kernels.jit.turned import multiply_turned, multiply_turned_both
from radeon_stack.kernels.jit.weights import NF4_BLOCK, nf4_decode, nf4_load, weight_tile


@triton.jit
def multiply(
    acc,
    x,
    x_row,
    k_size,
    w,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    w_row,
    column,
    columns,
    OVER_COLUMNS: tl.constexpr,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    AHEAD: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """acc + x[x_row, :k_size] · tile, in float32; float32 operands are multiplied as such, not in TF32.

    OVER_COLUMNS: the tile is wᵀ of the rows w_row (int64 [N], all real), `columns` is k_size and WIDTH is BLOCK_K.
    Else it is WIDTH columns from `column` on of the k_size rows that begin with w_row (int64 scalar).
    AHEAD: NF4 is decoded a step before it is used, while the matrix units work on the step before. It takes registers.
    TURNED: NF4 by turned.multiply_turned, ACROSS being TURNED; else 0.
    """
    step = tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = x.dtype.element_ty
    if AHEAD:
        row, place = _tile_at(w_row, column, 0, k_size, OVER_COLUMNS, BLOCK_K, WIDTH)
        packed, scale, outer = nf4_load(w, absmax, nested_absmax, row, place, columns, NESTED, WIDTH)
        tile = nf4_decode(packed, scale, outer, code, nested_code, nested_offset, NF4, NESTED, WIDTH, dtype)
        row, place = _tile_at(w_row, column, BLOCK_K, k_size, OVER_COLUMNS, BLOCK_K, WIDTH)
        packed, scale, outer = nf4_load(w, absmax, nested_absmax, row, place, columns, NESTED, WIDTH)
        for k in range(0, k_size, BLOCK_K):
            k_ok = k + step < k_size
            rows = tl.load(x + (x_row * k_size)[:, None] + (k + step)[None, :], mask=k_ok[None, :], other=0.0)
            acc = tl.dot(rows, tl.trans(tile) if OVER_COLUMNS else tile, acc, input_precision="ieee")
            tile = nf4_decode(packed, scale, outer, code, nested_code, nested_offset, NF4, NESTED, WIDTH, dtype)
            row, place = _tile_at(w_row, column, k + 2 * BLOCK_K, k_size, OVER_COLUMNS, BLOCK_K, WIDTH)
            packed, scale, outer = nf4_load(w, absmax, nested_absmax, row, place, columns, NESTED, WIDTH)
        return acc
    elif TURNED:
        return multiply_turned(
            acc, x, x_row, k_size, w, absmax, code, nested_absmax, nested_code, nested_offset,
            w_row, column, columns, OVER_COLUMNS, NF4, NESTED, TURNED, PAIRS, BLOCK_K,
        )  # fmt: skip
    else:
        for k in range(0, k_size, BLOCK_K):
            k_ok = k + step < k_size
            rows = tl.load(x + (x_row * k_size)[:, None] + (k + step)[None, :], mask=k_ok[None, :], other=0.0)
            row = w_row if OVER_COLUMNS else w_row + tl.minimum(k + step, k_size - 1)
            tile = weight_tile(
                w, absmax, code, nested_absmax, nested_code, nested_offset,
                row, k if OVER_COLUMNS else column, columns, NF4, NESTED, WIDTH, dtype,
            )  # fmt: skip
            acc = tl.dot(rows, tl.trans(tile) if OVER_COLUMNS else tile, acc, input_precision="ieee")
        return acc


@triton.jit
def multiply_both(
    acc,
    acc_tail,
    x,
    x_row,
    x_row_tail,
    k_size,
    w,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    w_row,
    column,
    columns,
    OVER_COLUMNS: tl.constexpr,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """multiply of the rows x_row and of a few more, x_row_tail, by the same tile, which is loaded and decoded once."""
    step = tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = x.dtype.element_ty
    if TURNED:
        return multiply_turned_both(
            acc, acc_tail, x, x_row, x_row_tail, k_size, w, absmax, code, nested_absmax, nested_code, nested_offset,
            w_row, column, columns, OVER_COLUMNS, NF4, NESTED, TURNED, PAIRS, BLOCK_K,
        )  # fmt: skip
    else:
        tl.assume(k_size > 0)  # see multiply_turned
        # The tail turned round: it is too flat for Hopper's matrix units, the tile is not.
        acc_tail = tl.trans(acc_tail)
        for k in range(0, k_size, BLOCK_K):
            k_ok = k + step < k_size
            rows = tl.load(x + (x_row * k_size)[:, None] + (k + step)[None, :], mask=k_ok[None, :], other=0.0)
            tail = tl.load(x + (x_row_tail * k_size)[:, None] + (k + step)[None, :], mask=k_ok[None, :], other=0.0)
            row = w_row if OVER_COLUMNS else w_row + tl.minimum(k + step, k_size - 1)
            tile = weight_tile(
                w, absmax, code, nested_absmax, nested_code, nested_offset,
                row, k if OVER_COLUMNS else column, columns, NF4, NESTED, WIDTH, dtype,
            )  # fmt: skip
            turned = tl.trans(tile)
            acc = tl.dot(rows, turned if OVER_COLUMNS else tile, acc, input_precision="ieee")
            across = tile if OVER_COLUMNS else turned
            acc_tail = tl.dot(across, tl.trans(tail), acc_tail, input_precision="ieee")
        return acc, tl.trans(acc_tail)


@triton.jit
def _tile_at(w_row, column, k, k_size, OVER_COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, first column) of the tile at k; past the end the last one's, which is loaded and never used."""
    if OVER_COLUMNS:
        if WIDTH > NF4_BLOCK:  # loads of wide tiles are masked
            return w_row, k
        else:
            return w_row, tl.multiple_of(tl.minimum(k, k_size - WIDTH), WIDTH)
    else:
        return w_row + tl.minimum(k + tl.arange(0, BLOCK_K), k_size - 1), column
