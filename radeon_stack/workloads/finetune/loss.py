"""The loss of TRL's trainer, with logits made once (`kernels/head.py`) and figures that do not hold the device up.

TRL (1.16) puts a head of its own into a model's forward, which makes no whole logits either, but makes them again on
the way back; and it asks the device for each figure between a batch's way forward and its way back. Here the head is
ours where it is one that ours computes, and figures wait until a step is told.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from radeon_stack.kernels.head import score
from radeon_stack.kernels.launch import can_run_on
from radeon_stack.workloads.finetune.encoding import IGNORED

# What some families do to logits afterwards, as their configurations name it.
CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


def use_head(model: Any, dtype: torch.dtype) -> str:
    """Put our head in the place of TRL's where it is one that ours computes; what is in, or "off" and why.

    model: transformers' own, as it is inside PEFT's, with TRL's head in it. dtype: what is computed in.
    """
    text = model.config.get_text_config()
    if change := next((name for name in CHANGES if getattr(text, name, None) is not None), None):
        return f"off ({change} changes its logits)"
    if getattr(text, "output_router_logits", False):
        return "off (a loss wants the routers' logits)"
    if why := _unfit(model.get_output_embeddings(), dtype):
        return f"off ({why})"
    model.forward = MethodType(_instead_of(model.forward, type(model).forward), model)
    return "on"


def _unfit(head: Any, dtype: torch.dtype) -> str | None:
    """Why a head is not one that ours computes."""
    if type(head) is not nn.Linear or head.bias is not None:
        return "the head is no plain matrix"
    if head.weight.requires_grad:
        return "the head is trained"
    if head.weight.dtype != dtype:
        return f"the head is in {head.weight.dtype}".replace("torch.", "")
    return None if can_run_on(head.weight.device) else "no GPU"


def _instead_of(fused: Any, plain: Any) -> Any:
    """A forward that computes by ours what TRL asks of `fused` with labels; its signature is that of `plain`."""

    @functools.wraps(plain)
    def forward(self: Any, *arguments: Any, fused_lm_head: bool = False, labels: Any = None, **named: Any) -> Any:
        weight = self.get_output_embeddings().weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        if not fused_lm_head or weight.dtype != dtype:
            more = {} if labels is None else {"labels": labels}
            return fused(*arguments, fused_lm_head=fused_lm_head, **more, **named)
        # Before anything is computed: how many there are, the host has to wait for.
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).to(weight.device).flatten()
        index = (targets != IGNORED).nonzero().flatten()
        hidden = self.base_model(*arguments, **{**named, "use_cache": False}).last_hidden_state
        scores = score(hidden.to(weight.device, dtype).flatten(0, 1), weight, targets, index)
        return _output(scores, targets)

    return forward


def _output(scores: Any, targets: Tensor) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    return FusedCausalLMOutput(
        log_probs=scores.log_probs,
        entropy=scores.entropy,
        is_top1=scores.is_top1,
        label_mask=targets != IGNORED,
    )


def loss_of(output: Any, count: Tensor | int | None) -> Tensor:
    """The mean negative log-likelihood; `count`: of the global batch's tokens to be learnt, None: of this one's."""
    tokens = output.label_mask.sum() if count is None else count
    # The head may be on another card than the batch.
    return -output.log_probs.sum() / torch.as_tensor(tokens, device=output.log_probs.device).clamp(min=1)


class Tally:
    """A trainer's figures of its batches, left on the device until a step is told."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._tokens = 0

    def add(self, output: Any, inputs: Mapping[str, Any]) -> None:
        """Of one batch: what its forward gave, and what went in."""
        mask, learnt = inputs.get("attention_mask"), output.label_mask.sum()
        tokens = learnt.new_full((), inputs["input_ids"].numel()) if mask is None else mask.sum()
        sums = output.entropy.detach().sum(), output.is_top1.sum(), learnt, tokens
        self._rows.append(torch.stack([one.to(learnt.device, torch.float64) for one in sums]))

    def take(self, gather: Callable[[Tensor], Tensor], *, train: bool) -> dict[str, list[float]]:
        """A value for each batch since the last time, over all processes (`gather`: their tensors one after another;
        rows that fill up their last batch count too), and of `train` the tokens that went in until now; {} where there
        was no batch.
        """
        if not self._rows:
            return {}
        told = gather(torch.stack(self._rows)[None]).sum(0)  # [batches, sums]
        self._rows.clear()
        entropy, right = (told[:, :2] / told[:, 2:3].clamp(min=1)).T.tolist()
        figures = {"entropy": entropy, "mean_token_accuracy": right}
        if train:
            self._tokens += int(told[:, 3].sum())
            figures["num_tokens"] = [self._tokens]
        return figures
