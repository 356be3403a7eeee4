"""LoRA over 4-bit weights, in PEFT's own form and by our kernels.

A linear layer: PEFT adds products of its own to bitsandbytes', and autograd goes back through each; here they are one
operation. Experts (`target_parameters`): PEFT adds b·a to all experts' weights in every forward pass; here its wrapper
hands the factors to the grouped products, which multiply rows with them and never make such a sum. Names, shapes,
state dicts and the saved adapter are PEFT's: `PeftModel.from_pretrained` loads it on a 16-bit base without us.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

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
from radeon_stack.kernels.kept import given, keep_of
from radeon_stack.kernels.launch import can_run_on
from radeon_stack.kernels.linear import nf4_linear
from radeon_stack.kernels.nf4 import BLOCK, NF4, from_bitsandbytes
from radeon_stack.kernels.recompute import is_needed

ADAPTER = "default"  # PEFT's name for the one there is


class NF4LoraLinear(PeftLinear4bit):
    """PEFT's adapted Linear4bit, computed by `nf4_linear` where that is the same: one plain adapter, no dropout, NF4
    in blocks of 64, a device that kernels run on. Anything else is PEFT's own forward.
    """

    _packed: NF4 | None = None  # as the last forward pass met it

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        base = self.get_base_layer()
        if arguments or named or not self._is_plain(base) or not can_run_on(x.device):
            return super().forward(x, *arguments, **named)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.compute_dtype or x.dtype
        weight, known = self._weight(base.weight), given(self)
        if not is_needed(self):
            known = replace(known, out=x.new_zeros((), dtype=dtype).expand(*x.shape[:-1], weight.shape[0]))
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        scale, keep = self.scaling[ADAPTER], keep_of(self)
        return nf4_linear(x.to(dtype), weight, a, b, scale, base.bias, given=known, keep=keep).to(x.dtype)

    @property
    def rank(self) -> int:
        """The adapter's."""
        return int(self.r[ADAPTER])

    def _weight(self, parameter: Any) -> NF4:
        state, packed = parameter.quant_state, self._packed
        # module.to() makes other tensors of them.
        if packed is None or packed.absmax is not state.absmax or packed.packed.data_ptr() != parameter.data_ptr():
            packed = from_bitsandbytes(parameter.data, state)
            self.__dict__["_packed"] = packed
        return packed

    def _is_plain(self, base: Any) -> bool:
        state = base.weight.quant_state
        return (
            not self.disable_adapters
            and not self.merged
            and self.active_adapters == [ADAPTER]
            and ADAPTER not in self.lora_variant
            and isinstance(self.lora_dropout[ADAPTER], nn.Identity)
            and not self.lora_bias[ADAPTER]
            and state is not None
            and (state.quant_type, state.blocksize) == ("nf4", BLOCK)
            and state.shape[-1] % BLOCK == 0
        )


def use_nf4_linear(config: LoraConfig) -> LoraConfig:
    """Have PEFT adapt bitsandbytes' Linear4bit by our layer."""
    config._register_custom_module({Linear4bit: NF4LoraLinear})
    return config


def can_keep(module: nn.Module) -> bool:
    """Whether a module heeds `kept.keep_of` and `kept.given`: its adapter is part of its product."""
    return isinstance(module, NF4LoraLinear) and module.rank <= MAX_RANK


def can_spare(module: nn.Module) -> bool:
    """Whether a module heeds `recompute.is_needed`, wherever its product is ours."""
    return isinstance(module, NF4LoraLinear) or (is_experts(module) and is_fused(module))


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
