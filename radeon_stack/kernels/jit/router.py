"""From logits, or from hidden states, to a token's experts; and back."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def choose(
    score,
    real,
    weight,
    index,
    token,
    here,
    TOP_K: tl.constexpr,
    TOP_PADDED: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """softmax of score, float32 [tokens, experts] (-inf where not `real`), the TOP_K largest, their weights divided by
    their sum with NORMALISE.

    weight: [tokens, TOP_K]; index: int64 [tokens, TOP_K]. Of equal ones the first is taken; NaN counts as the largest,
    as torch.topk has it.
    """
    number = tl.arange(0, score.shape[1])
    power = tl.exp(score - tl.max(score, 1)[:, None])
    share = power / tl.sum(power, 1)[:, None]
    # What is left to choose from: below 0 is taken already, above 1 is NaN.
    left = tl.where(real, tl.where(share == share, share, 2.0), -1.0)
    choice = tl.arange(0, TOP_PADDED)
    chosen = tl.zeros((score.shape[0], TOP_PADDED), tl.float32)
    which = tl.zeros((score.shape[0], TOP_PADDED), tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(left, 1, tie_break_left=True)
        mine = number[None, :] == best[:, None]
        value = tl.sum(tl.where(mine, share, 0.0), 1)
        chosen = tl.where((choice == k)[None, :], value[:, None], chosen)
        which = tl.where((choice == k)[None, :], best[:, None], which)
        left = tl.where(mine, -1.0, left)
    if NORMALISE:
        chosen = chosen / tl.sum(chosen, 1)[:, None]
    out = (token.to(tl.int64) * TOP_K)[:, None] + choice[None, :]
    ok = here[:, None] & (choice < TOP_K)[None, :]
    tl.store(weight + out, chosen.to(weight.dtype.element_ty), mask=ok)
    tl.store(index + out, which.to(tl.int64), mask=ok)


@triton.jit
def unchoose(score, index, d_weight, token, here, TOP_K: tl.constexpr, NORMALISE: tl.constexpr):
    """d_logits of `choose`, float32 [tokens, experts]; the softmax is computed again.

    With NORMALISE the weights w are the softmax of the chosen logits alone: d_logit = w · (d_weight - Σ w · d_weight).
    Without, of all: the same with the shares, where d_weight is 0 for those not chosen.
    """
    number = tl.arange(0, score.shape[1])
    gradient = tl.zeros(score.shape, tl.float32)
    chosen = tl.zeros(score.shape, tl.int1)
    for k in tl.static_range(TOP_K):
        at = token.to(tl.int64) * TOP_K + k
        mine = number[None, :] == tl.load(index + at, mask=here, other=-1).to(tl.int32)[:, None]
        gradient = tl.where(mine, tl.load(d_weight + at, mask=here, other=0.0).to(tl.float32)[:, None], gradient)
        chosen = chosen | mine
    if NORMALISE:
        # What makes a softmax of all NaN makes this one so too.
        score = tl.where(chosen | (score != score) | (score == float("inf")), score, -float("inf"))
    power = tl.exp(score - tl.max(score, 1)[:, None])
    share = power / tl.sum(power, 1)[:, None]
    return share * (gradient - tl.sum(share * gradient, 1)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def router_forward(
    logits,
    weight,
    index,
    tokens,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_PADDED: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """`choose` from logits [tokens, EXPERTS]."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = token < tokens
    number = tl.arange(0, PADDED)
    real = (number < EXPERTS)[None, :]
    place = (token.to(tl.int64) * EXPERTS)[:, None] + number[None, :]
    score = tl.load(logits + place, mask=here[:, None] & real, other=-float("inf")).to(tl.float32)
    choose(score, real, weight, index, token, here, TOP_K, TOP_PADDED, NORMALISE)


@triton.jit(do_not_specialize=["tokens"])
def router_backward(
    logits,
    index,
    d_weight,
    d_logits,
    tokens,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """d_logits of router_forward."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = token < tokens
    number = tl.arange(0, PADDED)
    place = (token.to(tl.int64) * EXPERTS)[:, None] + number[None, :]
    ok = here[:, None] & (number < EXPERTS)[None, :]
    score = tl.load(logits + place, mask=ok, other=-float("inf")).to(tl.float32)
    found = unchoose(score, index, d_weight, token, here, TOP_K, NORMALISE)
    tl.store(d_logits + place, found.to(d_logits.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["tokens"])
def gate_forward(
    x,
    matrix,
    weight,
    index,
    logits,
    tokens,
    width,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_PADDED: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """logits = x [tokens, width] · matrixᵀ [EXPERTS, width], rounded as the linear layer's are, and `choose`."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = token < tokens
    number = tl.arange(0, PADDED)
    real = (number < EXPERTS)[None, :]
    rows = (token.to(tl.int64) * width)[:, None]
    acc = tl.zeros((BLOCK_T, PADDED), tl.float32)
    for first in range(0, width, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        inside = column < width
        left = tl.load(x + rows + column[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        right = tl.load(matrix + (number * width)[None, :] + column[:, None], mask=real & inside[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    rounded = acc.to(logits.dtype.element_ty)
    place = (token.to(tl.int64) * EXPERTS)[:, None] + number[None, :]
    tl.store(logits + place, rounded, mask=here[:, None] & real)
    score = tl.where(real, rounded.to(tl.float32), -float("inf"))
    choose(score, real, weight, index, token, here, TOP_K, TOP_PADDED, NORMALISE)


@triton.jit(do_not_specialize=["tokens", "columns"])
def gate_backward(
    logits,
    index,
    d_weight,
    matrix,
    d_x,
    d_logits,
    tokens,
    width,
    columns,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISE: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """d_x of gate_forward, [tokens, width], `columns` of it (whole blocks) a program; with SAVE d_logits too, by the
    programs of the first ones.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = token < tokens
    number = tl.arange(0, PADDED)
    real = number < EXPERTS
    place = (token.to(tl.int64) * EXPERTS)[:, None] + number[None, :]
    ok = here[:, None] & real[None, :]
    score = tl.load(logits + place, mask=ok, other=-float("inf")).to(tl.float32)
    # Beyond the last token a softmax is NaN: its rows are not stored, and no other row reads them.
    found = unchoose(score, index, d_weight, token, here, TOP_K, NORMALISE).to(matrix.dtype.element_ty)
    if SAVE:
        if tl.program_id(1) == 0:
            tl.store(d_logits + place, found, mask=ok)
    where = (token.to(tl.int64) * width)[:, None]
    begin = tl.program_id(1) * columns
    for first in range(begin, tl.minimum(begin + columns, width), BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        inside = (column < width)[None, :]
        right = tl.load(matrix + (number * width)[:, None] + column[None, :], mask=real[:, None] & inside, other=0.0)
        out = tl.dot(found, right, input_precision="ieee")
        tl.store(d_x + where + column[None, :], out.to(d_x.dtype.element_ty), mask=here[:, None] & inside)
