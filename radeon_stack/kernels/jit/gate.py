"""Back through the gate, silu(gate) · up."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_gate_gradients(
    d_hidden,
    gate_up,
    d_gate_up,
    weighted,
    pair,
    place,
    routing_weight,
    ok,
    n_size,
    SAVE: tl.constexpr,
):
    """Stores d_gate and d_up of d_hidden, float32 [rows, columns] before the routing weight [rows, 1], and with SAVE
    weighted = routing_weight · hidden; gives Σ hidden · d_hidden, [rows].

    pair, place: where these columns of gate (up's are n_size further) and of weighted lie.
    """
    dtype = d_gate_up.dtype.element_ty
    gate = tl.load(gate_up + pair, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(gate_up + pair + n_size, mask=ok, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    if SAVE:
        tl.store(weighted + place, (routing_weight * silu * up).to(dtype), mask=ok)
    share = tl.sum(tl.where(ok, d_hidden * silu * up, 0.0), 1)
    d_hidden *= routing_weight
    tl.store(d_gate_up + pair, (d_hidden * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype), mask=ok)
    tl.store(d_gate_up + pair + n_size, (d_hidden * silu).to(dtype), mask=ok)
    return share


@triton.jit
def gate_backward(
    d_hidden,
    gate_up,
    slots,
    offsets,
    slot_weight,
    d_gate_up,
    d_weight,
    weighted,
    n_size,
    EXPERTS: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """gated_backward's end alone, of d_hidden [positions, N]; d_weight: [slots], the whole of it."""
    position = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = position < tl.load(offsets + EXPERTS)
    slot = tl.load(slots + position, mask=inside, other=0).to(tl.int64)
    routing_weight = tl.load(slot_weight + slot, mask=inside, other=0.0).to(tl.float32)[:, None]
    share = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, n_size, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        ok = inside[:, None] & (column < n_size)[None, :]
        place = (position * n_size)[:, None] + column[None, :]
        pair = (position * (2 * n_size))[:, None] + column[None, :]
        part = tl.load(d_hidden + place, mask=ok, other=0.0).to(tl.float32)
        share += store_gate_gradients(
            part, gate_up, d_gate_up, weighted, pair, place, routing_weight, ok, n_size, SAVE
        )  # fmt: skip
    tl.store(d_weight + slot, share, mask=inside)
