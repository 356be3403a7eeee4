"""Products with a weight in 8-bit floats (e4m3fn), which is decoded in the loop: activations stay as they are."""

from __future__ import annotations

import triton
import triton.language as tl

from radeon_stack.kernels.jit.tiles import swizzle

SCALE_BLOCK = tl.constexpr(128)  # rows and columns that share a scale in block-wise FP8: DeepSeek-V3's
# How scales are laid out: the constants of the kernels' BLOCKS parameter.
CHANNEL = tl.constexpr(0)  # one for each row of the weight
BLOCK = tl.constexpr(1)  # one for each SCALE_BLOCK × SCALE_BLOCK


@triton.jit
def e4m3(code):
    """uint8 codes of e4m3fn (OCP OFP8 1.0) as float32, exactly; NaN for 0x7f and 0xff, subnormals too.

    Exponent and mantissa moved to where float32 has them are the value times 2^(7 - 127), subnormals included. Triton's
    own cast does the same on RDNA, but loses NaN there (480), and into float32 and float16 it is three times as long.
    """
    bits = code.to(tl.int32)
    magnitude = (bits & 0x7F) << 20
    value = (magnitude | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where(magnitude == 0x7F00000, float("nan"), value)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """float32 that holds a value of e4m3fn, in `dtype`: no bit is lost, so bfloat16 needs no rounding."""
    if dtype == tl.bfloat16:
        return (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit(do_not_specialize=["rows"])
def fp8_linear(
    x,
    w,
    scales,
    bias,
    out,
    rows,
    n_size,
    k_size,
    OVER_COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out [rows, n] = x [rows, k] · wᵀ + bias with OVER_COLUMNS (w: [n, k]); else x · w (w: [k, n]).

    w: uint8, codes of e4m3fn, row-major. scales: float32, [rows of w] or, with BLOCKS, [⌈rows / 128⌉, ⌈columns / 128⌉]:
    BLOCK_N and BLOCK_K then divide 128. Where a step's scale is one for all that is reduced, it is applied in float32
    to the sum; only a scale along the reduction (channels, on the way back) goes onto the weight, which is rounded.
    """
    m_tile, n_tile = swizzle(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(n_size, BLOCK_N), GROUP)
    dtype: tl.constexpr = x.dtype.element_ty
    row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    x_row = tl.minimum(row, rows - 1).to(tl.int64) * k_size
    column = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < n_size
    step = tl.arange(0, BLOCK_K)
    n_block = n_tile * BLOCK_N // SCALE_BLOCK
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, k_size, BLOCK_K):
        at = k + step
        k_ok = at < k_size
        left = tl.load(x + x_row[:, None] + at[None, :], mask=k_ok[None, :], other=0.0)
        if OVER_COLUMNS:
            w_row = tl.minimum(column, n_size - 1).to(tl.int64) * k_size
            value = e4m3(tl.load(w + w_row[:, None] + at[None, :], mask=k_ok[None, :], other=0))
        else:
            # Past the end the last row stands in: x is 0 there, and its NaN would be in the result anyway.
            w_row = tl.minimum(at, k_size - 1)
            value = e4m3(
                tl.load(w + (w_row.to(tl.int64) * n_size)[:, None] + column[None, :], mask=column_ok[None, :], other=0)
            )
        if BLOCKS:
            if OVER_COLUMNS:
                place = n_block * tl.cdiv(k_size, SCALE_BLOCK) + k // SCALE_BLOCK
            else:
                place = k // SCALE_BLOCK * tl.cdiv(n_size, SCALE_BLOCK) + n_block
            tile = narrow(value, dtype)
            part = tl.dot(left, tl.trans(tile) if OVER_COLUMNS else tile, input_precision="ieee")
            acc += part * tl.load(scales + place)
        elif OVER_COLUMNS:
            acc = tl.dot(left, tl.trans(narrow(value, dtype)), acc, input_precision="ieee")
        else:
            acc = tl.dot(left, (value * tl.load(scales + w_row)[:, None]).to(dtype), acc, input_precision="ieee")
    if OVER_COLUMNS and not BLOCKS:
        acc *= tl.load(scales + column, mask=column_ok, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    place = out + (row.to(tl.int64) * n_size)[:, None] + column[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside[:, None] & column_ok[None, :])


@triton.jit
def fp8_decode(w, scales, out, columns, BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr):
    """out [rows, columns] = value · scale, in float32, then rounded to out's dtype. BLOCK_C divides 128, or is more."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = column < columns
    value = e4m3(tl.load(w + row * columns + column, mask=ok, other=0))
    if BLOCKS:
        line = row // SCALE_BLOCK * tl.cdiv(columns, SCALE_BLOCK)
        value *= tl.load(scales + line + column // SCALE_BLOCK, mask=ok, other=0.0)
    else:
        value *= tl.load(scales + row)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=ok)
