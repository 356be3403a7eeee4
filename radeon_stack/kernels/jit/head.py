"""Scores of next tokens from rows of logits, which become their own gradient."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # finite: what no word has reached yet; its difference to itself is a number


@triton.jit
def score_rows(logits, targets, log_probs, entropy, is_top1, width, scale, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """A row of logits [width] a program: its target's log p, the entropy −Σ p·log p, whether no word is before it.

    With GRADIENT the row becomes that of log p, times scale: scale · (1 at the target − p).
    """
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * width
    target = tl.load(targets + row)
    of_target = tl.load(start_of_row + target).to(tl.float32)
    # A lane has sums of its own, relative to the highest that it has met; they come together at the end.
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        word = start + tl.arange(0, BLOCK)
        z = tl.load(start_of_row + word, mask=word < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, z)
        shrink = tl.exp(highest - higher)
        e = tl.exp(z - higher)
        total = total * shrink + e
        weighted = weighted * shrink + e * tl.where(e > 0, z, 0.0)  # 0 · −∞ would be NaN
        before += ((z > of_target) | ((z == of_target) & (word < target))).to(tl.int32)
        highest = higher
    most = tl.max(highest, 0)
    rescale = tl.exp(highest - most)
    sum_exp = tl.sum(total * rescale, 0)
    log_z = most + tl.log(sum_exp)
    tl.store(log_probs + row, of_target - log_z)
    tl.store(entropy + row, log_z - tl.sum(weighted * rescale, 0) / sum_exp)
    tl.store(is_top1 + row, (tl.sum(before, 0) == 0).to(tl.int8))
    if GRADIENT:
        for start in range(0, width, BLOCK):
            word = start + tl.arange(0, BLOCK)
            inside = word < width
            z = tl.load(start_of_row + word, mask=inside, other=0.0).to(tl.float32)
            gradient = scale * (tl.where(word == target, 1.0, 0.0) - tl.exp(z - log_z))
            tl.store(start_of_row + word, gradient.to(logits.dtype.element_ty), mask=inside)
