"""What an adapter adds to each tensor of a checkpoint, by the names that the checkpoint's files have.

A checkpoint may hold a parameter otherwise than the model does: Qwen3-MoE's has each expert's gate, up and down by
themselves, where the model has all experts' in one. transformers knows the way back (it saves by it); here it is asked
with numbered marks in place of the weights, so nothing is loaded for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from radeon_stack.errors import UsageError
from radeon_stack.kernels.interface import is_experts, matrix_names

PREFIX, NESTED = "base_model.model.", ".base_layer"
# Forms of LoRA that add something else than scale · b·a; ours have none of them.
OTHER_FORMS = ("use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "trainable_token_indices")
HALVES = 2  # gate and up
MOST_EXPERTS = 1 << 20


@dataclass(frozen=True)
class Factors:
    """scale · b·a is added to a parameter of the model. a: [experts ·] rank × columns; b: rows × rank [· experts].

    They are read when they are needed, from `file`. experts is 0 for a matrix that is no experts'; gated: its rows are
    gate's and then up's.
    """

    file: Path
    key: str
    scale: float
    experts: int = 0
    gated: bool = False

    def delta(self, expert: int = 0) -> torch.Tensor:
        """[rows, columns] in float32, of one expert where there are several."""
        with safe_open(self.file, framework="pt") as tensors:
            a, b = tensors.get_slice(f"{self.key}.lora_A.weight"), tensors.get_slice(f"{self.key}.lora_B.weight")
            if not self.experts:
                return self.scale * (b[:].float() @ a[:].float())
            rank = a.get_shape()[0] // self.experts
            mine = a[expert * rank : (expert + 1) * rank].float()
            # An expert's columns of b lie apart: rank is the outer of the two (PEFT's ParamWrapper).
            return self.scale * (b[:].view(-1, rank, self.experts)[:, :, expert].float() @ mine)


@dataclass(frozen=True)
class Target:
    """A tensor of the checkpoint's: what is added to it. expert None: all of them, [experts, rows, columns].

    half: the parameter's rows are halved, and these are the first (0) or the second (1); None: all rows.
    """

    factors: Factors
    expert: int | None = None
    half: int | None = None

    @property
    def must_move(self) -> bool:
        """Whether the tensor changes for certain. An expert that no token went to has learnt nothing."""
        return not self.factors.experts

    def added_to(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum, taken in float32 and rounded once. UsageError when shapes do not fit or it is not finite."""
        if self.factors.experts and self.expert is None:
            parts = [self._sum(part, self.factors.delta(number)) for number, part in enumerate(tensor)]
            return torch.stack(parts)
        delta = self.factors.delta(self.expert or 0)
        return self._sum(tensor, delta if self.half is None else delta.chunk(HALVES)[self.half])

    def _sum(self, tensor: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        if tensor.shape != delta.shape:
            raise UsageError(
                f"{self.factors.key} is for a tensor of {list(delta.shape)}; the base has {list(tensor.shape)}",
                where=str(self.factors.file),
                remedy="merge into the base that it was trained on",
            )
        total = (tensor.float() + delta).to(tensor.dtype)
        if not torch.isfinite(total).all():
            raise UsageError(f"{self.factors.key} makes values that are not finite", where=str(self.factors.file))
        return total


def targets(base: Path, adapter: Path) -> dict[str, Target]:
    """Each tensor that the adapter changes, by its name in the base folder's files.

    UsageError for adapters of other forms than LoRA's plain one, and for what is no adapter of this base.
    """
    config = LoraConfig.from_pretrained(str(adapter))
    for name in OTHER_FORMS:
        if getattr(config, name, None):
            raise UsageError(f"adapters with {name} cannot be merged", where=str(adapter / "adapter_config.json"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    factors = _factors(model, config, adapter / "adapter_model.safetensors")
    found = list(factors.values())
    marks = {name: _mark(number, one, model, name) for number, (name, one) in enumerate(factors.items())}
    return {name: _target(found, name, mark) for name, mark in revert_weight_conversion(model, marks).items()}


def _factors(model: Any, config: LoraConfig, file: Path) -> dict[str, Factors]:
    """By the model's own names of parameters."""
    modules = dict(model.named_modules())
    found = {}
    with safe_open(file, framework="pt") as tensors:
        names = [name for name in tensors.keys() if name.endswith(".lora_A.weight")]  # noqa: SIM118 - no dict
        keys = sorted(name.removesuffix(".lora_A.weight") for name in names)
        shapes = {key: tensors.get_slice(f"{key}.lora_A.weight").get_shape() for key in keys}
    for key in keys:
        path = key.removeprefix(PREFIX)
        module = modules.get(path.replace(NESTED, ""))
        if module is None:
            raise UsageError(f"the base has no {path}", where=str(file), remedy="merge into the base it was trained on")
        experts, gated, name = 0, False, f"{path}.weight"
        if is_experts(module):
            matrix = _matrix(module, config, path.count(NESTED))
            name, experts = f"{path.replace(NESTED, '')}.{matrix}", int(getattr(module, matrix).shape[0])
            gated = module.has_gate and matrix == matrix_names(module)[0]
        rank = shapes[key][0] // max(1, experts)
        pattern = get_pattern_key(config.alpha_pattern.keys(), name.removesuffix(".weight"))
        alpha = config.alpha_pattern.get(pattern, config.lora_alpha)
        found[name] = Factors(file, key, alpha / (rank**0.5 if config.use_rslora else rank), experts, gated)
    return found


def _matrix(module: Any, config: LoraConfig, depth: int) -> str:
    """Which of a layer's matrices a wrapper is for: PEFT nests them, the first one innermost."""
    own = [name for name in matrix_names(module) if any(t.endswith(name) for t in config.target_parameters or ())]
    if not depth < len(own):
        raise UsageError(
            f"target_parameters names {len(own)} matrices of {type(module).__name__}, and there are more adapters",
            where="adapter_config.json",
        )
    return own[len(own) - 1 - depth]


def _mark(number: int, factors: Factors, model: Any, name: str) -> torch.Tensor:
    """A small tensor in a parameter's place; its values tell which part of which one they stand for."""
    if not factors.experts:
        return torch.tensor([[number * MOST_EXPERTS * HALVES]])
    module = model.get_submodule(name.rpartition(".")[0])
    if module.is_transposed:
        raise UsageError(f"{name}: adapters of transposed experts cannot be merged", remedy="merge them with PEFT")
    expert = number * MOST_EXPERTS + torch.arange(factors.experts)[:, None, None]
    return expert * HALVES + torch.arange(HALVES if factors.gated else 1)[None, :, None]


def _target(factors: Sequence[Factors], name: str, mark: torch.Tensor) -> Target:
    """Whose part the tensor of a file is, by the mark that came to lie in it."""
    values = mark.flatten()
    experts, halves = (values // HALVES % MOST_EXPERTS).unique(), (values % HALVES).unique()
    numbers = (values // HALVES // MOST_EXPERTS).unique()
    mine = factors[int(numbers[0])]
    half = int(halves[0]) if mark.shape[-2] == 1 and mine.gated else None
    whole = len(experts) == mine.experts and mark.ndim == 3
    if len(numbers) > 1 or not (mine.experts == 0 or whole or len(experts) == 1) or (whole and half is not None):
        raise UsageError(f"{name}: the base's files hold this otherwise than the model, in a way that is not known")
    return Target(mine, None if whole or not mine.experts else int(experts[0]), half)
