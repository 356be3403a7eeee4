"""Mixture-of-experts layers with their gradients, over 16-bit or NF4 experts, with or without adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radeon_stack.errors import UsageError
from radeon_stack.kernels import grouped
from radeon_stack.kernels.configs import MAX_RANK
from radeon_stack.kernels.grouped import LowRank, Weight, row_major
from radeon_stack.kernels.launch import can_run_on
from radeon_stack.kernels.nf4 import NF4, decode_reference
from radeon_stack.kernels.once import apply, once_differentiable
from radeon_stack.kernels.routing import Routing, combine, route


@dataclass(frozen=True)
class Adapter:
    """An adapter an expert: weight + scale · b·a. a: [experts, rank, columns]; b: [experts, rows, rank]."""

    a: Tensor
    b: Tensor
    scale: float


def gated_experts_reference(
    x: Tensor,
    index: Tensor,
    slot_weight: Tensor,
    gate_up: Weight,
    down: Weight,
    gate_up_adapter: Adapter | None = None,
    down_adapter: Adapter | None = None,
) -> Tensor:
    """The definition, token by token: Σ over a token's experts of weight · down(silu(gate(x)) · up(x)).

    x: [tokens, width]; index, slot_weight: [tokens, top_k]; gate_up: [experts, 2·inner, width], gate's rows first;
    down: [experts, width, inner]. Differentiable, and in whatever precision x has.
    """

    def matrices(weight: Weight, adapter: Adapter | None) -> Tensor:
        full = (decode_reference(weight) if isinstance(weight, NF4) else weight).to(x.dtype)
        return full if adapter is None else full + adapter.scale * (adapter.b.to(x.dtype) @ adapter.a.to(x.dtype))

    up_matrices, down_matrices = matrices(gate_up, gate_up_adapter), matrices(down, down_adapter)
    out = torch.zeros_like(x)
    for expert in range(up_matrices.shape[0]):
        token, choice = torch.where(index == expert)
        gate, up = (x[token] @ up_matrices[expert].T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ down_matrices[expert].T
        out = out.index_add(0, token, y * slot_weight[token, choice, None].to(x.dtype))
    return out


def gated_experts(
    x: Tensor,
    index: Tensor,
    slot_weight: Tensor,
    gate_up: Weight,
    down: Weight,
    gate_up_adapter: Adapter | None = None,
    down_adapter: Adapter | None = None,
    *,
    partial: bool = False,
    needed: bool = True,
) -> Tensor:
    """The same by grouped products: two forward, two back for x, and two more for each weight that is trained.

    Nothing is read back by the host and sums have a fixed order. NF4 experts are decoded tile by tile; where each has
    very many rows, a matrix is decoded once a product (`configs.decode_experts_once`).
    `partial`: index may hold numbers of no expert here; those slots count as zero. On a CPU it is the definition.
    needed: False where nobody reads the values, and only the way back is wanted (`recompute.py`): they are zeros.
    """
    _check_shapes(x, index, slot_weight, gate_up, down, gate_up_adapter, down_adapter)
    if not can_run_on(x.device):
        return gated_experts_reference(x, index, slot_weight, gate_up, down, gate_up_adapter, down_adapter)
    routing = route(index, gate_up.shape[0], partial=partial)
    factors: tuple[Tensor | None, ...] = (None,) * 4
    scales = (0.0, 0.0)
    if gate_up_adapter is not None or down_adapter is not None:
        adapters = (gate_up_adapter, down_adapter)
        factors = tuple(
            factor for one in adapters for factor in ((one.a.contiguous(), one.b.contiguous()) if one else (None, None))
        )
        scales = (gate_up_adapter.scale if gate_up_adapter else 0.0, down_adapter.scale if down_adapter else 0.0)
    gate_up, down = row_major(gate_up), row_major(down)
    plain = tuple(None if isinstance(weight, NF4) else weight for weight in (gate_up, down))
    trained = any(tensor.requires_grad for tensor in (x, slot_weight, *plain, *factors) if tensor is not None)
    frozen = _Frozen(routing, gate_up, down, scales, trained and torch.is_grad_enabled(), needed)
    out: Tensor = apply(_GatedExperts, x, slot_weight, *plain, *factors, frozen)
    return out


class _Frozen(NamedTuple):
    """What has no gradient of its own; `training`: what the way back needs is kept; `needed`: and the values."""

    routing: Routing
    gate_up: Weight
    down: Weight
    scales: tuple[float, ...]
    training: bool
    needed: bool


class _GatedExperts(torch.autograd.Function):
    """x, slot_weight, and where they are 16 bit or there are adapters: weights and factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slot_weight: Tensor,
        gate_up_matrix: Tensor | None,
        down_matrix: Tensor | None,
        up_a: Tensor | None,
        up_b: Tensor | None,
        down_a: Tensor | None,
        down_b: Tensor | None,
        frozen: _Frozen,
    ) -> Tensor:
        routing = frozen.routing
        x, slot_weight = x.contiguous(), slot_weight.contiguous()
        training = frozen.training
        up_u = None if up_a is None else grouped.matmul(x, up_a, routing, gather=routing.top_k)
        gate_up, hidden = grouped.gated_forward(
            x,
            grouped.for_rows(frozen.gate_up, routing, x.dtype),
            routing,
            save=training,
            low_rank=_low_rank(up_u, up_b, frozen.scales[0]),
        )
        down_u = None if down_a is None else grouped.matmul(hidden, down_a, routing)
        if training:
            # 16-bit weights are saved as tensors: a change in place is noticed, and offloading hooks see them.
            ctx.save_for_backward(
                x, slot_weight, gate_up, gate_up_matrix, down_matrix, up_a, up_b, down_a, down_b, up_u, down_u
            )
            ctx.routing, ctx.scales = frozen.routing, frozen.scales
            ctx.packed = tuple(one if isinstance(one, NF4) else None for one in (frozen.gate_up, frozen.down))
        if not frozen.needed:
            return x.new_zeros(()).expand_as(x)
        y = grouped.matmul(
            hidden,
            grouped.for_rows(frozen.down, routing, x.dtype),
            routing,
            scatter=True,
            slot_weight=slot_weight,
            low_rank=_low_rank(down_u, down_b, frozen.scales[1]),
        )
        return combine(y, routing.top_k)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, slot_weight, gate_up, up_matrix, down_matrix, up_a, up_b, down_a, down_b, up_u, down_u = ctx.saved_tensors
        up_weight: Weight = ctx.packed[0] or up_matrix
        down_weight: Weight = ctx.packed[1] or down_matrix
        routing, top_k = ctx.routing, ctx.routing.top_k
        up_scale, down_scale = ctx.scales
        needs = ctx.needs_input_grad
        d_out = d_out.contiguous()
        down_g = None
        if down_b is not None:
            down_g = grouped.matmul(d_out, down_b, routing, over_columns=False, gather=top_k)
        decoded = grouped.for_rows(down_weight, routing, d_out.dtype)
        d_gate_up, parts, weighted = grouped.gated_backward(
            d_out, decoded, routing, slot_weight, gate_up,
            save=needs[3] or down_a is not None, low_rank=_low_rank(down_g, down_a, down_scale),
        )  # fmt: skip
        del decoded  # before the other matrix is
        up_g = None if up_b is None else grouped.matmul(d_gate_up, up_b, routing, over_columns=False)
        d_x: Tensor | None = None
        sums: Tensor | None = None
        if needs[0]:
            d_rows = grouped.matmul(
                d_gate_up, grouped.for_rows(up_weight, routing, d_out.dtype), routing,
                over_columns=False, scatter=True, low_rank=_low_rank(up_g, up_a, up_scale),
            )  # fmt: skip
            d_x, sums = combine(d_rows, top_k, parts, slot_weight.dtype)
        d_slot_weight = parts.sum(1).to(slot_weight.dtype) if sums is None else sums
        d_up = d_down = d_up_a = d_up_b = d_down_a = d_down_b = None
        if needs[2]:
            d_up = grouped.outer(d_gate_up, x, routing, b_gather=top_k)
        if needs[3]:
            d_down = grouped.outer(d_out, weighted, routing, a_gather=top_k)
        if up_g is not None:
            d_up_a = grouped.outer(up_g, x, routing, b_gather=top_k, scale=up_scale, dtype=up_a.dtype)
            d_up_b = grouped.outer(d_gate_up, up_u, routing, scale=up_scale, dtype=up_b.dtype)
        if down_g is not None:
            share = slot_weight.flatten()[routing.slots.long()].unsqueeze(1).to(down_u.dtype)
            d_down_a = grouped.outer(down_g, weighted, routing, scale=down_scale, dtype=down_a.dtype)
            d_down_b = grouped.outer(
                d_out, down_u * share, routing, a_gather=top_k, scale=down_scale, dtype=down_b.dtype
            )
        return d_x, d_slot_weight.view_as(slot_weight), d_up, d_down, d_up_a, d_up_b, d_down_a, d_down_b, None


