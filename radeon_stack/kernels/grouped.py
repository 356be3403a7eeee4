"""Launches of the grouped products; autograd is `experts.py`'s.

A weight is [experts, rows, columns], 16 bit or NF4. `over_columns`: the reduction runs over its columns (x · wᵀ, how
torch.nn.Linear stores it), else over its rows (x · w: the way back, or a transposed layout).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from radeon_stack.kernels.configs import Tile, grouped_tile
from radeon_stack.kernels.nf4 import NF4, decode, pointers
from radeon_stack.kernels.routing import Routing

Weight = Tensor | NF4


@dataclass(frozen=True)
class LowRank:
    """scale · u · v on top of a product.

    u: [positions, rank] in sorted order. v: [experts, N, rank] over columns, [experts, rank, N] else.
    """

    u: Tensor
    v: Tensor
    scale: float


def family(device: torch.device) -> str:
    """Whose tiles: 'hip' or 'cuda' (also for the interpreter on a CPU)."""
    return "hip" if torch.version.hip is not None and device.type == "cuda" else "cuda"


def tile_for(weight: Weight, routing: Routing, *, gated: bool = False) -> Tile:
    return grouped_tile(
        family(weight.device), mean_rows=routing.size / routing.experts, nf4=isinstance(weight, NF4), gated=gated
    )


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
    tile = tile or tile_for(weight, routing)
    tiles = m_tiles(routing, tile)
    from radeon_stack.kernels.jit.grouped import grouped_matmul

    rank = low_rank.u.shape[1] if low_rank else 0
    grouped_matmul[(tiles * cdiv(n, tile.n),)](
        x,
        routing.slots,
        routing.offsets,
        *_weight_arguments(weight),
        x if bias is None else bias,
        x if slot_weight is None else slot_weight,
        low_rank.u if low_rank else x,
        low_rank.v if low_rank else x,
        out,
        n,
        k,
        max(gather, 1),
        rank,
        low_rank.scale if low_rank else 1.0,
        tiles,
        GATHER=gather > 0,
        SCATTER=scatter,
        OVER_COLUMNS=over_columns,
        BIAS=bias is not None,
        WEIGHTED=slot_weight is not None,
        RANK=_padded_rank(rank),
        **_common(weight, routing, tile),
    )
    return out


def gated_forward(
    x: Tensor, weight: Weight, routing: Routing, *, save: bool, low_rank: LowRank | None = None, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """(gate and up [slots, 2N], silu(gate) · up [slots, N]) of tokens x; the first is empty unless `save`."""
    from radeon_stack.kernels.jit.grouped import gated_forward as kernel

    n, k = weight.shape[1] // 2, x.shape[1]
    tile = tile or tile_for(weight, routing, gated=True)
    tiles = m_tiles(routing, tile)
    gate_up = torch.empty((routing.size if save else 0, 2 * n), dtype=x.dtype, device=x.device)
    hidden = torch.empty((routing.size, n), dtype=x.dtype, device=x.device)
    rank = low_rank.u.shape[1] if low_rank else 0
    kernel[(tiles * cdiv(n, tile.n),)](
        x,
        routing.slots,
        routing.offsets,
        *_weight_arguments(weight),
        low_rank.u if low_rank else x,
        low_rank.v if low_rank else x,
        gate_up if save else hidden,
        hidden,
        n,
        k,
        routing.top_k,
        rank,
        low_rank.scale if low_rank else 1.0,
        tiles,
        RANK=_padded_rank(rank),
        SAVE=save,
        **_common(weight, routing, tile),
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
    """From d_out [tokens, K] and weight [experts, K, N]: d_gate_up [slots, 2N], d_slot_weight float32 [slots], and
    slot_weight · hidden [slots, N], which is empty unless `save`.
    """
    from radeon_stack.kernels.jit.grouped import gated_backward as kernel

    k, n = weight.shape[1], weight.shape[2]
    tile = tile or tile_for(weight, routing)
    tiles = m_tiles(routing, tile)
    d_gate_up = torch.empty_like(gate_up)
    # Zeros: a slot of no expert is written by nobody.
    d_weight = torch.zeros((routing.size, cdiv(n, tile.n)), dtype=torch.float32, device=d_out.device)
    weighted = torch.empty((routing.size if save else 0, n), dtype=d_out.dtype, device=d_out.device)
    rank = low_rank.u.shape[1] if low_rank else 0
    kernel[(tiles * cdiv(n, tile.n),)](
        d_out,
        routing.slots,
        routing.offsets,
        *_weight_arguments(weight),
        slot_weight,
        low_rank.u if low_rank else d_out,
        low_rank.v if low_rank else d_out,
        gate_up,
        d_gate_up,
        d_weight,
        weighted if save else d_out,
        n,
        k,
        routing.top_k,
        rank,
        low_rank.scale if low_rank else 1.0,
        tiles,
        RANK=_padded_rank(rank),
        SAVE=save,
        **_common(weight, routing, tile),
    )
    return d_gate_up, d_weight.sum(1), weighted


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
    grouped_outer[(cdiv(n, block_n), cdiv(k, block_k), routing.experts)](
        a, b, routing.slots, routing.offsets, out, n, k, max(a_gather, 1), max(b_gather, 1), scale,
        A_GATHER=a_gather > 0, B_GATHER=b_gather > 0, BLOCK_M=32, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def _rows(routing: Routing, width: int, like: Tensor) -> Tensor:
    # A slot of no expert is written by nobody, and has to count as zero.
    make = torch.zeros if routing.partial else torch.empty
    return make((routing.size, width), dtype=like.dtype, device=like.device)


def decoded(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight in 16 bit."""
    return decode(weight, dtype) if isinstance(weight, NF4) else weight


def m_tiles(routing: Routing, tile: Tile) -> int:
    """Row tiles there can be at most: each expert's last one may be part empty."""
    return min(cdiv(routing.size, tile.m) + routing.experts - 1, routing.size)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _padded_rank(rank: int) -> int:
    return max(16, next_power(rank)) if rank else 0  # 16: the least a matrix instruction reduces over


def _weight_arguments(weight: Weight) -> tuple[Tensor, ...]:
    return pointers(weight) if isinstance(weight, NF4) else (weight,) * 6


def _common(weight: Weight, routing: Routing, tile: Tile) -> dict[str, Any]:
    nf4 = isinstance(weight, NF4)
    return {
        "EXPERTS": routing.experts,
        "PADDED": next_power(routing.experts),
        "NF4": nf4,
        "NESTED": isinstance(weight, NF4) and weight.nested,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP": tile.group,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": not nf4,  # decoded values are bitsandbytes' to the bit
    }
