"""The router: softmax, the top_k experts of a token, their weights."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radeon_stack.errors import UsageError
from radeon_stack.kernels.configs import GATE_BACK_PROGRAMS, gate_back_tile, gate_tile
from radeon_stack.kernels.launch import family, launch, shared_memory
from radeon_stack.kernels.once import apply, once_differentiable
from radeon_stack.kernels.sizes import SIZES, cdiv, next_power


def router_reference(logits: Tensor, top_k: int, *, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """(weights in the logits' dtype, expert numbers int64), both [tokens, top_k], from logits [tokens, experts].

    The definition, as Qwen3-MoE and Mixtral have it: softmax over all experts, then the largest, then divided by
    their sum. (gpt-oss takes the softmax of the largest: the same thing.)
    """
    shares = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    weight, index = torch.topk(shares, top_k, -1)
    if normalise:
        weight = weight / weight.sum(-1, keepdim=True)
    return weight.to(logits.dtype), index


def router(logits: Tensor, top_k: int, *, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """The same in one launch, and one back. Of equal experts the first is taken."""
    weight, index = apply(_Router, logits, top_k, normalise)
    return weight, index


def gate(x: Tensor, matrix: Tensor, top_k: int, *, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """The router with the linear layer before it, x [tokens, width] · matrixᵀ [experts, width], in one launch too: of
    few tokens it is the host's time that a router takes. Of many the way back is two, and both ways are of float32, and
    of more experts than the tiles were made for (`configs.GATE`).
    """
    weight, index = apply(_Gate, x, matrix, top_k, normalise)
    return weight, index


class _Router(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
        logits = logits.contiguous()
        weight, index = _chosen(logits, top_k, normalise)
        ctx.save_for_backward(logits, index)
        ctx.normalise = normalise
        return weight, index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weight: Tensor, _: Any) -> tuple[Tensor, None, None]:
        logits, index = ctx.saved_tensors
        return _d_logits(logits, index, d_weight.contiguous(), ctx.normalise), None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
        x, matrix = x.contiguous(), matrix.contiguous()
        tokens, width = x.shape
        planned = _gate_sizes(x.device, tokens, matrix.shape[0], top_k, normalise, x.dtype)
        if planned is None or x.dtype != matrix.dtype or matrix.shape[1] != width:  # which torch has words for
            # In their own dtype, as the way back is, which autocast does not reach.
            with torch.autocast(x.device.type, enabled=False):
                logits = torch.nn.functional.linear(x, matrix)
            weight, index = _chosen(logits, top_k, normalise)
        else:
            programs, constants, options = planned
            logits = x.new_empty(tokens, matrix.shape[0])
            weight = x.new_empty(tokens, top_k)
            index = x.new_empty(tokens, top_k, dtype=torch.int64)
            arguments = (x, matrix, weight, index, logits, tokens, width)
            launch(_kernels().gate_forward, programs, arguments, constants, **options)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, matrix, logits, index)
        ctx.normalise = normalise
        return weight, index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weight: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, matrix, logits, index = ctx.saved_tensors
        d_weight = d_weight.contiguous()
        d_x, d_logits = None, None
        if ctx.needs_input_grad[0]:
            d_x, d_logits = _d_inputs(logits, index, d_weight, matrix, ctx.normalise, save=x is not None)
        if x is not None and d_logits is None:
            d_logits = _d_logits(logits, index, d_weight, ctx.normalise)
        return d_x, None if d_logits is None or x is None else d_logits.T @ x, None, None


def _d_inputs(
    logits: Tensor, index: Tensor, d_weight: Tensor, matrix: Tensor, normalise: bool, *, save: bool
) -> tuple[Tensor, Tensor | None]:
    """(d_x, with `save` d_logits too)."""
    tokens, width = logits.shape[0], matrix.shape[1]
    planned = _back_sizes(_Matrix(matrix.device, matrix.dtype, matrix.shape), tokens, index.shape[1], normalise, save)
    if planned is None:
        d_logits = _d_logits(logits, index, d_weight, normalise)
        return d_logits @ matrix, d_logits
    programs, columns, constants, options = planned
    d_x = matrix.new_empty(tokens, width)
    kept = torch.empty_like(logits) if save else None
    arguments = (logits, index, d_weight, matrix, d_x, d_x if kept is None else kept, tokens, width, columns)
    launch(_kernels().gate_backward, programs, arguments, constants, **options)
    return d_x, kept


def _chosen(logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    weight = logits.new_empty(tokens, top_k)
    index = logits.new_empty(tokens, top_k, dtype=torch.int64)
    programs, constants = _sizes(tokens, experts, top_k, normalise)
    launch(_kernels().router_forward, programs, (logits, weight, index, tokens), constants)
    return weight, index


def _d_logits(logits: Tensor, index: Tensor, d_weight: Tensor, normalise: bool) -> Tensor:
    tokens, experts = logits.shape
    d_logits = torch.empty_like(logits)
    programs, constants = _sizes(tokens, experts, index.shape[1], normalise, back=True)
    launch(_kernels().router_backward, programs, (logits, index, d_weight, d_logits, tokens), constants)
    return d_logits


@cache
def _kernels() -> Any:
    """Triton's side, when it is first launched: a machine without it can read this module. An import statement in a
    launch costs the host as much as a tensor.
    """
    from radeon_stack.kernels.jit import router

    return router


class _Matrix(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size


def _check_choices(top_k: int, experts: int) -> None:
    if not 1 <= top_k <= experts:
        raise UsageError(f"top_k is {top_k} of {experts} experts", remedy="choose at least one, and no more than all")


@lru_cache(SIZES)
def _gate_sizes(
    device: torch.device, tokens: int, experts: int, top_k: int, normalise: bool, dtype: torch.dtype
) -> tuple[tuple[int, int, int], dict[str, Any], dict[str, Any]] | None:
    """(programs, constants, options) of a gate's launch; None where it is two."""
    _check_choices(top_k, experts)
    padded, whose = max(16, next_power(experts)), family(device)
    tile = gate_tile(whose, tokens, padded, shared=shared_memory(device) if whose == "cuda" else None)
    if tile is None or dtype.itemsize != 2:
        return None
    # 16: what follows the product has its layout, and on RDNA that is of no less.
    sizes = {"EXPERTS": experts, "PADDED": padded, "TOP_K": top_k, "TOP_PADDED": max(16, next_power(top_k))}
    constants = {**sizes, "NORMALISE": normalise, "BLOCK_T": tile.m, "BLOCK_K": tile.k}
    return (cdiv(tokens, tile.m), 1, 1), constants, {"warps": tile.warps, "stages": tile.stages}


@lru_cache(SIZES)
def _back_sizes(
    matrix: _Matrix, tokens: int, top_k: int, normalise: bool, save: bool
) -> tuple[tuple[int, int, int], int, dict[str, Any], dict[str, Any]] | None:
    """(programs, columns a program, constants, options) of its launch back; None where it is two."""
    experts, width = matrix.shape
    tile = gate_back_tile(family(matrix.device), tokens, next_power(experts))
    if tile is None or matrix.dtype.itemsize != 2:
        return None
    blocks = cdiv(tokens, tile.m)
    columns = tile.n * cdiv(cdiv(width, tile.n), cdiv(GATE_BACK_PROGRAMS, max(blocks, 1)))
    sizes = {"EXPERTS": experts, "PADDED": max(16, next_power(experts)), "TOP_K": top_k}
    constants = {**sizes, "NORMALISE": normalise, "SAVE": save, "BLOCK_T": tile.m, "BLOCK_N": tile.n}
    return (blocks, cdiv(width, columns), 1), columns, constants, {"warps": tile.warps, "stages": tile.stages}


@lru_cache(SIZES)
def _sizes(
    tokens: int, experts: int, top_k: int, normalise: bool, *, back: bool = False
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """(programs, constants) of a launch."""
    _check_choices(top_k, experts)
    block = rows(tokens)
    choices = {} if back else {"TOP_PADDED": next_power(top_k)}
    sizes = {"EXPERTS": experts, "PADDED": next_power(experts), "TOP_K": top_k, **choices}
    return (cdiv(tokens, block), 1, 1), {**sizes, "NORMALISE": normalise, "BLOCK_T": block}


def rows(tokens: int) -> int:
    """Tokens a program: few while there are few, so that all compute units have some."""
    return 4 if tokens <= 2048 else 8
