"""Which slot goes to which expert: a slot is one of a token's top_k choices, numbered token · top_k + choice."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radeon_stack.kernels.configs import FEW_SLOTS, row_block
from radeon_stack.kernels.launch import family, launch
from radeon_stack.kernels.sizes import cdiv, next_power


class Routing(NamedTuple):
    """Slots sorted by expert, stable.

    slots: int32 [slots], the slot at each sorted position; after offsets[-1] it holds 0.
    offsets: int32 [experts + 1], each expert's first position.
    partial: some slots may be of no expert (expert parallelism masks those of other ranks).
    """

    slots: Tensor
    offsets: Tensor
    tokens: int
    top_k: int
    experts: int
    partial: bool = False

    @property
    def size(self) -> int:
        return self.tokens * self.top_k


def route_reference(index: Tensor, experts: int) -> Routing:
    """The definition. index: integers [tokens, top_k]; numbers that are no expert's are left out."""
    flat = index.flatten()
    real = (flat >= 0) & (flat < experts)
    order = torch.argsort(torch.where(real, flat, experts), stable=True).int()
    counts = torch.bincount(flat[real], minlength=experts)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
    return Routing(order, offsets, index.shape[0], index.shape[1], experts)


def route(index: Tensor, experts: int, *, partial: bool = False) -> Routing:
    """The same on the device, without asking the host: in one launch, where slots are many in two."""
    kernels, index = _kernels(), index.contiguous()
    size = index.numel()
    slots = (index.new_zeros if partial else index.new_empty)(size, dtype=torch.int32)
    offsets = index.new_empty(experts + 1, dtype=torch.int32)
    routing = Routing(slots, offsets, index.shape[0], index.shape[1], experts, partial)
    few = FEW_SLOTS[family(index.device)]
    if size <= max(few, default=0):
        chunk, warps = few[row_block(size, few)]
        arguments = (index, slots, offsets, size, experts)
        launch(kernels.sort_few_slots, (experts, 1, 1), arguments, {"CHUNK": chunk}, warps=warps)
        return routing
    block, padded = 512, next_power(experts)
    chunk = max(16, min(128, 4096 // padded))  # so many slots' choices at a time fit in registers
    blocks = cdiv(size, block)
    counts = index.new_empty(blocks, padded, dtype=torch.int32)
    sizes = {"PADDED": padded, "BLOCK": block, "CHUNK": chunk}
    launch(kernels.count_experts, (blocks, 1, 1), (index, counts, size), sizes, warps=8)
    constants = {"EXPERTS": experts, **sizes, "BLOCKS": chunk}
    launch(kernels.place_slots, (blocks, 1, 1), (index, counts, slots, offsets, size, blocks), constants, warps=8)
    return routing


def combine_reference(y: Tensor, top_k: int) -> Tensor:
    """[slots, width] → [tokens, width]: the sum of a token's slots."""
    return y.view(-1, top_k, y.shape[-1]).float().sum(1).to(y.dtype)


def combine(
    y: Tensor, top_k: int, parts: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """The same in one pass, always in the same order; on the way, parts [slots, n] are added up: [slots] in `dtype`."""
    tokens, width = y.shape[0] // top_k, y.shape[1]
    out = y.new_empty(tokens, width)
    sums = None if parts is None else parts.new_empty(y.shape[0], dtype=dtype or parts.dtype)
    count = 0 if parts is None else parts.shape[1]
    rows, columns = 4, 512
    constants = {"TOP_K": top_k, "PARTS": next_power(count) if count else 0, "BLOCK_T": rows, "BLOCK_H": columns}
    arguments = (y, out, y if parts is None else parts, out if sums is None else sums, tokens, width, count)
    launch(_kernels().combine, (cdiv(tokens, rows), cdiv(width, columns), 1), arguments, constants)
    return out, sums


@cache
def _kernels() -> Any:
    from radeon_stack.kernels.jit import routing

    return routing
