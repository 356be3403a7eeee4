"""What a dense layer's adapter adds: x·aᵀ and its product with b, and their gradients."""

from __future__ import annotations

from functools import lru_cache
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
from radeon_stack.kernels.nf4 import NF4, decode_constants, decode_programs
from radeon_stack.kernels.sizes import SIZES, cdiv, next_power, padded_rank


def partials(x: Tensor, factor: Tensor, rank: int, split: int, *, over_columns: bool) -> Tensor:
    """x·factor, [rows, K] by rank, in `split` parts of the reduction: float32 [split, rows, padded rank], u's summands.

    factor: over columns the adapter's a, [rank, K]; else its b, [K, rank].
    """
    from radeon_stack.kernels.jit.linear import low_rank_partials

    rows, k = x.shape
    programs, constants = _parts(rows, rank, split, over_columns=over_columns)
    made = x.new_empty(split, rows, constants["RANK"], dtype=torch.float32)
    launch(
        low_rank_partials,
        (programs, split, 1),
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
    programs, parts = _parts(rows, rank, split, over_columns=over_columns)
    matrix = x.new_empty(weight.shape)
    made = x.new_empty(split, rows, parts["RANK"], dtype=torch.float32)
    values = matrix.numel()
    launch(
        decode_and_low_rank,
        (programs * split + decode_programs(values), 1, 1),
        (x, factor, made, *weight.pointers, matrix, rows, k, rank, values),
        {**parts, **decode_constants(weight)},
        warps=LOW_RANK_WARPS,
        stages=ADAPTER_STAGES,
        fp_fusion=False,
    )
    return matrix, made


@lru_cache(SIZES)
def _parts(rows: int, rank: int, split: int, *, over_columns: bool) -> tuple[int, dict[str, Any]]:
    """(programs a part of the reduction, the constants of the kernels that make u's summands)"""
    padded, block = padded_rank(rank), min(64, max(16, next_power(rows)))
    sizes = {"RANK": padded, "SPLIT": split, "BLOCK_M": block, "BLOCK_K": low_rank_step(padded)}
    return cdiv(rows, block), {"OVER_COLUMNS": over_columns, **sizes}


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

    (rows, rank), n = u.shape, out.shape[1]
    split = 0 if partials is None else partials.shape[0]
    programs, constants = _product(rows, n, rank, split, over_columns=over_columns, bias=bias is not None, onto=onto)
    spare = u if partials is None else partials
    arguments = (spare, factor, u if bias is None else bias, u, out, rows, n, rank, float(scale))
    launch(low_rank_product, programs, arguments, constants, warps=LOW_RANK_WARPS)


@lru_cache(SIZES)
def _product(
    rows: int, n: int, rank: int, split: int, *, over_columns: bool, bias: bool, onto: bool
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """(programs, constants)"""
    m, width = LOW_RANK_TILE
    flags = {"OVER_COLUMNS": over_columns, "BIAS": bias, "ONTO": onto}
    sizes = {"RANK": padded_rank(rank), "SPLIT": split, "BLOCK_M": m, "BLOCK_N": width}
    return (cdiv(rows, m), cdiv(n, width), 1), {**flags, **sizes}


def gradients(
    x: Tensor, d_out: Tensor, u: Tensor, g: Tensor, scale: float, a: torch.dtype, b: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(d_a, d_b) in these dtypes, summed in float32."""
    from radeon_stack.kernels.jit.linear import adapter_gradients as kernel

    (rows, k), n, rank = x.shape, d_out.shape[1], u.shape[1]
    d_a = x.new_empty(rank, k, dtype=a)
    d_b = x.new_empty(n, rank, dtype=b)
    programs, constants = _gradients(rows, n, k, rank)
    arguments = (x, d_out, u, g, d_a, d_b, rows, n, k, rank, float(scale))
    launch(kernel, programs, arguments, constants, stages=ADAPTER_STAGES)
    return d_a, d_b


@lru_cache(SIZES)
def _gradients(rows: int, n: int, k: int, rank: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """(programs, constants)"""
    block = 64
    sizes = {"RANK": padded_rank(rank), "BLOCK_M": min(block, max(16, next_power(rows))), "BLOCK_C": block}
    return (cdiv(k, block) + cdiv(n, block), 1, 1), sizes


def gradients_by_torch(
    x: Tensor, d_out: Tensor, u: Tensor, g: Tensor, scale: float, a: torch.dtype, b: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(d_a, d_b) in these dtypes, rounded to x's."""
    return scaled(g.T, x, scale).to(a), scaled(d_out.T, u, scale).to(b)


def scaled(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """scale · one·other, by one launch."""
    return one @ other if scale == 1 else torch.addmm(one.new_empty(1), one, other, beta=0, alpha=scale)
