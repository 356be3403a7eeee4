"""Matrix products over expert-sorted rows.

TAIL: an expert's last tile may have as many rows more than BLOCK_M. Its program then makes two products by the same
tiles of the weight; those without such rows run a loop of their own, and pay nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from radeon_stack.kernels.jit.gate import store_gate_gradients
from radeon_stack.kernels.jit.product import multiply
from radeon_stack.kernels.jit.tiles import find_tile, rows_of, swizzle


@triton.jit
def low_rank(u, v, position, row, row_ok, column, columns, rank, OVER_COLUMNS: tl.constexpr, RANK: tl.constexpr):
    """u·vᵀ (or u·v): [rows, columns] in float32.

    u: [positions, rank]. v: OVER_COLUMNS [columns, rank], whose rows are `row`; else [rank, columns], where `row`
    are the rank's own rows and `column` the columns.
    """
    part = tl.arange(0, RANK)
    ok = part < rank
    left = tl.load(u + (position * rank)[:, None] + part[None, :], mask=ok[None, :], other=0.0)
    if OVER_COLUMNS:
        right = tl.load(v + (row * rank)[:, None] + part[None, :], mask=row_ok[:, None] & ok[None, :], other=0.0)
        return tl.dot(left, tl.trans(right.to(left.dtype)), input_precision="ieee")
    else:
        here = (column < columns)[None, :] & ok[:, None]
        right = tl.load(v + (row * columns)[:, None] + column[None, :], mask=here, other=0.0)
        return tl.dot(left, right.to(left.dtype), input_precision="ieee")


@triton.jit
def initial(
    u,
    v,
    position,
    row,
    row_ok,
    column,
    columns,
    rank,
    scale,
    OVER_COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """What a product is added to, float32 [rows, columns]: scale · low_rank, or with RANK 0 zeros."""
    if RANK > 0:
        return scale * low_rank(u, v, position, row, row_ok, column, columns, rank, OVER_COLUMNS, RANK)
    else:
        return tl.zeros((position.shape[0], column.shape[0]), tl.float32)


@triton.jit
def slots_at(slots, position, READ: tl.constexpr):
    """The slots at sorted positions, int64; unless READ, the positions."""
    if READ:
        return tl.load(slots + position).to(tl.int64)
    else:
        return position


@triton.jit
def token_of(slot, top_k):
    """The slot's token, int64. Slots have 32 bits; of 64 a division is a routine, where no compiler sees that."""
    return (slot.to(tl.int32) // top_k).to(tl.int64)


@triton.jit
def halves(acc):
    """[rows, columns] as the first half of the columns and the second.

    By turns they need half the registers for what is at hand beside them: all at once, the ends of wide tiles did not
    fit in a Hopper's, and left a Radeon fewer waves.
    """
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def store_product(
    acc,
    out,
    bias,
    slot_weight,
    position,
    slot,
    inside,
    bias_at,
    first_column,
    n_size,
    SCATTER: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """grouped_matmul's end, of [rows, columns]."""
    half_width: tl.constexpr = acc.shape[1] // 2
    row = (slot if SCATTER else position) * n_size
    first, second = halves(acc)
    if WEIGHTED:
        routing_weight = tl.load(slot_weight + slot).to(tl.float32)[:, None]
    for half in tl.static_range(2):
        part = second if half else first
        column = first_column + half * half_width + tl.arange(0, half_width)
        column_ok = column < n_size
        if BIAS:
            part += tl.load(bias + bias_at + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
        if WEIGHTED:
            part *= routing_weight
        place = out + row[:, None] + column[None, :]
        tl.store(place, part.to(out.dtype.element_ty), mask=inside[:, None] & column_ok[None, :])


@triton.jit(do_not_specialize=["m_tiles", "top_k", "rank"])
def grouped_matmul(
    x,
    slots,
    offsets,
    w,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    bias,
    slot_weight,
    u,
    v,
    out,
    n_size,
    k_size,
    top_k,
    rank,
    lora_scale,
    m_tiles,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    OVER_COLUMNS: tl.constexpr,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """out = x · wᵀ (OVER_COLUMNS; w: [E, N, K]) or x · w (w: [E, K, N]), + bias + lora_scale · u·v, times slot_weight.

    x rows: sorted positions, or with GATHER slots[position] // top_k. out rows: positions, or slots with SCATTER.
    """
    m_tile, n_tile = swizzle(tl.program_id(0), m_tiles, tl.cdiv(n_size, BLOCK_N), GROUP)
    expert, first, last = find_tile(offsets, m_tile, EXPERTS, PADDED, BLOCK_M, TAIL)
    if expert >= EXPERTS:
        return
    position, inside = rows_of(first, last, BLOCK_M)
    slot = slots_at(slots, position, GATHER or SCATTER or WEIGHTED)
    x_row = token_of(slot, top_k) if GATHER else position
    column = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < n_size
    matrix = expert.to(tl.int64)
    v_row = matrix * n_size + column if OVER_COLUMNS else matrix * rank + tl.arange(0, RANK if RANK > 0 else 1)
    acc = initial(u, v, position, v_row, column_ok, column, n_size, rank, lora_scale, OVER_COLUMNS, RANK)
    w_row = matrix * n_size + tl.minimum(column, n_size - 1) if OVER_COLUMNS else matrix * k_size
    w_column = 0 if OVER_COLUMNS else n_tile * BLOCK_N
    columns = k_size if OVER_COLUMNS else n_size
    width: tl.constexpr = BLOCK_K if OVER_COLUMNS else BLOCK_N
    if TAIL > 0 and last - first > BLOCK_M:
        position_tail, inside_tail = rows_of(first + BLOCK_M, last, TAIL)
        slot_tail = slots_at(slots, position_tail, GATHER or SCATTER or WEIGHTED)
        x_row_tail = token_of(slot_tail, top_k) if GATHER else position_tail
        acc_tail = initial(
            u, v, position_tail, v_row, column_ok, column, n_size, rank, lora_scale, OVER_COLUMNS, RANK
        )  # fmt: skip
        acc, acc_tail = multiply(
            acc, acc_tail, x, x_row, x_row_tail, k_size, w, absmax, code, nested_absmax, nested_code, nested_offset,
            w_row, w_column, columns, True, OVER_COLUMNS, NF4, NESTED, TURNED, PAIRS, BLOCK_K, width,
        )  # fmt: skip
        store_product(
            acc_tail, out, bias, slot_weight, position_tail, slot_tail, inside_tail, matrix * n_size,
            n_tile * BLOCK_N, n_size, SCATTER, BIAS, WEIGHTED,
        )  # fmt: skip
    else:
        acc, _ = multiply(
            acc, acc, x, x_row, x_row, k_size, w, absmax, code, nested_absmax, nested_code, nested_offset,
            w_row, w_column, columns, False, OVER_COLUMNS, NF4, NESTED, TURNED, PAIRS, BLOCK_K, width,
        )  # fmt: skip
    store_product(
        acc, out, bias, slot_weight, position, slot, inside, matrix * n_size,
        n_tile * BLOCK_N, n_size, SCATTER, BIAS, WEIGHTED,
    )  # fmt: skip


@triton.jit
def store_gated(acc, gate_up, hidden, position, inside, first_column, n_size, SAVE: tl.constexpr):
    """gated_forward's end, of [rows, 2 · columns]: gate beside up."""
    dtype = hidden.dtype.element_ty
    half_width: tl.constexpr = acc.shape[1] // 4
    first, second = halves(acc)
    for half in tl.static_range(2):
        part = second if half else first
        gate, up = part.reshape(part.shape[0], half_width, 2).split()
        column = first_column + half * half_width + tl.arange(0, half_width)
        ok = inside[:, None] & (column < n_size)[None, :]
        place = (position * n_size)[:, None] + column[None, :]
        if SAVE:
            # silu'(gate) is taken from what is stored: round first, so that both directions see the same gate.
            gate = gate.to(dtype).to(tl.float32)
            up = up.to(dtype).to(tl.float32)
            both = gate_up + (position * (2 * n_size))[:, None] + column[None, :]
            tl.store(both, gate.to(dtype), mask=ok)
            tl.store(both + n_size, up.to(dtype), mask=ok)
        tl.store(hidden + place, (gate * tl.sigmoid(gate) * up).to(dtype), mask=ok)


@triton.jit(do_not_specialize=["m_tiles", "top_k", "rank"])
def gated_forward(
    x,
    slots,
    offsets,
    w,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    u,
    v,
    gate_up,
    hidden,
    n_size,
    k_size,
    top_k,
    rank,
    lora_scale,
    m_tiles,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    RANK: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """hidden = silu(gate) · up, where [gate up] = x[slots // top_k] · wᵀ; w: [E, 2N, K], gate's rows first.

    hidden: [positions, N]; gate_up: [positions, 2N], written with SAVE for the way back.
    """
    m_tile, n_tile = swizzle(tl.program_id(0), m_tiles, tl.cdiv(n_size, BLOCK_N), GROUP)
    expert, first, last = find_tile(offsets, m_tile, EXPERTS, PADDED, BLOCK_M, TAIL)
    if expert >= EXPERTS:
        return
    position, inside = rows_of(first, last, BLOCK_M)
    x_row = token_of(slots_at(slots, position, True), top_k)
    # Gate's and up's rows by turns: one product makes both, and a thread holds a gate beside its up.
    pair = n_tile * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
    pair_ok = pair < 2 * n_size
    real = tl.minimum(pair, 2 * n_size - 1)
    w_row = expert.to(tl.int64) * (2 * n_size) + real // 2 + (real % 2) * n_size
    acc = initial(u, v, position, w_row, pair_ok, pair, n_size, rank, lora_scale, True, RANK)
    if TAIL > 0 and last - first > BLOCK_M:
        position_tail, inside_tail = rows_of(first + BLOCK_M, last, TAIL)
        x_row_tail = token_of(slots_at(slots, position_tail, True), top_k)
        acc_tail = initial(u, v, position_tail, w_row, pair_ok, pair, n_size, rank, lora_scale, True, RANK)
        acc, acc_tail = multiply(
            acc, acc_tail, x, x_row, x_row_tail, k_size, w, absmax, code, nested_absmax, nested_code, nested_offset,
            w_row, 0, k_size, True, True, NF4, NESTED, TURNED, PAIRS, BLOCK_K, BLOCK_K,
        )  # fmt: skip
        store_gated(acc_tail, gate_up, hidden, position_tail, inside_tail, n_tile * BLOCK_N, n_size, SAVE)
    else:
        acc, _ = multiply(
            acc, acc, x, x_row, x_row, k_size, w, absmax, code, nested_absmax, nested_code, nested_offset,
            w_row, 0, k_size, False, True, NF4, NESTED, TURNED, PAIRS, BLOCK_K, BLOCK_K,
        )  # fmt: skip
    store_gated(acc, gate_up, hidden, position, inside, n_tile * BLOCK_N, n_size, SAVE)


@triton.jit
def store_gradients(
    acc,
    gate_up,
    d_gate_up,
    d_weight,
    weighted,
    slot_weight,
    position,
    slot,
    inside,
    first_column,
    n_size,
    SAVE: tl.constexpr,
):
    """gated_backward's end, of d_hidden's [rows, columns] before the routing weight."""
    half_width: tl.constexpr = acc.shape[1] // 2
    routing_weight = tl.load(slot_weight + slot).to(tl.float32)[:, None]
    share = tl.zeros((acc.shape[0],), tl.float32)
    first, second = halves(acc)
    for half in tl.static_range(2):
        part = second if half else first
        column = first_column + half * half_width + tl.arange(0, half_width)
        ok = inside[:, None] & (column < n_size)[None, :]
        pair = (position * (2 * n_size))[:, None] + column[None, :]
        share += store_gate_gradients(
            part, gate_up, d_gate_up, weighted, pair, (position * n_size)[:, None] + column[None, :],
            routing_weight, ok, n_size, SAVE,
        )  # fmt: skip
    n_tile, n_tiles = first_column // (2 * half_width), tl.cdiv(n_size, 2 * half_width)
    tl.store(d_weight + slot * n_tiles + n_tile, share, mask=inside)


@triton.jit(do_not_specialize=["m_tiles", "top_k", "rank"])
def gated_backward(
    d_out,
    slots,
    offsets,
    w,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    slot_weight,
    u,
    v,
    gate_up,
    d_gate_up,
    d_weight,
    weighted,
    n_size,
    k_size,
    top_k,
    rank,
    lora_scale,
    m_tiles,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    RANK: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Back through the down projection and the gate in one go.

    d_hidden = d_out[slots // top_k] · w (w: [E, K, N], K the model's width), then, with hidden = silu(gate) · up:
    d_gate_up [positions, 2N] = slot_weight · d_hidden · (up · silu'(gate), silu(gate)), and
    d_weight [slots, n_tiles] float32: this tile's share of Σ hidden · d_hidden, the routing weight's gradient.
    With SAVE, weighted [positions, N] = slot_weight · hidden: what the down projection's own gradients are made of.
    """
    n_tiles = tl.cdiv(n_size, BLOCK_N)
    m_tile, n_tile = swizzle(tl.program_id(0), m_tiles, n_tiles, GROUP)
    expert, first, last = find_tile(offsets, m_tile, EXPERTS, PADDED, BLOCK_M, TAIL)
    if expert >= EXPERTS:
        return
    position, inside = rows_of(first, last, BLOCK_M)
    slot = slots_at(slots, position, True)
    d_row = token_of(slot, top_k)
    column = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < n_size
    matrix = expert.to(tl.int64)
    v_row = matrix * rank + tl.arange(0, RANK if RANK > 0 else 1)
    acc = initial(u, v, position, v_row, column_ok, column, n_size, rank, lora_scale, False, RANK)
    if TAIL > 0 and last - first > BLOCK_M:
        position_tail, inside_tail = rows_of(first + BLOCK_M, last, TAIL)
        slot_tail = slots_at(slots, position_tail, True)
        acc_tail = initial(u, v, position_tail, v_row, column_ok, column, n_size, rank, lora_scale, False, RANK)
        acc, acc_tail = multiply(
            acc, acc_tail, d_out, d_row, token_of(slot_tail, top_k), k_size,
            w, absmax, code, nested_absmax, nested_code, nested_offset,
            matrix * k_size, n_tile * BLOCK_N, n_size, True, False, NF4, NESTED, TURNED, PAIRS, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        store_gradients(
            acc_tail, gate_up, d_gate_up, d_weight, weighted, slot_weight, position_tail, slot_tail, inside_tail,
            n_tile * BLOCK_N, n_size, SAVE,
        )  # fmt: skip
    else:
        acc, _ = multiply(
            acc, acc, d_out, d_row, d_row, k_size, w, absmax, code, nested_absmax, nested_code, nested_offset,
            matrix * k_size, n_tile * BLOCK_N, n_size, False, False, NF4, NESTED, TURNED, PAIRS, BLOCK_K, BLOCK_N,
        )  # fmt: skip
    store_gradients(
        acc, gate_up, d_gate_up, d_weight, weighted, slot_weight, position, slot, inside,
        n_tile * BLOCK_N, n_size, SAVE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["a_top_k", "b_top_k"])
def grouped_outer(
    a,
    b,
    slots,
    offsets,
    out,
    n_size,
    k_size,
    a_top_k,
    b_top_k,
    scale,
    A_GATHER: tl.constexpr,
    B_GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[e] = scale · aᵀ·b over the expert's rows: a weight's gradient [E, N, K]; zeros where it has none."""
    n_tile, k_tile, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    n_ok, k_ok = n < n_size, k < k_size
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(begin, end, BLOCK_M):
        position = first + tl.arange(0, BLOCK_M)
        ok = position < end
        a_row = position.to(tl.int64)
        b_row = a_row
        if A_GATHER:
            a_row = token_of(tl.load(slots + position, mask=ok, other=0), a_top_k)
        if B_GATHER:
            b_row = token_of(tl.load(slots + position, mask=ok, other=0), b_top_k)
        left = tl.load(a + (a_row * n_size)[:, None] + n[None, :], mask=ok[:, None] & n_ok[None, :], other=0.0)
        right = tl.load(b + (b_row * k_size)[:, None] + k[None, :], mask=ok[:, None] & k_ok[None, :], other=0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    place = out + expert.to(tl.int64) * n_size * k_size + (n * k_size)[:, None] + k[None, :]
    tl.store(place, (scale * acc).to(out.dtype.element_ty), mask=n_ok[:, None] & k_ok[None, :])
