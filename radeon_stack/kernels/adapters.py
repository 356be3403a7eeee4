"""LoRA an expert, in PEFT's own form and by our grouped products.

PEFT adapts an experts' matrix (`target_parameters`) by adding b·a to all experts' weights in every forward pass. Here
its wrapper hands the factors to the kernels, which multiply rows with them and never make such a sum. Names, shapes,
state dicts and the saved adapter are PEFT's: `PeftModel.from_pretrained` loads it on a 16-bit base without us.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from radeon_stack.errors import UsageError
from radeon_stack.kernels.configs import MAX_RANK
from radeon_stack.kernels.experts import Adapter
from radeon_stack.kernels.interface import (
    ADAPTERS,
    GROUPED,
    PACKED,
    experts_weight,
    is_experts,
    is_fused,
    matrix_names,
)

ADAPTER = "default"  # PEFT's name for the one there is


class GroupedExpertsLora(ParamWrapper):
    """PEFT's wrapper of one matrix of a layer's experts: weight + alpha / rank · b·a an expert.

    lora_A: [experts · rank, columns]; lora_B: [rows, rank · experts], the experts innermost, as PEFT has them.
    """

    def get_param(self) -> Tensor:
        """What PEFT asks for shape, dtype and device; nothing is decoded for that."""
        weight = experts_weight(self.get_base_layer(), self.parameter_name)
        return torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)

    def adapter(self) -> Adapter | None:
        """The factors an expert, [experts, rank, columns] and [experts, rows, rank]; None while they are disabled."""
        if self.disable_adapters or ADAPTER not in self.active_adapters:
            return None
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        a = a.view(self.num_experts, -1, a.shape[1])
        b = b.view(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return Adapter(a, b, self.scaling[ADAPTER])

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Any:
        """The base layer's, which looks for its adapters itself."""
        chosen = self.get_base_layer().config._experts_implementation
        if chosen not in (GROUPED, PACKED):
            raise UsageError(
                f"experts_implementation={chosen!r} would pass the adapters of {self.parameter_name} by",
                remedy=f"model.set_experts_implementation({GROUPED!r}) or {PACKED!r}",
            )
        return self.base_layer(x, *arguments, **named)

    def merge(self, *_: Any, **__: Any) -> None:
        """Not here: the base may be packed."""
        raise UsageError("experts' adapters are merged into a 16-bit base, where PEFT loads them")


def add_experts_lora(model: Any, rank: int, alpha: float) -> list[GroupedExpertsLora]:
    """Adapters for all layers of experts of a PeftModel, beside those it has; trained like them, saved with them.

    They get the dtype of the others. UsageError for layers whose gate is their own (the products there take no
    adapters), for a rank that the kernels do not take, and where there are no experts or adapters already.
    """
    layers = [(path, module) for path, module in model.named_modules() if is_experts(module)]
    if not layers:
        raise UsageError("the model has no experts", where="config.lora.experts_rank", remedy="set it to 0")
    if not 1 <= rank <= MAX_RANK:
        raise UsageError(f"rank {rank}: the kernels take 1 to {MAX_RANK}", where="config.lora.experts_rank")
    for _, module in layers:
        if not is_fused(module):
            raise UsageError(
                f"{type(module).__name__}: adapters for its experts are not there yet",
                where="config.lora.experts_rank",
                remedy="adapt its attention alone: 0",
            )
        if hasattr(module, ADAPTERS):
            raise UsageError(f"{type(module).__name__} has adapters already")
    config = model.peft_config[ADAPTER]
    dtype = next((one.dtype for name, one in model.named_parameters() if ".lora_A." in name), torch.float32)
    added: list[GroupedExpertsLora] = []
    for path, module in layers:
        wrapped, mine = module, {}
        for name in matrix_names(module):  # the order in which PEFT nests them: names of saved tensors depend on it
            wrapped = GroupedExpertsLora(wrapped, ADAPTER, name, config=config, r=rank, lora_alpha=alpha)
            mine[name] = wrapped
        for one in mine.values():
            one.lora_A.to(dtype)
            one.lora_B.to(dtype)
        setattr(module, ADAPTERS, mine)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapped)
        added += mine.values()
    path, module = layers[0]
    targets = [f"{path.rpartition('.')[2]}.{name}" for name in matrix_names(module)]
    config.target_parameters = [*(config.target_parameters or ()), *targets]
    config.rank_pattern |= dict.fromkeys(targets, rank)
    config.alpha_pattern |= dict.fromkeys(targets, alpha)
    return added