def grouped_linear(
    x: Tensor,
    weight: Weight,
    routing: Routing,
    *,
    bias: Tensor | None = None,
    transposed: bool = False,
    by_token: bool = False,
) -> Tensor:
    """A linear layer an expert, on sorted rows: [slots, N]. The parts of layers whose gate is their own.

    weight: [experts, N, K], or [experts, K, N] when `transposed`. x: [slots, K] sorted, or [tokens, K] with `by_token`.
    bias: [experts, N].
    """
    weight, bias = row_major(weight), None if bias is None else bias.contiguous()
    plain = None if isinstance(weight, NF4) else weight
    out: Tensor = apply(_GroupedLinear, x, plain, bias, _Layer(routing, weight, transposed, by_token))
    return out


class _Layer(NamedTuple):
    routing: Routing
    weight: Weight
    transposed: bool
    by_token: bool


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor | None, bias: Tensor | None, layer: _Layer) -> Tensor:
        x = x.contiguous()
        gather = layer.routing.top_k if layer.by_token else 0
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, matrix)
        ctx.packed = layer.weight if isinstance(layer.weight, NF4) else None
        ctx.routing, ctx.transposed, ctx.by_token = layer.routing, layer.transposed, layer.by_token
        ctx.bias_dtype = None if bias is None else bias.dtype
        return grouped.matmul(
            x,
            grouped.for_rows(layer.weight, layer.routing, x.dtype),
            layer.routing,
            over_columns=not layer.transposed,
            gather=gather,
            bias=bias,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        routing, d_out = ctx.routing, d_out.contiguous()
        gather = routing.top_k if ctx.by_token else 0
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            weight = grouped.for_rows(ctx.packed or matrix, routing, d_out.dtype)
            d_x = grouped.matmul(d_out, weight, routing, over_columns=ctx.transposed, scatter=ctx.by_token)
            d_x = combine(d_x, routing.top_k)[0] if ctx.by_token else d_x
        if ctx.needs_input_grad[1]:
            if ctx.transposed:
                d_weight = grouped.outer(x, d_out, routing, a_gather=gather)
            else:
                d_weight = grouped.outer(d_out, x, routing, b_gather=gather)
        if ctx.needs_input_grad[2]:
            ones = d_out.new_ones((routing.size, 1))
            d_bias = grouped.outer(d_out, ones, routing, dtype=ctx.bias_dtype).squeeze(2)
        return d_x, d_weight, d_bias, None


def _check_shapes(
    x: Tensor,
    index: Tensor,
    slot_weight: Tensor,
    gate_up: Weight,
    down: Weight,
    gate_up_adapter: Adapter | None,
    down_adapter: Adapter | None,
) -> None:
    experts, rows, width = gate_up.shape
    fits = x.shape == (index.shape[0], width) and slot_weight.shape == index.shape
    if fits and down.shape == (experts, width, rows // 2) and gate_up_adapter is down_adapter is None:
        return  # as nearly always, and sooner known
    wanted = {
        "x": (x, (index.shape[0], width)),
        "slot_weight": (slot_weight, index.shape),
        "down": (down, (experts, width, rows // 2)),
    }
    for name, weight, adapter in (("gate_up", gate_up, gate_up_adapter), ("down", down, down_adapter)):
        if adapter is not None:
            rank = adapter.a.shape[1]
            if rank > MAX_RANK:
                raise UsageError(f"adapters of rank {rank} an expert", remedy=f"up to {MAX_RANK} fit a tile")
            wanted[f"{name}_adapter.a"] = (adapter.a, (experts, rank, weight.shape[2]))
            wanted[f"{name}_adapter.b"] = (adapter.b, (experts, weight.shape[1], rank))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != tuple(shape):
            raise UsageError(f"{name} is {tuple(tensor.shape)}, where {tuple(shape)} belongs")


def _low_rank(u: Tensor | None, v: Tensor | None, scale: float) -> LowRank | None:
    return None if u is None or v is None else LowRank(u, v, float(scale), u.shape[1])
