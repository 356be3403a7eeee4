"""Liger's fused kernels in a loaded model: RMSNorm, RoPE and the MLP's gate, each a launch where torch makes several.

liger-kernel (https://github.com/linkedin/Liger-Kernel) knows each family's rules (Gemma's offset and casts, Phi-3's
fused gate_up, Qwen3's norms of q and k); transformers' `apply_liger_kernel` puts it into an instance, projections and
adapters staying the modules they are. Three things are left out:

- its loss: ours (`head.py`) is of the same form, and TRL (1.16) refuses Liger's, which would take the place of its
  forward. TRL's own flag, `use_liger_kernel`, is deprecated for kernels fetched from a hub while a run starts.
- experts, which are ours, and with them everything inside a mixture-of-experts block.
- what it does to transformers' classes, which would change models that are loaded later, on a CPU too.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.liger import apply_liger_kernel

from radeon_stack.kernels.interface import is_experts
from radeon_stack.kernels.launch import can_run_on
from radeon_stack.text import one_line

# By the activation that their forward takes for granted; no other is fused.
GATES = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
# Compiled for Radeons, wider rows spill up to 325 registers (benchmarks/liger_audit.json): Gemma 2 27B's MLP alone.
WIDEST_GEGLU = 32768
ROPE = "apply_rotary_pos_emb"  # what each of transformers' modelling files calls it

Rotary = Callable[..., tuple[Tensor, Tensor]]


def use_liger(model: Any) -> str:
    """Put them into a model of transformers, before or after it has adapters; what is in, or "off" and why."""
    if not can_run_on(model.device):
        return "off (no GPU)"
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        return f"off ({one_line(str(error))})"
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"off (Liger has none for {kind})"
    told = inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN[kind]).parameters
    chosen = [name for name in ("rms_norm", "rope", *_gates(model)) if name in told]
    # What is not told is on by default.
    switches = {name: name in chosen for name, one in told.items() if isinstance(one.default, bool)}
    modelling = sys.modules[_base(model).__module__]
    before = dict(vars(modelling))
    apply_liger_kernel(model, switches)
    fused = getattr(modelling, ROPE)
    vars(modelling).update(before)
    if "rope" in chosen:
        # A function, which no instance has of its own.
        setattr(modelling, ROPE, _where_it_runs(fused, before[ROPE]))
    return ", ".join(chosen)


def _base(model: Any) -> type:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model)


def _gates(model: Any) -> list[str]:
    """How its MLP is fused: by one name, or by none."""
    if any(is_experts(module) for module in model.modules()):
        return []
    activation = getattr(model.config, "hidden_activation", None) or getattr(model.config, "hidden_act", None)
    chosen = [gate for name, gate in GATES.items() if name == activation]
    return chosen if chosen != ["geglu"] or model.config.intermediate_size <= WIDEST_GEGLU else []


def _where_it_runs(fused: Rotary, plain: Rotary) -> Rotary:
    """`fused` on the device of its arguments, which is not always the current one; `plain` where kernels do not run."""

    def rotate(q: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if not can_run_on(q.device):
            return plain(q, *arguments, **named)
        with torch.cuda.device_of(q):  # does nothing for a tensor of a CPU
            return fused(q, *arguments, **named)

    return rotate
