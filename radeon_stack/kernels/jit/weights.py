"""A tile of a weight matrix, whatever it is stored as."""

from __future__ import annotations

import triton
import triton.language as tl

NF4_BLOCK = tl.constexpr(64)  # values that share an absmax: bitsandbytes' block size
# How a weight is stored, and how its table is read: the constants of every kernel's NF4 parameter.
DENSE = tl.constexpr(0)  # 16 bit
SELECT = tl.constexpr(1)  # NF4, by fifteen selects: anywhere
SHUFFLE = tl.constexpr(2)  # NF4, by a warp shuffle: CUDA
NESTED_BLOCK = tl.constexpr(256)  # absmax values that share one of their own: its double quantisation


@triton.jit
def nf4_load(
    w,
    absmax,
    nested_absmax,
    row,
    column,
    columns,
    NESTED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(bytes [R, WIDTH / 2], their scales [R, blocks], the scales' scales) of a tile of a row-major NF4 matrix.

    row: int64 [R], rows counted over all experts, all of them real. Columns come in whole blocks of 64; those past the
    end hold nothing of use. Not doubly quantised, the third is the second again.
    """
    span: tl.constexpr = WIDTH if WIDTH < NF4_BLOCK else NF4_BLOCK  # columns of the tile that share a scale
    half = column // 2 + tl.arange(0, WIDTH // 2)
    block = column // NF4_BLOCK + tl.arange(0, WIDTH // span)
    index = (row * (columns // NF4_BLOCK))[:, None] + block[None, :]
    place = (row * (columns // 2))[:, None] + half[None, :]
    if WIDTH > NF4_BLOCK:  # narrower tiles never reach past the end
        packed = tl.load(w + place, mask=(half < columns // 2)[None, :], other=0)
        # Past the end the row's last scale stands in: if that is NaN, so is what the row gives.
        last = (row + 1) * (columns // NF4_BLOCK) - 1
        index = tl.minimum(index, last[:, None])
    else:
        packed = tl.load(w + place)
    scale = tl.load(absmax + index)
    if NESTED:
        return packed, scale, tl.load(nested_absmax + index // NESTED_BLOCK)
    else:  # a constant condition: Triton compiles one branch alone only where there are two
        return packed, scale, scale


@triton.jit
def nf4_scale(scale, outer, nested_code, nested_offset, NESTED: tl.constexpr):
    """absmax, float32. Doubly quantised: nested_code[scale] · outer + offset, rounded after each of the two operations
    as bitsandbytes rounds (the launch turns fused multiply-add off).
    """
    if NESTED:
        return tl.load(nested_code + scale.to(tl.int32)) * outer + tl.load(nested_offset)
    else:
        return scale


@triton.jit
def lookup(code, nibble, NF4: tl.constexpr):
    """code[nibble], float32. The nibble's higher bits may hold anything."""
    if NF4 == SHUFFLE:
        # Each lane holds an entry of the table and reads another's: no memory, and the fewest instructions a value.
        # Lanes 16 to 31 hold the table again, so the fifth bit that a shuffle looks at does not matter.
        mine = tl.inline_asm_elementwise(
            "{.reg .u32 l; .reg .u64 p; mov.u32 l, %laneid; and.b32 l, l, 15; mad.wide.u32 p, l, 4, $1;"
            " ld.global.nc.f32 $0, [p];}",
            "=f,l",
            [(code + tl.zeros_like(nibble)).to(tl.int64)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=f,f,r", [mine, nibble], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        low, second, third = (nibble & 1) != 0, (nibble & 2) != 0, (nibble & 4) != 0
        # bitsandbytes' table (create_normal_map in its functional.py; QLoRA, appendix E), as float32.
        zero_to_three = tl.where(
            second,
            tl.where(low, -0.39491748809814453, -0.5250730514526367),
            tl.where(low, -0.6961928009986877, -1.0),
        )
        four_to_seven = tl.where(
            second,
            tl.where(low, 0.0, -0.09105003625154495),
            tl.where(low, -0.18477343022823334, -0.28444138169288635),
        )
        eight_to_eleven = tl.where(
            second,
            tl.where(low, 0.33791524171829224, 0.24611230194568634),
            tl.where(low, 0.16093020141124725, 0.07958029955625534),
        )
        twelve_to_fifteen = tl.where(
            second,
            tl.where(low, 1.0, 0.7229568362236023),
            tl.where(low, 0.5626170039176941, 0.44070982933044434),
        )
        negative = tl.where(third, four_to_seven, zero_to_three)
        positive = tl.where(third, twelve_to_fifteen, eight_to_eleven)
        return tl.where((nibble & 8) != 0, positive, negative)


@triton.jit
def nf4_decode(
    packed,
    scale,
    outer,
    code,
    nested_code,
    nested_offset,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    WIDTH: tl.constexpr,
    dtype: tl.constexpr,
):
    """What nf4_load brought, decoded: [R, WIDTH] in `dtype`. Two values a byte, the first in its high half."""
    span: tl.constexpr = WIDTH if WIDTH < NF4_BLOCK else NF4_BLOCK
    wide = packed.to(tl.int32)
    values = tl.join(lookup(code, wide >> 4, NF4), lookup(code, wide, NF4))
    factor = nf4_scale(scale, outer, nested_code, nested_offset, NESTED)
    values = tl.reshape(values, (packed.shape[0], WIDTH // span, span)) * factor[:, :, None]
    return tl.reshape(values, (packed.shape[0], WIDTH)).to(dtype)


@triton.jit
def weight_tile(
    w,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    row,
    column,
    columns,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    WIDTH: tl.constexpr,
    dtype: tl.constexpr,
):
    """[R, WIDTH] of a row-major matrix of `columns` columns, from column `column` on, in `dtype`.

    row: int64 [R], rows counted over all experts, all of them real. In 16 bit, columns past the end are 0.
    """
    if NF4 != DENSE:
        packed, scale, outer = nf4_load(w, absmax, nested_absmax, row, column, columns, NESTED, WIDTH)
        return nf4_decode(packed, scale, outer, code, nested_code, nested_offset, NF4, NESTED, WIDTH, dtype)
    else:
        place = column + tl.arange(0, WIDTH)
        ok = (place < columns)[None, :]
        return tl.load(w + (row * columns)[:, None] + place[None, :], mask=ok, other=0.0).to(dtype)
