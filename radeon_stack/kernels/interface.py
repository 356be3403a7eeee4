"""Our kernels in transformers: `experts_implementation="radeon_grouped"` and `"radeon_nf4"`.

They are registered in transformers' own ExpertsInterface, so they serve every model that uses it (Qwen3-MoE, Mixtral,
gpt-oss …) and touch no model's code. 4-bit experts are bitsandbytes' parametrised parameters, read packed where its own
forward would decode all experts at every access; `quantizer.py` makes them while a checkpoint is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from radeon_stack.errors import UsageError
from radeon_stack.kernels.experts import gated_experts, grouped_linear
from radeon_stack.kernels.grouped import Weight
from radeon_stack.kernels.launch import can_run_on
from radeon_stack.kernels.nf4 import BLOCK, NF4, from_bitsandbytes
from radeon_stack.kernels.recompute import is_needed
from radeon_stack.kernels.routing import Routing, route

GROUPED, PACKED = "radeon_grouped", "radeon_nf4"
ADAPTERS = "radeon_adapters"  # a layer's attribute: for each matrix, what has its adapter (adapters.py)


def register() -> None:
    """Make both known to transformers; then pass either as `experts_implementation`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(GROUPED, radeon_grouped)
    ALL_EXPERTS_FUNCTIONS.register(PACKED, radeon_nf4)


def pack_experts(model: nn.Module, *, double: bool = False) -> int:
    """Quantise the experts' matrices of all layers to NF4, in place; returns how many values are in 4 bits now.

    `double` quantises the scales too (0.516 bytes a value instead of 0.5625); the kernels are quicker without.
    UsageError when a matrix's rows are no whole blocks of 64.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    found = [(module, name) for module in model.modules() for name in expert_matrices(module)]
    for module, name in found:  # all are looked at before the first is changed
        width = getattr(module, name).shape[-1]
        if width % BLOCK:
            raise UsageError(
                f"{type(module).__name__}.{name}: rows of {width} values are no whole blocks of {BLOCK}",
                remedy="keep these experts in 16 bit",
            )
    values = 0
    for module, name in found:
        values += getattr(module, name).numel()
        replace_parameter_4bit(module, name, compress_statistics=double, quant_type="nf4", blocksize=BLOCK)
    return values


def radeon_grouped(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An experts' forward over 16-bit matrices: hidden_states [tokens, width] → the same."""
    return _forward(self, hidden_states, top_k_index, top_k_weights)


def radeon_nf4(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The same over packed matrices; UsageError when they are not packed, since that is what was asked for."""
    return _forward(self, hidden_states, top_k_index, top_k_weights, packed=True)


def is_fused(module: nn.Module) -> bool:
    """Whether a layer is silu(gate)·up without biases, gate's rows first: what the fused kernels are made for."""
    from transformers.integrations.moe import _default_apply_gate

    act = getattr(module, "act_fn", None)
    return (
        bool(getattr(module, "has_gate", False))
        and not any(getattr(module, name, False) for name in ("has_bias", "is_transposed", "has_post_expert_norm"))
        and bool(getattr(module, "is_concatenated", False))
        and getattr(type(module), "_apply_gate", None) is _default_apply_gate
        and (isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation")
    )


def _forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor, *, packed: bool = False) -> Tensor:
    up_name, down_name = matrix_names(module)
    up, down = experts_weight(module, up_name), experts_weight(module, down_name)
    for name, weight in ((up_name, up), (down_name, down)):
        if packed and not isinstance(weight, NF4):
            raise UsageError(
                f"{type(module).__name__}.{name} is in {weight.dtype}, not in NF4",
                where=f'experts_implementation="{PACKED}"',
                remedy=f"pack_experts(model), or {GROUPED}",
            )
    x = hidden.to(_computed_in(hidden, up))
    partial = bool(getattr(module, "_is_expert_parallel", True))  # transformers 5.17 does not tell
    if is_fused(module):
        wrappers = getattr(module, ADAPTERS, {})
        adapters = (wrappers[name].adapter() if name in wrappers else None for name in (up_name, down_name))
        needed = is_needed(module)
        return gated_experts(x, index, weights, up, down, *adapters, partial=partial, needed=needed).to(hidden.dtype)
    if not can_run_on(hidden.device):
        from transformers.integrations.moe import grouped_mm_experts_forward

        by_torch: Tensor = grouped_mm_experts_forward(module, hidden, index, weights)
        return by_torch
    routing = route(index, up.shape[0], partial=partial)
    bias = (getattr(module, f"{name}_bias") if module.has_bias else None for name in (up_name, down_name))
    transposed = bool(module.is_transposed)
    y = grouped_linear(x, up, routing, bias=next(bias), transposed=transposed, by_token=True)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = grouped_linear(y, down, routing, bias=next(bias), transposed=transposed)
    y = module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y
    return _weighted_sum(y, weights, routing).to(hidden.dtype)


def _computed_in(hidden: Tensor, weight: Weight) -> torch.dtype:
    """The weight's dtype (a norm may hand on float32), or autocast's where it is on."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _weighted_sum(y: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """Sorted rows [slots, width] back to tokens, each slot with its weight, in float32 and in slot order."""
    position = torch.arange(routing.size, device=y.device)
    placed = position < routing.offsets[-1]
    slots = routing.slots.long()
    share = torch.where(placed, weights.flatten()[slots], 0).unsqueeze(1)
    rows = torch.where(placed.unsqueeze(1), y, 0).float() * share  # what nobody wrote may be NaN
    # Rows of no expert go to a row of their own, which is dropped.
    target = torch.where(placed, slots, routing.size)
    by_slot = rows.new_zeros(routing.size + 1, y.shape[1]).index_copy(0, target, rows)
    return by_slot[: routing.size].view(routing.tokens, routing.top_k, -1).sum(1)


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers' layers of experts."""
    return hasattr(module, "has_gate") and hasattr(module, "is_concatenated")


def matrix_names(module: Any) -> tuple[str, str]:
    """The names of its two matrices."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def expert_matrices(module: nn.Module) -> list[str]:
    """Names of a layer's matrices that are still in 16 bit."""
    own = dict(module.named_parameters(recurse=False))  # a packed one is none, and asking for it would decode it
    return [name for name in matrix_names(module) if name in own] if is_experts(module) else []


def experts_weight(module: Any, name: str) -> Weight:
    """[experts, rows, columns], packed where bitsandbytes has parametrised it."""
    parametrised = getattr(module, "parametrizations", {})
    steps: Any = parametrised[name] if name in parametrised else ()  # noqa: SIM401 - a ModuleDict has no get
    if len(steps) != 1 or not hasattr(steps[0], "quant_state"):
        matrix: Tensor = getattr(module, name)  # somebody else's parametrisation, PEFT's say, is its own affair
        return matrix
    packed, state = steps.original, steps[0].quant_state
    if state.absmax.device != packed.device:  # module.to() moves parameters, and not what bitsandbytes keeps
        state.to(packed.device)
    return from_bitsandbytes(packed, state)
