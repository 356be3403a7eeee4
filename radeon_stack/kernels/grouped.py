"""Launches of the grouped products; autograd is `experts.py`'s.

A weight is [experts, rows, columns], 16 bit or NF4. `over_columns`: the reduction runs over its columns (x · wᵀ, how
torch.nn.Linear stores it), else over its rows (x · w: the way back, or a transposed layout).
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from radeon_stack.errors import UsageError
from radeon_stack.kernels.configs import (
    GATE_BLOCK,
    Kind,
    Tile,
    decode_experts_once,
    full_precision_tile,
    gate_apart,
    grouped_tile,
)
from radeon_stack.kernels.launch import family, launch, shared_memory
from radeon_stack.kernels.nf4 import NF4, Form, decode, turning
from radeon_stack.kernels.routing import Routing
from radeon_stack.kernels.sizes import SIZES, cdiv, next_power, padded_rank

Weight: TypeAlias = Tensor | NF4
Constants: TypeAlias = tuple[tuple[str, Any], ...]
DENSE = {"TURNED": 0, "PAIRS": False}  # in the place of nf4.turning


class LowRank(NamedTuple):
    """scale · u · v on top of a product.

    u: [positions, rank] in sorted order. v: [experts, N, rank] over columns, [experts, rank, N] else.
    """

    u: Tensor
    v: Tensor
    scale: float
    rank: int

    @classmethod
    def none(cls, spare: Tensor) -> LowRank:
        """No adapter: pointers have to be handed over all the same, and are not read."""
        return cls(spare, spare, 1.0, 0)


def matmul(
    x: Tensor,
    weight: Weight,
    routing: Routing,
    *,
    over_columns: bool = True,
    gather: int = 0,
    scatter: bool = False,
    bias: Tensor | None = None,
    slot_weight: Tensor | None = None,
    low_rank: LowRank | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """[slots, N]. gather: 0 takes x by sorted position, top_k by token, 1 by slot. scatter: rows by slot."""
    k = x.shape[1]
    n = weight.shape[1] if over_columns else weight.shape[2]
    out = _rows(routing, n, x)
    low = low_rank or LowRank.none(x)
    plan = _plan_for(
        "forward" if over_columns else "backward", weight, routing, x.dtype, n, k, tile,
        (("GATHER", gather > 0), ("SCATTER", scatter), ("OVER_COLUMNS", over_columns)),
        (("BIAS", bias is not None), ("WEIGHTED", slot_weight is not None), ("RANK", padded_rank(low.rank))),
    )  # fmt: skip
    launch(
        _kernels().grouped_matmul,
        plan.grid,
        (
            x,
            routing.slots,
            routing.offsets,
            *weight_arguments(weight),
            x if bias is None else bias,
            x if slot_weight is None else slot_weight,
            low.u,
            low.v,
            out,
            n,
            k,
            max(gather, 1),
            low.rank,
            low.scale,
            plan.tiles,
        ),
        plan.constants,
        **plan.options,
    )
    return out


def gated_forward(
    x: Tensor,
    weight: Weight,
    routing: Routing,
    *,
    save: bool,
    low_rank: LowRank | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """(gate and up [slots, 2N], silu(gate) · up [slots, N]) of tokens x; the first is empty unless `save`."""
    n, k = weight.shape[1] // 2, x.shape[1]
    gate_up = x.new_empty(routing.size if save else 0, 2 * n)
    hidden = x.new_empty(routing.size, n)
    low = low_rank or LowRank.none(x)
    after = (("RANK", padded_rank(low.rank)), ("SAVE", save))
    plan = _plan_for("gated_forward", weight, routing, x.dtype, n, k, tile, (), after)
    launch(
        _kernels().gated_forward,
        plan.grid,
        (
            x,
            routing.slots,
            routing.offsets,
            *weight_arguments(weight),
            low.u,
            low.v,
            gate_up if save else hidden,
            hidden,
            n,
            k,
            routing.top_k,
            low.rank,
            low.scale,
            plan.tiles,
        ),
        plan.constants,
        **plan.options,
    )
    return gate_up, hidden


def gated_backward(
    d_out: Tensor,
    weight: Weight,
    routing: Routing,
    slot_weight: Tensor,
    gate_up: Tensor,
    *,
    save: bool = False,
    low_rank: LowRank | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From d_out [tokens, K] and weight [experts, K, N]: d_gate_up [slots, 2N], d_slot_weight in float32 parts
    [slots, parts] that are still to be added up, and slot_weight · hidden [slots, N], which is empty unless `save`.
    """
    if tile is None and gate_apart(family(d_out.device), routing.size / routing.experts):
        return gradients_apart(d_out, weight, routing, slot_weight, gate_up, save=save, low_rank=low_rank)
    k, n = weight.shape[1], weight.shape[2]
    low = low_rank or LowRank.none(d_out)
    after = (("RANK", padded_rank(low.rank)), ("SAVE", save))
    plan = _plan_for("gated_backward", weight, routing, d_out.dtype, n, k, tile, (), after)
    d_gate_up, d_weight, weighted = _gradients(routing, gate_up, parts=plan.parts, save=save)
    launch(
        _kernels().gated_backward,
        plan.grid,
        (
            d_out,
            routing.slots,
            routing.offsets,
            *weight_arguments(weight),
            slot_weight,
            low.u,
            low.v,
            gate_up,
            d_gate_up,
            d_weight,
            weighted if save else d_out,
            n,
            k,
            routing.top_k,
            low.rank,
            low.scale,
            plan.tiles,
        ),
        plan.constants,
        **plan.options,
    )
    return d_gate_up, d_weight, weighted


