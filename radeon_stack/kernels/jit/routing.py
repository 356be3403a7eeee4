"""Slots, sorted by expert and put together again by token."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size", "experts"])
def sort_few_slots(expert_of, slots, offsets, size, experts, CHUNK: tl.constexpr):
    """What `count_experts` and `place_slots` come to, in one launch: an expert a program, each looks at all slots."""
    expert = tl.program_id(0)
    lower = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, size, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        chosen = tl.load(expert_of + slot, mask=slot < size, other=-1).to(tl.int32)
        lower += ((chosen >= 0) & (chosen < expert)).to(tl.int32)
    begin = tl.sum(lower, 0)
    tl.store(offsets + expert, begin)
    for start in range(0, size, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        chosen = tl.load(expert_of + slot, mask=slot < size, other=-1).to(tl.int32)
        mine = (chosen == expert).to(tl.int32)
        tl.store(slots + begin + tl.cumsum(mine, 0) - 1, slot, mask=mine > 0)
        begin += tl.sum(mine, 0)
    if expert == experts - 1:
        tl.store(offsets + experts, begin)


@triton.jit(do_not_specialize=["size"])
def count_experts(expert_of, counts, size, PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """counts[block, expert]: how many of the block's slots chose the expert. int32 [blocks, PADDED]."""
    block = tl.program_id(0)
    number = tl.arange(0, PADDED)
    total = tl.zeros((PADDED,), tl.int32)
    for chunk in range(0, BLOCK, CHUNK):
        slot = block * BLOCK + chunk + tl.arange(0, CHUNK)
        expert = tl.load(expert_of + slot, mask=slot < size, other=PADDED).to(tl.int32)
        total += tl.sum((expert[:, None] == number[None, :]).to(tl.int32), 0)
    tl.store(counts + block * PADDED + number, total)


@triton.jit(do_not_specialize=["size", "blocks"])
def place_slots(
    expert_of,
    counts,
    slots,
    offsets,
    size,
    blocks,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A stable counting sort: slots[position] = slot, ordered by expert, then by slot. offsets: int32 [EXPERTS + 1].

    Slots of no expert (their number is not in 0 … EXPERTS - 1) are left out.
    """
    block = tl.program_id(0)
    number = tl.arange(0, PADDED)
    total = tl.zeros((PADDED,), tl.int32)
    before = tl.zeros((PADDED,), tl.int32)
    for first in range(0, blocks, BLOCKS):
        other = first + tl.arange(0, BLOCKS)
        seen = tl.load(
            counts + (other * PADDED)[:, None] + number[None, :],
            mask=(other < blocks)[:, None] & (number < EXPERTS)[None, :],
            other=0,
        )
        total += tl.sum(seen, 0)
        before += tl.sum(tl.where((other < block)[:, None], seen, 0), 0)
    begin = tl.cumsum(total, 0) - total
    if block == 0:
        tl.store(offsets + number, begin, mask=number < EXPERTS)
        tl.store(offsets + EXPERTS, tl.sum(total, 0))
    following = begin + before
    for chunk in range(0, BLOCK, CHUNK):
        slot = block * BLOCK + chunk + tl.arange(0, CHUNK)
        expert = tl.load(expert_of + slot, mask=slot < size, other=PADDED).to(tl.int32)
        mine = (expert[:, None] == number[None, :]) & (number < EXPERTS)[None, :]
        one = mine.to(tl.int32)
        position = tl.sum(tl.where(mine, following[None, :] + tl.cumsum(one, 0) - 1, 0), 1)
        tl.store(slots + position, slot, mask=tl.sum(one, 1) > 0)
        following += tl.sum(one, 0)


@triton.jit(do_not_specialize=["tokens", "count"])
def combine(
    y,
    out,
    parts,
    sums,
    tokens,
    width,
    count,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[token] = Σ of its TOP_K slots' rows of y [tokens · TOP_K, width], in slot order, in float32.

    With PARTS (count, padded): sums[slot] = Σ parts[slot, :count] too, by the programs of the first columns.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    here = token < tokens
    ok = here[:, None] & (column < width)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for choice in tl.static_range(TOP_K):
        place = ((token * TOP_K + choice) * width)[:, None] + column[None, :]
        total += tl.load(y + place, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + (token * width)[:, None] + column[None, :], total.to(out.dtype.element_ty), mask=ok)
    if PARTS > 0:
        if tl.program_id(1) == 0:
            part = tl.arange(0, PARTS)
            for choice in tl.static_range(TOP_K):
                slot = token * TOP_K + choice
                where = (slot * count)[:, None] + part[None, :]
                share = tl.load(parts + where, mask=here[:, None] & (part < count)[None, :], other=0.0)
                tl.store(sums + slot, tl.sum(share, 1).to(sums.dtype.element_ty), mask=here)
