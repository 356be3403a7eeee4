"""A linear layer over an NF4 matrix with an adapter beside it; for many rows, what torch's product does not do."""

from __future__ import annotations

import triton
import triton.language as tl

from radeon_stack.kernels.jit.decode import decode_block
from radeon_stack.kernels.jit.product import multiply
from radeon_stack.kernels.jit.tiles import swizzle


@triton.jit(do_not_specialize=["rows", "rank"])
def low_rank_partials(
    x,
    factor,
    partials,
    rows,
    k_size,
    rank,
    OVER_COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partials[part] = x · factorᵀ (OVER_COLUMNS; factor: [rank, K]) or x · factor ([K, rank]) over a part of K.

    partials: float32 [SPLIT, rows, RANK]; RANK: rank padded. Whoever reads them adds them up, in their order.
    """
    low_rank_partial(
        tl.program_id(0), tl.program_id(1), x, factor, partials, rows, k_size, rank,
        OVER_COLUMNS, RANK, SPLIT, BLOCK_M, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "rank"])
def decode_and_low_rank(
    x,
    factor,
    partials,
    packed,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    matrix,
    rows,
    k_size,
    rank,
    size,
    OVER_COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """low_rank_partials and, into `matrix` of `size` values, decode_blocks in one launch.

    The partials' programs come first: each takes longer.
    """
    program = tl.program_id(0)
    m_tiles = tl.cdiv(rows, BLOCK_M)
    if program < m_tiles * SPLIT:
        low_rank_partial(
            program % m_tiles, program // m_tiles, x, factor, partials, rows, k_size, rank,
            OVER_COLUMNS, RANK, SPLIT, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    else:
        decode_block(
            program - m_tiles * SPLIT, packed, absmax, code, nested_absmax, nested_code, nested_offset, matrix, size,
            NF4, NESTED, BLOCK,
        )  # fmt: skip


@triton.jit
def low_rank_partial(
    m_tile,
    part,
    x,
    factor,
    partials,
    rows,
    k_size,
    rank,
    OVER_COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of a tile of rows, a part of low_rank_partials."""
    row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    x_row = tl.minimum(row, rows - 1).to(tl.int64)
    number = tl.arange(0, RANK)
    number_ok = number < rank
    share = tl.cdiv(tl.cdiv(k_size, BLOCK_K), SPLIT) * BLOCK_K
    acc = tl.zeros((BLOCK_M, RANK), tl.float32)
    for k in range(part * share, tl.minimum((part + 1) * share, k_size), BLOCK_K):
        step = k + tl.arange(0, BLOCK_K)
        ok = step < k_size
        values = tl.load(x + (x_row * k_size)[:, None] + step[None, :], mask=ok[None, :], other=0.0)
        if OVER_COLUMNS:
            place = (number * k_size)[:, None] + step[None, :]
            tile = tl.trans(tl.load(factor + place, mask=number_ok[:, None] & ok[None, :], other=0.0))
        else:
            place = (step * rank)[:, None] + number[None, :]
            tile = tl.load(factor + place, mask=ok[:, None] & number_ok[None, :], other=0.0)
        acc = tl.dot(values, tile.to(x.dtype.element_ty), acc, input_precision="ieee")
    place = ((part.to(tl.int64) * rows + row) * RANK)[:, None] + number[None, :]
    tl.store(partials + place, acc, mask=inside[:, None])


@triton.jit(do_not_specialize=["rows", "rank"])
def linear(
    x,
    w,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    bias,
    partials,
    factor,
    u,
    out,
    rows,
    n_size,
    k_size,
    rank,
    scale,
    OVER_COLUMNS: tl.constexpr,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """out = x · wᵀ + bias + scale · u · factorᵀ with OVER_COLUMNS; else x · w + scale · u · factor.

    w: [N, K] (else [K, N]). u: the sum of low_rank_partials, rounded; it is written too, [rows, rank]: the gradients
    need it. factor: [N, rank] (else [rank, N]): the adapter's b forward, its a back. RANK 0: no adapter.
    """
    m_tile, n_tile = swizzle(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(n_size, BLOCK_N), GROUP)
    row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    row = tl.minimum(row, rows - 1).to(tl.int64)
    column = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < n_size
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # The low-rank part first: afterwards it would need a second tile of accumulators beside the first.
    if RANK > 0:
        acc = low_rank_tile(
            partials, factor, u, row, inside, column, column_ok, n_tile == 0, rows, n_size, rank, scale,
            OVER_COLUMNS, RANK, SPLIT, BLOCK_M,
        )  # fmt: skip
    if OVER_COLUMNS:
        acc, _ = multiply(
            acc, acc, x, row, row, k_size, w, absmax, code, nested_absmax, nested_code, nested_offset,
            tl.minimum(column, n_size - 1).to(tl.int64), 0, k_size,
            False, True, NF4, NESTED, TURNED, PAIRS, BLOCK_K, BLOCK_K,
        )  # fmt: skip
    else:
        acc, _ = multiply(
            acc, acc, x, row, row, k_size, w, absmax, code, nested_absmax, nested_code, nested_offset,
            tl.zeros((), tl.int64), n_tile * BLOCK_N, n_size,
            False, False, NF4, NESTED, TURNED, PAIRS, BLOCK_K, BLOCK_N,
        )  # fmt: skip
    if BIAS:
        acc += tl.load(bias + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    place = out + (row * n_size)[:, None] + column[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside[:, None] & column_ok[None, :])


@triton.jit(do_not_specialize=["rows", "rank"])
def low_rank_product(
    partials,
    factor,
    bias,
    u,
    out,
    rows,
    n_size,
    rank,
    scale,
    OVER_COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    ONTO: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What `linear` gives but for x · wᵀ or x · w: out and u. ONTO: it is added to what out holds. SPLIT 0: of u."""
    n_tile = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    row = tl.minimum(row, rows - 1).to(tl.int64)
    column = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < n_size
    acc = low_rank_tile(
        partials, factor, u, row, inside, column, column_ok, n_tile == 0, rows, n_size, rank, scale,
        OVER_COLUMNS, RANK, SPLIT, BLOCK_M,
    )  # fmt: skip
    if BIAS:
        acc += tl.load(bias + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    place = out + (row * n_size)[:, None] + column[None, :]
    ok = inside[:, None] & column_ok[None, :]
    if ONTO:
        acc += tl.load(place, mask=ok, other=0.0).to(tl.float32)
    tl.store(place, acc.to(out.dtype.element_ty), mask=ok)


@triton.jit
def low_rank_tile(
    partials,
    factor,
    u,
    row,
    inside,
    column,
    column_ok,
    writes,
    rows,
    n_size,
    rank,
    scale,
    OVER_COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile of scale · u · factorᵀ or scale · u · factor, in float32; see `linear`.

    row: int64 [BLOCK_M], all real, those `inside` once; column: [BLOCK_N]. writes: whether u is stored. SPLIT 0: u is
    known, and read.
    """
    dtype = u.dtype.element_ty
    number = tl.arange(0, RANK)
    number_ok = number < rank
    place = u + (row * rank)[:, None] + number[None, :]
    if SPLIT > 0:
        low = tl.zeros((BLOCK_M, RANK), tl.float32)
        for part in tl.range(0, SPLIT, num_stages=1):  # unrolled, all parts would be in registers at once
            low += tl.load(partials + ((part * rows + row) * RANK)[:, None] + number[None, :])
        rounded = low.to(dtype)
        if writes:
            tl.store(place, rounded, mask=inside[:, None] & number_ok[None, :])
    else:
        rounded = tl.load(place, mask=number_ok[None, :], other=0.0)
    ok = number_ok[:, None] & column_ok[None, :]
    if OVER_COLUMNS:
        second = tl.load(factor + (column * rank)[None, :] + number[:, None], mask=ok, other=0.0)
    else:
        second = tl.load(factor + (number * n_size)[:, None] + column[None, :], mask=ok, other=0.0)
    return scale * tl.dot(rounded, second.to(dtype), input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "rank"])
def adapter_gradients(
    x,
    d_out,
    u,
    g,
    d_a,
    d_b,
    rows,
    n_size,
    k_size,
    rank,
    scale,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Both gradients in one launch: d_a [rank, K] = scale · gᵀ·x, and d_b [N, rank] = scale · d_outᵀ·u.

    x: [rows, K], d_out: [rows, N], u = x·aᵀ and g = d_out·b: [rows, rank]. A program makes BLOCK_C columns of x's or of
    d_out's, those of x first.
    """
    tile = tl.program_id(0)
    k_tiles = tl.cdiv(k_size, BLOCK_C)
    for_a = tile < k_tiles
    wide = x if for_a else d_out
    narrow = g if for_a else u
    size = k_size if for_a else n_size
    column = (tile if for_a else tile - k_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, RANK)
    column_ok, part_ok = column < size, part < rank
    acc = tl.zeros((BLOCK_C, RANK), tl.float32)
    for begin in range(0, rows, BLOCK_M):
        row = begin + tl.arange(0, BLOCK_M)
        ok = row < rows
        row = row.to(tl.int64)
        left = tl.load(wide + (row * size)[:, None] + column[None, :], mask=ok[:, None] & column_ok[None, :], other=0.0)
        right = tl.load(narrow + (row * rank)[:, None] + part[None, :], mask=ok[:, None] & part_ok[None, :], other=0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    acc = scale * acc
    ok = column_ok[:, None] & part_ok[None, :]
    if for_a:
        tl.store(d_a + (part * k_size)[None, :] + column[:, None], acc.to(d_a.dtype.element_ty), mask=ok)
    else:
        tl.store(d_b + (column * rank)[:, None] + part[None, :], acc.to(d_b.dtype.element_ty), mask=ok)