def gradients_apart(
    d_out: Tensor,
    weight: Weight,
    routing: Routing,
    slot_weight: Tensor,
    gate_up: Tensor,
    *,
    save: bool = False,
    low_rank: LowRank | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """gated_backward in two launches: the product, and then the gate, d_hidden [slots, N] lying between them."""
    from radeon_stack.kernels.jit.gate import gate_backward

    more: dict[str, Any] = {"over_columns": False, "gather": routing.top_k, "low_rank": low_rank, "tile": tile}
    d_hidden = matmul(d_out, weight, routing, **more)
    n = d_hidden.shape[1]
    d_gate_up, d_weight, weighted = _gradients(routing, gate_up, parts=1, save=save)
    rows, columns = GATE_BLOCK
    launch(
        gate_backward,
        (cdiv(routing.size, rows), 1, 1),
        (
            d_hidden,
            gate_up,
            routing.slots,
            routing.offsets,
            slot_weight,
            d_gate_up,
            d_weight,
            weighted if save else d_hidden,
            n,
        ),
        {"EXPERTS": routing.experts, "SAVE": save, "BLOCK_M": rows, "BLOCK_N": min(columns, next_power(n))},
    )
    return d_gate_up, d_weight, weighted


def outer(
    a: Tensor,
    b: Tensor,
    routing: Routing,
    *,
    a_gather: int = 0,
    b_gather: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """scale · aᵀ·b over each expert's rows: [experts, N, K], the gradient of a weight."""
    from radeon_stack.kernels.jit.grouped import grouped_outer

    n, k = a.shape[1], b.shape[1]
    out = torch.empty((routing.experts, n, k), dtype=dtype or a.dtype, device=a.device)
    block_n, block_k = (min(64, max(16, next_power(size))) for size in (n, k))
    constants = {
        "A_GATHER": a_gather > 0,
        "B_GATHER": b_gather > 0,
        "BLOCK_M": 32,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
    }
    arguments = (a, b, routing.slots, routing.offsets, out, n, k, max(a_gather, 1), max(b_gather, 1), float(scale))
    launch(grouped_outer, (cdiv(n, block_n), cdiv(k, block_k), routing.experts), arguments, constants, stages=2)
    return out


def _gradients(routing: Routing, gate_up: Tensor, *, parts: int, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what gated_backward gives."""
    make = gate_up.new_zeros if routing.partial else gate_up.new_empty  # a slot of no expert is written by nobody
    d_weight = make((routing.size, parts), dtype=torch.float32)
    weighted = gate_up.new_empty(routing.size if save else 0, gate_up.shape[1] // 2)
    return torch.empty_like(gate_up), d_weight, weighted


def _rows(routing: Routing, width: int, like: Tensor) -> Tensor:
    # A slot of no expert is written by nobody, and has to count as zero.
    make = like.new_zeros if routing.partial else like.new_empty
    return make((routing.size, width))


def for_rows(weight: Weight, routing: Routing, dtype: torch.dtype) -> Weight:
    """The weight as a product over so many rows takes it best: packed ones in 16 bit where that is cheaper."""
    mean = routing.size / routing.experts
    if isinstance(weight, NF4) and decode_experts_once(family(weight.device), mean):
        return decode(weight, dtype)
    return weight


def row_major(weight: Weight) -> Weight:
    """The weight, whose rows lie one after the other: kernels take no strides. UsageError for a view that is not so:
    a copy would be as large as the weight, and made at every step.
    """
    if isinstance(weight, Tensor) and not weight.is_contiguous():
        raise UsageError(
            f"a weight of shape {tuple(weight.shape)} with strides {weight.stride()}: the kernels take row-major ones",
            remedy="weight.contiguous(), once; or pass it as the transposed one that it is",
        )
    return weight


def weight_arguments(weight: Weight) -> tuple[Tensor, ...]:
    """The six pointers by which every kernel is handed a weight."""
    return weight.pointers if isinstance(weight, NF4) else (weight,) * 6


class Plan(NamedTuple):
    """How a product of these sizes is launched. tiles: its row tiles; parts: its column tiles."""

    tiles: int
    parts: int
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    options: dict[str, Any]


def _plan_for(
    kind: Kind,
    weight: Weight,
    routing: Routing,
    dtype: torch.dtype,
    n: int,
    k: int,
    tile: Tile | None,
    before: Constants,
    after: Constants,
) -> Plan:
    """Of rows of `dtype`; before, after: a kernel's own constants before and after those of a weight's form."""
    form = weight.form if isinstance(weight, NF4) else None
    return _plan(kind, form, weight.device, routing.size, routing.experts, dtype, n, k, tile, before, after)


@lru_cache(SIZES)
def _plan(
    kind: Kind,
    form: Form | None,
    device: torch.device,
    slots: int,
    experts: int,
    dtype: torch.dtype,
    n: int,
    k: int,
    tile: Tile | None,
    before: Constants,
    after: Constants,
) -> Plan:
    """Worked out once: a step of few tokens, and the begin of any other, waits for the host."""
    whose = family(device)
    if tile is None and dtype == torch.float32:
        tile = full_precision_tile()
    elif tile is None:
        shared = shared_memory(device) if whose == "cuda" else None
        tile = grouped_tile(whose, kind, mean_rows=slots / experts, nf4=form is not None, shared=shared)
    constants: dict[str, Any] = {"EXPERTS": experts, "PADDED": next_power(experts), **dict(before)}
    constants |= {"NF4": form.lookup, "NESTED": form.nested} if form else {"NF4": 0, "NESTED": False}
    constants |= dict(after)
    constants |= {"BLOCK_M": tile.m, "TAIL": tile.tail, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group}
    width = 2 * tile.n if kind == "gated_forward" else tile.n  # of accumulators
    over_columns = kind in ("gated_forward", "forward")
    constants |= turning(tile, k, width, over_columns=over_columns, aligned=form.aligned) if form else DENSE
    tiles, parts = row_tiles(slots, experts, tile), cdiv(n, tile.n)
    # Without fused multiply-add decoded values are bitsandbytes' to the bit.
    options = {"warps": tile.warps, "stages": tile.stages, "fp_fusion": form is None}
    return Plan(tiles, parts, (tiles * parts, 1, 1), constants, options)


def row_tiles(slots: int, experts: int, tile: Tile) -> int:
    """As many as there can be at most: where every expert but one has a single row, and that one all the others."""
    return min(slots, experts + max(0, slots - experts - tile.tail) // tile.m)


@cache
def _kernels() -> Any:
    from radeon_stack.kernels.jit import grouped

    return grouped
