"""Our router in loaded models: what follows a mixture's linear layer as one launch, where transformers makes six.

An instance's forward, as Liger's norms are put in; routers of the families that choose by the definition of `router.py`
and hand on weights in the logits' dtype. Others keep their own.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor

from radeon_stack.kernels.launch import can_run_on
from radeon_stack.kernels.router import gate

ROUTERS = ("Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter")


def use_gate(model: Any) -> int:
    """Put it into a model of transformers; how many routers have it now. None where a loss wants the logits: these are
    not handed on.
    """
    if getattr(model.config, "output_router_logits", False):
        return 0
    routers = [module for module in model.modules() if type(module).__name__ in ROUTERS]
    for router in routers:
        router.forward = MethodType(_forward, router)
    return len(routers)


def _forward(self: Any, hidden_states: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """(no logits, the chosen experts' weights, their numbers) of hidden states […, width], as transformers has it."""
    if not can_run_on(hidden_states.device) or hidden_states.dtype != self.weight.dtype:
        own: tuple[Tensor | None, Tensor, Tensor] = type(self).forward(self, hidden_states)
        return own
    rows = hidden_states.reshape(-1, self.hidden_dim)
    return None, *gate(rows, self.weight, self.top_k, normalise=self.norm_topk_prob)
