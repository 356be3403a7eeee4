"""The loop that all products share: rows of activations times a tile of a weight, however it is stored."""

from __future__ import annotations

import triton
import triton.language as tl

from radeon_stack.kernels.jit.turned import multiply_turned
from radeon_stack.kernels.jit.weights import weight_tile


@triton.jit
def multiply(
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
    HAS_TAIL: tl.constexpr,
    OVER_COLUMNS: tl.constexpr,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(acc + x[x_row, :k_size] · tile, the same of acc_tail and the rows x_row_tail), in float32; float32 operands are
    multiplied as such, not in TF32.

    OVER_COLUMNS: the tile is wᵀ of the rows w_row (int64 [N], all real), `columns` is k_size and WIDTH is BLOCK_K.
    Else it is WIDTH columns from `column` on of the k_size rows that begin with w_row (int64 scalar).
    HAS_TAIL: else acc_tail is given back as it is. The tile is loaded and decoded once for both.
    TURNED: NF4 by turned.multiply_turned, ACROSS being TURNED; else 0.
    """
    if TURNED:
        return multiply_turned(
            acc, acc_tail, x, x_row, x_row_tail, k_size, w, absmax, code, nested_absmax, nested_code, nested_offset,
            w_row, column, columns, HAS_TAIL, OVER_COLUMNS, NF4, NESTED, TURNED, PAIRS, BLOCK_K,
        )  # fmt: skip
    else:
        step = tl.arange(0, BLOCK_K)
        if HAS_TAIL:
            tl.assume(k_size > 0)  # see multiply_turned
            # The tail turned round: it is too flat for Hopper's matrix units, the tile is not.
            acc_tail = tl.trans(acc_tail)
        for k in range(0, k_size, BLOCK_K):
            k_ok = k + step < k_size
            rows = tl.load(x + (x_row * k_size)[:, None] + (k + step)[None, :], mask=k_ok[None, :], other=0.0)
            row = w_row if OVER_COLUMNS else w_row + tl.minimum(k + step, k_size - 1)
            tile = weight_tile(
                w, absmax, code, nested_absmax, nested_code, nested_offset,
                row, k if OVER_COLUMNS else column, columns, NF4, NESTED, WIDTH, x.dtype.element_ty,
            )  # fmt: skip
            acc = tl.dot(rows, tl.trans(tile) if OVER_COLUMNS else tile, acc, input_precision="ieee")
            if HAS_TAIL:
                tail = tl.load(x + (x_row_tail * k_size)[:, None] + (k + step)[None, :], mask=k_ok[None, :], other=0.0)
                across = tile if OVER_COLUMNS else tl.trans(tile)
                acc_tail = tl.dot(across, tl.trans(tail), acc_tail, input_precision="ieee")
        return acc, tl.trans(acc_tail) if HAS_TAIL else acc_tail
