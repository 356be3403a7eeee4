"""Matrices in bitsandbytes' NF4, as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radeon_stack.errors import UsageError
from radeon_stack.kernels.configs import NF4_DECODE_BLOCK, Tile
from radeon_stack.kernels.sizes import SIZES

BLOCK = 64
NESTED_BLOCK = 256


class Form(NamedTuple):
    """What kernels are compiled for, of a matrix. lookup: how a nibble becomes a value (`jit.weights`); nested: its
    scales are quantised too; aligned: its bytes can be read as words.
    """

    lookup: int
    nested: bool
    aligned: bool


@dataclass(frozen=True)
class NF4:
    """[…, rows, columns] in 4 bits: bitsandbytes' packed bytes and its scales, not copied.

    packed: uint8, two values a byte, the first in the high half. absmax: float32, one for 64 values; doubly quantised,
    uint8 with nested_absmax (float32, one for 256 of them), nested_code (float32 [256]) and nested_offset (float32 []).
    code: float32 [16]. `dtype` is what bitsandbytes decodes to.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: torch.Size
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    @property
    def lookup(self) -> int:
        """The kernels' NF4 constant (`jit.weights`): 2, by warp shuffle, on CUDA; 1, by selects, anywhere else."""
        return _lookup(self.packed.device)

    @property
    def form(self) -> Form:
        return Form(self.lookup, self.nested, self.packed.data_ptr() % 4 == 0)

    @cached_property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What every kernel that reads NF4 takes, in its order; what is not there is stood in for and never read."""
        nested = (self.nested_absmax, self.nested_code, self.nested_offset)
        first, second, third = (self.code if part is None else part for part in nested)
        return self.packed, self.absmax, self.code, first, second, third

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes in memory, scales and tables included."""
        parts = (self.packed, self.absmax, self.code, self.nested_absmax, self.nested_code, self.nested_offset)
        return sum(part.nbytes for part in parts if part is not None)


@cache
def _lookup(device: torch.device) -> int:
    return 2 if device.type == "cuda" and torch.version.hip is None else 1


def from_bitsandbytes(packed: Tensor, state: Any) -> NF4:
    """What `bitsandbytes.functional.quantize_4bit` returned. UsageError for other types and block sizes."""
    if state.quant_type != "nf4" or state.blocksize != BLOCK:
        raise UsageError(
            f"{state.quant_type} in blocks of {state.blocksize}: the kernels take nf4 in blocks of {BLOCK}"
        )
    if state.shape[-1] % BLOCK:
        raise UsageError(f"rows of {state.shape[-1]} values: blocks of {BLOCK} would run over their ends")
    packed = packed.view(torch.uint8)  # bitsandbytes can keep its bytes as numbers of another type (quant_storage)
    if not state.nested:
        return NF4(packed, state.absmax, state.code, torch.Size(state.shape), state.dtype)
    if state.state2.blocksize != NESTED_BLOCK:
        raise UsageError(f"absmax in blocks of {state.state2.blocksize}: the kernels take {NESTED_BLOCK}")
    return NF4(
        packed,
        state.absmax,
        state.code,
        torch.Size(state.shape),
        state.dtype,
        state.state2.absmax,
        state.state2.code,
        state.offset,
    )


def quantize(matrix: Tensor, *, double: bool = True) -> NF4:
    """A 16- or 32-bit matrix in NF4, by bitsandbytes. The values are its; so are the rounding and the layout."""
    from bitsandbytes.functional import quantize_4bit

    return from_bitsandbytes(*quantize_4bit(matrix, blocksize=BLOCK, quant_type="nf4", compress_statistics=double))


def scales(matrix: NF4) -> Tensor:
    """absmax in float32, [values / 64]."""
    if matrix.nested_absmax is None or matrix.nested_code is None or matrix.nested_offset is None:
        return matrix.absmax
    outer = matrix.nested_absmax.repeat_interleave(NESTED_BLOCK)[: matrix.absmax.numel()]
    return matrix.nested_code[matrix.absmax.flatten().long()] * outer + matrix.nested_offset


def with_float_scales(matrix: NF4) -> NF4:
    """The same values with their scales in float32: 0.5625 bytes a value for 0.516, and in the products' inner loop
    no scale that has to be looked up by another one that is still on its way.
    """
    return replace(matrix, absmax=scales(matrix), nested_absmax=None, nested_code=None, nested_offset=None)


def decode_reference(matrix: NF4, dtype: torch.dtype | None = None) -> Tensor:
    """The definition: value = code[nibble] · absmax of its block, in float32, then rounded to `dtype`."""
    packed = matrix.packed.flatten().int()
    nibbles = torch.stack((packed >> 4, packed & 15), -1).flatten().long()
    blocks = matrix.code[nibbles].view(-1, BLOCK)
    return (blocks * scales(matrix).view(-1, 1)).view(matrix.shape).to(dtype or matrix.dtype)


def decode(matrix: NF4, dtype: torch.dtype | None = None) -> Tensor:
    """All of it in 16 bit, by the kernel: where many rows use it, once is cheaper than in every tile."""
    from radeon_stack.kernels.jit.decode import decode_blocks
    from radeon_stack.kernels.launch import launch

    out = matrix.packed.new_empty(matrix.shape, dtype=dtype or matrix.dtype)
    values = out.numel()
    grid = (decode_programs(values), 1, 1)
    launch(decode_blocks, grid, (*matrix.pointers, out, values), decode_constants(matrix), fp_fusion=False)
    return out


def decode_programs(values: int) -> int:
    """How many programs decode so many."""
    return -(-values // NF4_DECODE_BLOCK)


def decode_constants(matrix: NF4) -> dict[str, Any]:
    """The kernels' constants for decoding all of it."""
    return {"NF4": matrix.lookup, "NESTED": matrix.nested, "BLOCK": NF4_DECODE_BLOCK}


def decoding(matrix: NF4, tile: Tile, k: int, width: int, *, over_columns: bool) -> dict[str, Any]:
    """The kernels' constants for how a product decodes: over k, into tiles of `width` columns of accumulators."""
    return turning(tile, k, width, over_columns=over_columns, aligned=matrix.form.aligned)


@lru_cache(SIZES)
def turning(tile: Tile, k: int, width: int, *, over_columns: bool, aligned: bool) -> dict[str, Any]:
    """`decoding`, of a matrix whose bytes are `aligned` to words or not."""
    across = min(16 * tile.warps, width)
    # Down the rows a thread takes a word, a half or a byte of one.
    fits = k % tile.k == 0 and (tile.k >= BLOCK if over_columns else width // (16 * tile.warps) in (1, 2, 4))
    turned = tile.turned and fits and aligned
    return {"TURNED": across if turned else 0, "PAIRS": tile.pairs and turned}
