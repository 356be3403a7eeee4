"""NF4 to 16 bit, once."""

from __future__ import annotations

import triton
import triton.language as tl

from radeon_stack.kernels.jit.weights import NESTED_BLOCK, NF4_BLOCK, lookup, nf4_scale


@triton.jit
def decode_blocks(
    packed,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    out,
    size,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i] = code[nibble i] · absmax[i / 64]; `size` values, a multiple of 64."""
    decode_block(
        tl.program_id(0), packed, absmax, code, nested_absmax, nested_code, nested_offset, out, size, NF4, NESTED, BLOCK
    )


@triton.jit
def decode_block(
    number,
    packed,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    out,
    size,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The BLOCK values of one program."""
    first = number.to(tl.int64) * BLOCK
    half = first // 2 + tl.arange(0, BLOCK // 2)
    byte = tl.load(packed + half, mask=half < size // 2, other=0).to(tl.int32)
    values = tl.join(lookup(code, byte >> 4, NF4), lookup(code, byte, NF4))
    block = tl.minimum(first // NF4_BLOCK + tl.arange(0, BLOCK // NF4_BLOCK), size // NF4_BLOCK - 1)
    outer = tl.load(nested_absmax + block // NESTED_BLOCK) if NESTED else block
    scale = nf4_scale(tl.load(absmax + block), outer, nested_code, nested_offset, NESTED)
    values = tl.reshape(tl.reshape(values, (BLOCK // NF4_BLOCK, NF4_BLOCK)) * scale[:, None], (BLOCK,))
    place = first + tl.arange(0, BLOCK)
    tl.store(out + place, values.to(out.dtype.element_ty), mask=place < size)
