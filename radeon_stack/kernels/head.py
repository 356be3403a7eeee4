"""A frozen language model's head: how likely each token to be learnt was, and the way back, from logits made once.

The gradient of a token's log p to its hidden state is its own row alone, (1 at the target − p) · W, whatever the loss
makes of log p: it is computed while the logits are there, and the way back multiplies each row with one number. At most
256 MiB of logits are there at once. (Liger's fused linear cross-entropy has the first idea, arXiv 2410.10989, section
3.3, for the loss's mean; its 0.8.5 multiplies ignored tokens too, asks the host for their count, and tells no entropy.
TRL's head, 1.16, makes the logits again on the way back.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from radeon_stack.kernels.configs import HEAD_BLOCK, HEAD_WARPS
from radeon_stack.kernels.launch import launch
from radeon_stack.kernels.once import apply, once_differentiable
from radeon_stack.kernels.sizes import cdiv

TILE_BYTES = 256 << 20  # of logits at once
TILE_ROWS = 128  # a multiple of which they are: what products like
# Of a gradient in float16, in which most words' p would be none: 2⁻²⁴ is its least.
HALF_SCALE = 1024.0


@dataclass(frozen=True)
class Scores:
    """Of each token that is to be learnt, [tokens]."""

    log_probs: Tensor
    """float32; the only one with a gradient."""
    entropy: Tensor
    """float32: of the distribution of next tokens, in nats."""
    is_top1: Tensor
    """int8: 1 where no word is likelier, and none as likely with a lower number."""


def score_reference(hidden: Tensor, weight: Tensor, targets: Tensor, index: Tensor) -> Scores:
    """The definition. hidden: [rows, width]; weight: [words, width]; targets: int64 [rows]; index: int64 [tokens], the
    rows to be learnt.
    """
    logits = hidden[index] @ weight.T
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    chosen = targets[index]
    return Scores(
        log_p.gather(-1, chosen[:, None])[:, 0],
        -(log_p.exp() * log_p).sum(-1),
        (logits.argmax(-1) == chosen).to(torch.int8),
    )


def score(hidden: Tensor, weight: Tensor, targets: Tensor, index: Tensor) -> Scores:
    """The same with a frozen weight of hidden's dtype, through at most TILE_BYTES of logits at a time."""
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    return Scores(*apply(_Scores, hidden.contiguous(), weight, targets, index, wanted))


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, index: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale = HALF_SCALE if hidden.dtype == torch.float16 else 1.0
        tokens, words = index.numel(), weight.shape[0]
        log_probs, entropy = (torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(2))
        is_top1 = torch.empty(tokens, dtype=torch.int8, device=hidden.device)
        back = torch.zeros_like(hidden) if wanted else None
        size = tile_rows(tokens, words * hidden.element_size())
        for start in range(0, tokens, size):
            part = slice(start, start + size)
            told = log_probs[part], entropy[part], is_top1[part]
            _score_piece(hidden, weight, targets, index[part], told, back, scale)
        ctx.save_for_backward(back, index)
        ctx.scale = scale
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_probs: Tensor, *_: Any) -> tuple[Tensor, None, None, None, None]:
        back, index = ctx.saved_tensors
        of_row = d_log_probs.new_zeros(back.shape[0]).index_copy_(0, index, d_log_probs / ctx.scale)
        # In float32; rounded again, as `back` was.
        return torch.mul(back, of_row[:, None], out=torch.empty_like(back)), None, None, None, None


def _score_piece(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    told: tuple[Tensor, ...],
    back: Tensor | None,
    scale: float,
) -> None:
    """Fill what is told of these rows, and theirs of `back`. Of its own: the logits are gone when the next are made."""
    from radeon_stack.kernels.jit.head import score_rows

    logits = hidden.index_select(0, rows) @ weight.T
    arguments = (logits, targets.index_select(0, rows), *told, weight.shape[0], scale)
    constants = {"GRADIENT": back is not None, "BLOCK": HEAD_BLOCK}
    launch(score_rows, (len(rows), 1, 1), arguments, constants, warps=HEAD_WARPS)
    if back is not None:
        back.index_copy_(0, rows, logits @ weight)


def tile_rows(tokens: int, row_bytes: int) -> int:
    """Rows of logits at once: as many as TILE_BYTES hold, in pieces of the same size; at least 1, for range's step."""
    most = max(TILE_ROWS, TILE_BYTES // row_bytes // TILE_ROWS * TILE_ROWS)
    pieces = max(1, cdiv(tokens, most))
    return max(1, min(most, cdiv(cdiv(tokens, pieces), TILE_ROWS) * TILE_ROWS))
