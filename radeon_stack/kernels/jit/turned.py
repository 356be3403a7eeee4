"""The product turned round, outᵀ = tile · xᵀ, for CUDA: decoded NF4 goes from registers to the matrix units.

Hopper's matrix units take their left operand from registers and their right one from shared memory. Of a step's left
operand, ACROSS rows (16 a warp), thread (g, t) = (lane // 4, lane % 4) of a warp holds rows g and g + 8 of the warp's
16, and of every 16 values along the reduction 2t, 2t + 1, 2t + 8 and 2t + 9. All orders below are such that a thread
finds what it needs side by side in memory, and needs it nowhere else. Any order gives the same products, but others
send decoded values through shared memory. Triton moves the loads' layout up to the loads only where what it meets on
the way are loads, constants and what is done by element: no ranges, no scalars.
"""

from __future__ import annotations

import triton
import triton.language as tl

from radeon_stack.kernels.jit.weights import NESTED_BLOCK, NF4_BLOCK, SHUFFLE, lookup


@triton.jit
def multiply_turned(
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
    ACROSS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """product.multiply for NF4, k_size in whole steps. acc: [M, N], N a multiple of ACROSS; not over columns, once,
    twice or four times that.

    PAIRS: over columns, the reduction's order gives a thread words of its own, whose eight values it needs all. x comes
    in that order too, two values a load. Else four threads read the same word, and each takes another of its bytes.
    """
    each: tl.constexpr = acc.shape[1] // ACROSS
    acc = _turn(acc, ACROSS)
    if HAS_TAIL:
        acc_tail = _turn(acc_tail, ACROSS)
    table, shifts = _table(code, NF4), _shifts(code, 4 // each)
    w_row, step = _orders(w_row, OVER_COLUMNS, PAIRS, ACROSS, BLOCK_K)
    rows_at = x + (x_row * k_size)[:, None] + step[None, :]
    tail_at = x + (x_row_tail * k_size)[:, None] + step[None, :]
    # With a way past the loop its accumulators are defined twice, and ptxas waits for every single product.
    tl.assume(k_size > 0)
    for k in range(0, k_size, BLOCK_K):
        rows = tl.load(rows_at + k)
        tile = _tile(
            w, absmax, table, shifts, nested_absmax, nested_code, nested_offset,
            w_row, k, column, columns, OVER_COLUMNS, NF4, NESTED, ACROSS, each, PAIRS, BLOCK_K, x.dtype.element_ty,
        )  # fmt: skip
        acc = tl.dot(tile, tl.trans(rows), acc, input_precision="ieee")
        if HAS_TAIL:
            acc_tail = tl.dot(tile, tl.trans(tl.load(tail_at + k)), acc_tail, input_precision="ieee")
            acc_tail = _awaited(acc_tail, NF4)
        else:
            acc = _awaited(acc, NF4)
    return _turn_back(acc, ACROSS), _turn_back(acc_tail, ACROSS) if HAS_TAIL else acc_tail


@triton.jit
def _awaited(acc, NF4: tl.constexpr):
    """acc, when the products that go into it and all before them have ended.

    They read the decoded values from registers while the thread goes on. Triton lets a step's products run on into the
    next step, and NVIDIA's assembler before 13.3 has the next step's values written into the same registers meanwhile
    (triton-lang/triton issue 9433): with two programs a multiprocessor that gave wrong sums. A use ends the products.
    """
    if NF4 == SHUFFLE:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return acc


@triton.jit
def _turn(acc, ACROSS: tl.constexpr):
    """[M, N] → [N, M]. 2 · repeat neighbouring columns are one thread's: (warp, g, repeat, 2) → (repeat, warp, 2, g)"""
    m: tl.constexpr = acc.shape[0]
    n: tl.constexpr = acc.shape[1]
    acc = tl.permute(tl.reshape(acc, (m, ACROSS // 16, 8, n // ACROSS, 2)), (3, 1, 4, 2, 0))
    return tl.reshape(acc, (n, m))


@triton.jit
def _turn_back(acc, ACROSS: tl.constexpr):
    n: tl.constexpr = acc.shape[0]
    m: tl.constexpr = acc.shape[1]
    acc = tl.permute(tl.reshape(acc, (n // ACROSS, ACROSS // 16, 2, 8, m)), (4, 1, 3, 0, 2))
    return tl.reshape(acc, (m, n))


@triton.jit
def _orders(w_row, OVER_COLUMNS: tl.constexpr, PAIRS: tl.constexpr, ACROSS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(the weight's rows as _turn orders accumulators, a step's places along the reduction in the order of _along)."""
    step = tl.arange(0, BLOCK_K)
    if OVER_COLUMNS:
        n: tl.constexpr = w_row.shape[0]
        w_row = tl.reshape(w_row, (ACROSS // 16, 8, n // ACROSS, 2))
        w_row = tl.reshape(tl.permute(w_row, (2, 0, 3, 1)), (n,))
        if PAIRS:
            step = step // 64 * 64 + step // 2 % 4 * 16 + step // 16 % 4 * 4 + step // 8 % 2 * 2 + step % 2
    return w_row, step


@triton.jit
def _tile(
    w,
    absmax,
    table,
    shifts,
    nested_absmax,
    nested_code,
    nested_offset,
    w_row,
    k,
    column,
    columns,
    OVER_COLUMNS: tl.constexpr,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    ACROSS: tl.constexpr,
    EACH: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    dtype: tl.constexpr,
):
    """A step's left operand, [N, BLOCK_K]."""
    if OVER_COLUMNS:
        return _along(
            w, absmax, table, nested_absmax, nested_code, nested_offset,
            w_row, k, columns, NF4, NESTED, PAIRS, 2 if EACH == 1 else 1, BLOCK_K, dtype,
        )  # fmt: skip
    else:
        return _down(
            w, absmax, table, shifts, nested_absmax, nested_code, nested_offset,
            w_row, k, column, columns, NF4, NESTED, ACROSS // 16, EACH, BLOCK_K, dtype,
        )  # fmt: skip


@triton.jit
def _along(
    w,
    absmax,
    table,
    nested_absmax,
    nested_code,
    nested_offset,
    row,
    k,
    columns,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    PAIRS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    dtype: tl.constexpr,
):
    """[N, BLOCK_K]: columns k … of the rows `row` (int64 [N]).

    PARTS of a block load its scale each: of fewer than there are threads Triton makes loads of 32 lanes for one scale.
    """
    n: tl.constexpr = row.shape[0]
    wide: tl.constexpr = BLOCK_K // NF4_BLOCK
    blocks = columns // NF4_BLOCK  # of a row; a block is eight words of eight values
    words = w.to(tl.pointer_type(tl.int32)) + (row * (blocks * 8))[:, None] + tl.arange(0, wide * 8)[None, :]
    word = tl.load(words + k // 8)
    index = (row * blocks)[:, None] + (tl.arange(0, wide * PARTS) // PARTS + k // NF4_BLOCK)[None, :]
    factor = _factor(absmax, nested_absmax, nested_code, nested_offset, index, NESTED)
    if PAIRS:
        # Thread t's words are 2t and 2t + 1: (block, t, word, 4, 2, 2) → (block, word, 4, 2, t, 2).
        values = _eight(table, word, NF4)  # [N, words, 2, 2, 2], the number's lowest bit first
        values = tl.reshape(values, (n, wide * PARTS, 4 // PARTS, 2, 2, 2, 2))
        values = (values * factor[:, :, None, None, None, None, None]).to(dtype)
        values = tl.permute(tl.reshape(values, (n, wide, 4, 2, 2, 2, 2)), (0, 1, 3, 6, 5, 2, 4))
        return tl.reshape(values, (n, BLOCK_K))
    else:
        byte = word[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]
        values = tl.join(_value(table, byte, 4, NF4), _value(table, byte, 0, NF4))
        values = tl.reshape(values, (n, wide * PARTS, NF4_BLOCK // PARTS)) * factor[:, :, None]
        return tl.reshape(values, (n, BLOCK_K)).to(dtype)


@triton.jit
def _down(
    w,
    absmax,
    table,
    shifts,
    nested_absmax,
    nested_code,
    nested_offset,
    first,
    k,
    column,
    columns,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    WARPS: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    dtype: tl.constexpr,
):
    """[N, BLOCK_K]: the transpose of N columns from `column` on of the rows first + k …, those past the end anything.

    N is 16 · EACH a warp. Of a row a thread needs 2 · EACH values side by side: a word, a half or a byte of one, the
    rest of which is other threads'. They all load words: of less Triton would not move the layout up.
    """
    # Rows by warps, and in the order (8, 2, t): what the threads of a warp read at once lies side by side.
    number = tl.arange(0, WARPS * BLOCK_K)
    row = first + number % BLOCK_K // 8 * 8 + number % 4 * 2 + number // 4 % 2
    blocks = columns // NF4_BLOCK  # of a row; a block is 4 / EACH warps'
    warp = number // BLOCK_K
    block = tl.minimum(column // NF4_BLOCK + warp * EACH // 4, blocks - 1)  # warps past the last work on the last
    index = row * blocks + block
    words = w.to(tl.pointer_type(tl.int32)) + (index * 8 + warp * EACH % 4 * 2)[:, None]
    word = tl.load(words + tl.arange(0, 2 * EACH)[None, :] + k * (blocks * 8))
    factor = _factor(absmax, nested_absmax, nested_code, nested_offset, index + k * blocks, NESTED)
    rows: tl.constexpr = BLOCK_K // 8
    # (warp, 8, 2, t, g, the number's bits, lowest first) → (EACH, warp, 2, g, 8, t, 2)
    if EACH == 4:
        values = (_eight(table, word, NF4) * factor[:, None, None, None, None]).to(dtype)
        values = tl.permute(tl.reshape(values, (WARPS, rows, 2, 4, 8, 2, 2, 2)), (7, 6, 0, 5, 4, 1, 3, 2))
    elif EACH == 2:
        half = word[:, :, None] >> shifts[None, None, :]
        values = (_four(table, half, 0, NF4) * factor[:, None, None, None, None]).to(dtype)
        values = tl.permute(tl.reshape(values, (WARPS, rows, 2, 4, 8, 2, 2)), (6, 0, 5, 4, 1, 3, 2))
    else:
        byte = word[:, :, None] >> shifts[None, None, :]
        values = (_two(table, byte, 0, NF4) * factor[:, None, None, None]).to(dtype)
        values = tl.permute(tl.reshape(values, (WARPS, rows, 2, 4, 8, 2)), (0, 5, 4, 1, 3, 2))
    return tl.reshape(values, (16 * EACH * WARPS, BLOCK_K))


@triton.jit
def _factor(absmax, nested_absmax, nested_code, nested_offset, index, NESTED: tl.constexpr):
    """weights.nf4_scale of the blocks `index`, loaded."""
    scale = tl.load(absmax + index)
    if NESTED:
        offset = tl.load(nested_offset + tl.zeros_like(index).to(tl.int32))
        return tl.load(nested_code + scale.to(tl.int32)) * tl.load(nested_absmax + index // NESTED_BLOCK) + offset
    else:
        return scale


@triton.jit
def _eight(table, word, NF4: tl.constexpr):
    """The values of a word of 32 bits, float32 [..., 2, 2, 2]: the lowest bit of their number first."""
    return tl.join(_four(table, word, 0, NF4), _four(table, word, 16, NF4))


@triton.jit
def _four(table, word, AT: tl.constexpr, NF4: tl.constexpr):
    return tl.join(_two(table, word, AT, NF4), _two(table, word, AT + 8, NF4))


@triton.jit
def _two(table, word, AT: tl.constexpr, NF4: tl.constexpr):
    return tl.join(_value(table, word, AT + 4, NF4), _value(table, word, AT, NF4))


@triton.jit
def _table(code, NF4: tl.constexpr):
    """What _value looks values up in. SHUFFLE: [1, 1], in each lane another entry: the lane's own, modulo 16."""
    if NF4 == SHUFFLE:
        # Nothing is loaded: without an operand that might differ Triton would make a scalar of it.
        return tl.inline_asm_elementwise(
            "{.reg .u32 l, b; .reg .pred p<4>; .reg .f32 v<14>; mov.u32 l, %laneid;"
            " and.b32 b, l, 1; setp.ne.u32 p0, b, 0; and.b32 b, l, 2; setp.ne.u32 p1, b, 0;"
            " and.b32 b, l, 4; setp.ne.u32 p2, b, 0; and.b32 b, l, 8; setp.ne.u32 p3, b, 0;"
            " selp.f32 v0, 0fBF3239B1, 0fBF800000, p0; selp.f32 v1, 0fBECA32A0, 0fBF066B30, p0;"
            " selp.f32 v2, 0fBE3D353F, 0fBE91A24D, p0; selp.f32 v3, 0f00000000, 0fBDBA7871, p0;"
            " selp.f32 v4, 0f3E24CAE3, 0f3DA2FAFF, p0; selp.f32 v5, 0f3EAD033A, 0f3E7C04DD, p0;"
            " selp.f32 v6, 0f3F1007AB, 0f3EE1A4B8, p0; selp.f32 v7, 0f3F800000, 0f3F3913B3, p0;"
            " selp.f32 v8, v1, v0, p1; selp.f32 v9, v3, v2, p1; selp.f32 v10, v5, v4, p1; selp.f32 v11, v7, v6, p1;"
            " selp.f32 v12, v9, v8, p2; selp.f32 v13, v11, v10, p2; selp.f32 $0, v13, v12, p3;}",
            "=f,f",
            [tl.load(code + tl.zeros((1, 1), tl.int32))],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return code


@triton.jit
def _shifts(code, PARTS: tl.constexpr):
    """Where the parts of a word begin: 0, 32 / PARTS, …, int32 [PARTS]. Told from the table, which goes from -1 to 1:
    from a range Triton would not move the layout up.
    """
    if PARTS == 4:
        at = tl.load(code + 5 * tl.arange(0, 4))
        return 8 * ((at > -0.5).to(tl.int32) + (at > 0).to(tl.int32) + (at > 0.5).to(tl.int32))
    else:
        at = tl.load(code + 15 * tl.arange(0, 2))
        return tl.where(at > 0, 16, 0)


@triton.jit
def _value(table, word, AT: tl.constexpr, NF4: tl.constexpr):
    """float32: weights.lookup, in a _table, of bits AT to AT + 3."""
    if NF4 == SHUFFLE:
        if len(word.shape) == 3:
            mine = tl.broadcast_to(table[:, :, None], word.shape)
        else:
            mine = tl.broadcast_to(table, word.shape)
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, -1;",
            "=f,f,r",
            [mine, word >> AT],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return lookup(table, word >> AT, NF4)
