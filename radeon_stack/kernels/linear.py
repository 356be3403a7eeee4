"""A frozen NF4 linear layer with an adapter, forward and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radeon_stack.errors import UsageError
from radeon_stack.kernels import low_rank
from radeon_stack.kernels.configs import (
    LOW_RANK_TILE,
    MAX_RANK,
    Tile,
    adapter_by_torch,
    decode_once,
    full_precision_tile,
    linear_tile,
    low_rank_split,
)
from radeon_stack.kernels.launch import family, launch
from radeon_stack.kernels.nf4 import (
    NF4,
    decode,
    decode_reference,
    decoding,
)
from radeon_stack.kernels.once import apply, once_differentiable
from radeon_stack.kernels.siblings import hand_on, rows_of
from radeon_stack.kernels.sizes import cdiv, padded_rank


@dataclass(frozen=True)
class Given:
    """Of a layer's values, those that need not be computed (`recompute.py`)."""

    out: Tensor | None = None
    """[…, N]: known, or read by nobody."""
    u: Tensor | None = None
    """[rows, rank]: x·aᵀ, in x's dtype."""


def nf4_linear_reference(
    x: Tensor,
    weight: NF4,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """The definition: x·wᵀ + scale · (x·aᵀ)·bᵀ + bias. x: […, K]; weight: [N, K]; a: [rank, K]; b: [N, rank]."""
    out = x @ decode_reference(weight).to(x.dtype).T
    if a is not None and b is not None:
        out = out + scale * ((x @ a.to(x.dtype).T) @ b.to(x.dtype).T)
    return out if bias is None else out + bias.to(x.dtype)


def nf4_linear(
    x: Tensor,
    weight: NF4,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    given: Given = Given(),
    keep: Callable[[Tensor, Tensor | None], None] | None = None,
) -> Tensor:
    """The same without 16-bit weights in memory while rows are few; where they are many, decoded once a pass for torch.

    Gradients go to x, a and b; weight and bias are frozen. a and b may be float32 (a trainer's master weights): they
    are rounded to x's dtype as autocast would. Their gradients are summed in float32, and at very many rows rounded to
    x's dtype, as torch's products are. Layers of many rows that are given the same tensor add up its gradient in their
    products (`siblings.py`).

    given: what of it is known. keep: takes the values and x·aᵀ, [rows, N] and [rows, rank], where autograd does not.
    """
    if x.shape[-1] != weight.shape[1]:
        raise UsageError(f"x is {tuple(x.shape)}, and the layer takes rows of {weight.shape[1]}")
    if a is not None and b is not None and a.shape[0] > MAX_RANK:  # more than a tile's registers hold
        low = (x @ a.to(x.dtype).T) @ b.to(x.dtype).T
        return nf4_linear(x, weight, bias=bias) + scale * low
    a = None if a is None else a.contiguous()
    b = None if b is None else b.contiguous()
    bias = None if bias is None else bias.contiguous()
    frozen = _Frozen(weight, bias, scale)
    if torch.is_grad_enabled():
        out, handed = apply(_NF4Linear, rows_of(x), a, b, frozen, given)
        if handed is not None:
            hand_on(x, handed)
    else:  # the first pass of a layer that is computed again: the host has enough to do
        rows = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()
        out, u = _values(_way(rows, a), rows, a, b, frozen, given)
        if keep is not None:
            keep(out, u)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])


@dataclass(frozen=True)
class Way:
    """How rows are multiplied."""

    multiply: Callable[..., tuple[Tensor, Tensor | None]]
    decodes: bool = True
    """The matrix first. It then takes `u` and `onto` too, and the rows are handed on (`siblings.py`)."""
    casts: bool = False
    """Factors to x's dtype, in launches of their own."""
    low_rank: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda x, a, _: x @ a.to(x.dtype).T
    """x·aᵀ of x, a and b, where it alone is wanted; of many rows in the bits that `multiply` gives it."""


class _Frozen(NamedTuple):
    weight: NF4
    bias: Tensor | None
    scale: float


