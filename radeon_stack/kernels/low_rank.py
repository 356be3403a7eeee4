"""What a dense layer's adapter adds: x·aᵀ and its product with b, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from radeon_stack.kernels.configs import (
    ADAPTER_STAGES,
    LOW_RANK_TILE,
    LOW_RANK_WARPS,
    low_rank_split,
    low_rank_step,
)
from radeon_stack.kernels.launch import launch
from radeon_stack.kernels.nf4 import NF4, decode_constants, decode_programs, pointers
from radeon_stack.kernels.sizes import cdiv, next_power, padded_rank


def partials(x: Tensor, factor: Tensor, rank: int, split: int, *, over_columns: bool) -> Tensor:
    """x·factor, [rows, K] by rank, in `split` parts of the reduction: float32 [split, rows, padded rank], u's summands.

    factor: over columns the adapter's a, [rank, K]; else its b, [K, rank].
    """
    from radeon_stack.kernels.jit.linear import low_rank_partials

    rows, k = x.shape
    made, constants = _room(x, rank, split, over_columns=over_columns)
    launch(
        low_rank_partials,
        (cdiv(rows, constants["BLOCK_M"]), split, 1),
        (x, factor, made, rows, k, rank),
        constants,
        warps=LOW_RANK_WARPS,
        stages=ADAPTER_STAGES,
    )
    return made


def decode_and_partials(
    x: Tensor, weight: NF4, factor: Tensor, rank: int, *, over_columns: bool
) -> tuple[Tensor, Tensor]:
    """(the matrix in x's dtype, the partials) by one launch."""
    from radeon_stack.kernels.jit.linear import decode_and_low_rank

    (rows, k), split = x.shape, low_rank_split(x.shape[0])
    matrix = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
    made, constants = _room(x, rank, split, over_columns=over_columns)
    launch(
        decode_and_low_rank,
        (cdiv(rows, constants["BLOCK_M"]) * split + decode_programs(matrix.numel()), 1, 1),
        (x, factor, made, *pointers(weight), matrix, rows, k, rank, matrix.numel()),
        {**constants, **decode_constants(weight)},
        warps=LOW_RANK_WARPS,
        stages=ADAPTER_STAGES,
        fp_fusion=False,
    )
    return matrix, made


def _room(x: Tensor, rank: int, split: int, *, over_columns: bool) -> tuple[Tensor, dict[str, Any]]:
    """(where the partials go, the constants of the kernels that make them)"""
    rows, padded = x.shape[0], padded_rank(rank)
    room = torch.empty((split, rows, padded), dtype=torch.float32, device=x.device)
    block = min(64, max(16, next_power(rows)))
    sizes = {"RANK": padded, "SPLIT": split, "BLOCK_M": block, "BLOCK_K": low_rank_step(padded)}
    return room, {"OVER_COLUMNS": over_columns, **sizes}


def product(
    partials: Tensor | None,
    factor: Tensor,
    scale: float,
    bias: Tensor | None,
    u: Tensor,
    out: Tensor,
    *,
    onto: bool = False,
    over_columns: bool,
) -> None:
    """out, [rows, n]: scale · u · factor + bias, onto what it holds or not. u, [rows, rank], is written, or known."""
    from radeon_stack.kernels.jit.linear import low_rank_product

    (rows, rank), n, (m, width) = u.shape, out.shape[1], LOW_RANK_TILE
    constants = {
        "OVER_COLUMNS": over_columns,
        "BIAS": bias is not None,
        "ONTO": onto,
        "RANK": padded_rank(rank),
        "SPLIT": 0 if partials is None else partials.shape[0],
        "BLOCK_M": m,
        "BLOCK_N": width,
    }
    spare = u if partials is None else partials
    arguments = (spare, factor, u if bias is None else bias, u, out, rows, n, rank, float(scale))
    launch(low_rank_product, (cdiv(rows, m), cdiv(n, width), 1), arguments, constants, warps=LOW_RANK_WARPS)


def gradients(
    x: Tensor, d_out: Tensor, u: Tensor, g: Tensor, scale: float, a: torch.dtype, b: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(d_a, d_b) in these dtypes, summed in float32."""
    from radeon_stack.kernels.jit.linear import adapter_gradients as kernel

    (rows, k), n, rank = x.shape, d_out.shape[1], u.shape[1]
    d_a = torch.empty((rank, k), dtype=a, device=x.device)
    d_b = torch.empty((n, rank), dtype=b, device=x.device)
    block = 64
    constants = {"RANK": padded_rank(rank), "BLOCK_M": min(64, max(16, next_power(rows))), "BLOCK_C": block}
    arguments = (x, d_out, u, g, d_a, d_b, rows, n, k, rank, float(scale))
    launch(kernel, (cdiv(k, block) + cdiv(n, block), 1, 1), arguments, constants, stages=ADAPTER_STAGES)
    return d_a, d_b


def gradients_by_torch(
    x: Tensor, d_out: Tensor, u: Tensor, g: Tensor, scale: float, a: torch.dtype, b: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(d_a, d_b) in these dtypes, rounded to x's."""
    return scaled(g.T, x, scale).to(a), scaled(d_out.T, u, scale).to(b)


def scaled(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """scale · one·other, by one launch."""
    return one @ other if scale == 1 else torch.addmm(one.new_empty(1), one, other, beta=0, alpha=scale)