class _NF4Linear(torch.autograd.Function):
    """(out, where rows are many those of x, for the next layer that reads them)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, frozen: _Frozen, given: Given
    ) -> tuple[Tensor, Tensor | None]:
        x = x.contiguous()
        way = _way(x, a)
        ctx.dtypes = a.dtype if a is not None else None, b.dtype if b is not None else None
        if way.casts and a is not None and b is not None:
            a, b = a.to(x.dtype), b.to(x.dtype)  # once for both passes
        out, u = _values(way, x, a, b, frozen, given)
        handed = None
        if way.decodes:
            x = handed = x.detach()  # itself may be what these hang on, or a view of it: saved, it were a circle
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if a is not None else None, a, b, u)
        ctx.frozen, ctx.way = frozen, way
        return out, handed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_handed: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_out is None:  # only later layers were reached
            return d_handed, None, None, None, None
        x, a, b, u = ctx.saved_tensors
        frozen: _Frozen = ctx.frozen
        d_out = d_out.contiguous()
        if ctx.needs_input_grad[0]:
            onto = {} if d_handed is None else {"onto": d_handed}  # the next layer alone made it: nobody else has it
            d_x, g = ctx.way.multiply(d_out, frozen.weight, b, a, frozen.scale, None, over_columns=False, **onto)
        else:
            d_x, g = None, d_out @ b.to(d_out.dtype)
        if a is None:
            return d_x, None, None, None, None
        gradients = low_rank.gradients_by_torch if adapter_by_torch(x.shape[0]) else low_rank.gradients
        return d_x, *gradients(x, d_out, u, g, frozen.scale, *ctx.dtypes), None, None


def _values(
    way: Way, x: Tensor, a: Tensor | None, b: Tensor | None, frozen: _Frozen, given: Given
) -> tuple[Tensor, Tensor | None]:
    """(out, u), of which what is given is not computed."""
    if given.out is None:
        known = {"u": given.u} if way.decodes else {}  # of few rows nobody keeps it
        return way.multiply(x, frozen.weight, a, b, frozen.scale, frozen.bias, over_columns=True, **known)
    u = given.u if a is None or b is None or given.u is not None else way.low_rank(x, a, b)
    return given.out.view(x.shape[0], -1), u


def _way(rows: Tensor, factor: Tensor | None) -> Way:
    """How so many rows are best multiplied; factor: of an adapter, if there is one."""
    if not decode_once(family(rows.device), rows.shape[0]):
        return PRODUCT
    by_torch = factor is None or rows.dtype == torch.float32 or adapter_by_torch(rows.shape[0])
    return BY_TORCH if by_torch else DECODED


def by_torch(
    x: Tensor,
    weight: NF4,
    first: Tensor | None,
    second: Tensor | None,
    scale: float,
    bias: Tensor | None,
    *,
    over_columns: bool,
    u: Tensor | None = None,
    onto: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `product` gives, of a matrix that is decoded first: many rows are best left to torch's products.

    u: [rows, rank], where it is known. onto: [rows, N or K], to which it is added in place; without a bias.
    """
    matrix = decode(weight, x.dtype)
    matrix = matrix.T if over_columns else matrix
    if first is None or second is None:
        if onto is not None:
            return onto.addmm_(x, matrix), None
        return x @ matrix if bias is None else torch.addmm(bias.to(x.dtype), x, matrix), None
    if u is None:
        down = first.to(x.dtype)
        u = x @ (down.T if over_columns else down)
    up = second.to(x.dtype)
    up = up.T if over_columns else up
    if onto is not None:
        out = onto.addmm_(u, up, alpha=scale)
    elif bias is not None:
        out = torch.addmm(bias.to(x.dtype), u, up, alpha=scale)
    else:
        out = low_rank.scaled(u, up, scale)
    # The small product first: the large one reads it while it computes, and it is not read and written once more.
    return out.addmm_(x, matrix), u


def decoded(
    x: Tensor,
    weight: NF4,
    first: Tensor | None,
    second: Tensor | None,
    scale: float,
    bias: Tensor | None,
    *,
    over_columns: bool,
    u: Tensor | None = None,
    onto: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `by_torch` gives, in three launches: all but the large product are two of ours. x in 16 bit."""
    if first is None or second is None:
        return by_torch(x, weight, first, second, scale, bias, over_columns=over_columns, onto=onto)
    if u is None:
        rank = first.shape[0 if over_columns else 1]
        matrix, partials = low_rank.decode_and_partials(x, weight, first, rank, over_columns=over_columns)
        u = x.new_empty(x.shape[0], rank)
    else:
        matrix, partials = decode(weight, x.dtype), None
    matrix = matrix.T if over_columns else matrix
    out = x.new_empty(x.shape[0], matrix.shape[1]) if onto is None else onto
    low_rank.product(partials, second, scale, bias, u, out, onto=onto is not None, over_columns=over_columns)
    return out.addmm_(x, matrix), u


def product(
    x: Tensor,
    weight: NF4,
    first: Tensor | None,
    second: Tensor | None,
    scale: float,
    bias: Tensor | None,
    *,
    over_columns: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(x·wᵀ or x·w with scale · u·second added, u: x·first, [rows, rank]), one way of the layer.

    Over columns, first is the adapter's a and second its b; else the other way round.
    """
    from radeon_stack.kernels.jit.linear import linear

    rows, k = x.shape
    n = weight.shape[0] if over_columns else weight.shape[1]
    out = x.new_empty(rows, n)
    u = partials = None
    rank = split = 0
    if first is not None:
        rank, split = first.shape[0 if over_columns else 1], low_rank_split(rows)
        u = x.new_empty(rows, rank)
        partials = low_rank.partials(x, first, rank, split, over_columns=over_columns)
    if tile is None:
        wide = x.dtype == torch.float32
        tile = full_precision_tile() if wide else linear_tile(family(x.device), rows)
    arguments = (
        x,
        *weight.pointers,
        x if bias is None else bias,
        x if partials is None else partials,
        x if second is None else second,
        x if u is None else u,
        out,
        rows,
        n,
        k,
        rank,
        float(scale),
    )
    flags = {
        "OVER_COLUMNS": over_columns,
        "NF4": weight.lookup,
        "NESTED": weight.nested,
        "BIAS": bias is not None,
        "RANK": padded_rank(rank),
        "SPLIT": split,
    }
    constants = {**flags, **_blocks(tile), **decoding(weight, tile, k, tile.n, over_columns=over_columns)}
    grid = (cdiv(rows, tile.m) * cdiv(n, tile.n), 1, 1)
    launch(linear, grid, arguments, constants, warps=tile.warps, stages=tile.stages, fp_fusion=False)
    return out, u


@cache
def _blocks(tile: Tile) -> dict[str, Any]:
    return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group}


def _low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x·aᵀ as `decoded` makes it, which writes it with its first columns."""
    rows, rank = x.shape[0], a.shape[0]
    partials = low_rank.partials(x, a, rank, low_rank_split(rows), over_columns=True)
    u = torch.empty((rows, rank), dtype=x.dtype, device=x.device)
    columns = torch.empty((rows, min(LOW_RANK_TILE[1], b.shape[0])), dtype=x.dtype, device=x.device)
    low_rank.product(partials, b, 1.0, None, u, columns, over_columns=True)
    return u


PRODUCT = Way(product, decodes=False)
DECODED = Way(decoded, low_rank=_low_rank)
BY_TORCH = Way(by_torch, casts=True)
