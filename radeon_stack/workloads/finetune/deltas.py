"""What an adapter adds to each tensor of a checkpoint, by the names that the checkpoint's files have.

A checkpoint may hold a parameter otherwise than the model does: Qwen3-MoE's has each expert's gate, up and down by
themselves, where the model has all experts' in one. transformers knows the way back (it saves by it); here it is asked
with numbered marks in place of the weights, so nothing is loaded for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from radeon_stack.errors import UsageError
from radeon_stack.kernels.interface import is_experts, matrix_names
from radeon_stack.safetensor_files import Place, places_in
from radeon_stack.workloads.finetune.streams import read_values

PREFIX, NESTED = "base_model.model.", ".base_layer"
A, B = ".lora_A.weight", ".lora_B.weight"
# Forms of LoRA that add something else than scale · b·a; ours have none of them.
OTHER_FORMS = (
    *("use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "trainable_token_indices"),
    *("layer_replication", "alora_invocation_tokens"),
)
# Ways to begin that change the base's own weights, of which an adapter says nothing.
OTHER_BEGINNINGS = ("pissa", "olora", "corda", "loftq", "lora_ga")
HALVES = 2  # gate and up
MOST_EXPERTS = 1 << 20
PIECE = 1 << 19  # values that are summed at once, and nearly stay in a processor's cache for it

Pair = tuple[torch.Tensor, torch.Tensor]  # a and b


@dataclass(frozen=True)
class Factors:
    """scale · b·a is added to a parameter of the model. a: [experts ·] rank × columns; b: rows × rank [· experts].

    They are read when they are needed. experts is 0 for a matrix that is no experts'; gated: its rows are gate's and
    then up's.
    """

    key: str
    a: Place
    b: Place
    scale: float
    experts: int = 0
    gated: bool = False

    def read(self) -> Pair:
        """a: [experts or 1, rank, columns] and b: [experts or 1, rows, rank], in float32."""
        count = self.experts or 1
        a, b = read_values(self.a).float(), read_values(self.b).float()
        # An expert's columns of b lie apart: rank is the outer of the two (PEFT's ParamWrapper).
        return a.view(count, -1, a.shape[1]), b.view(len(b), -1, count).permute(2, 0, 1).contiguous()


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

    def pieces(self, shape: Sequence[int], read: Callable[[Factors], Pair] = Factors.read) -> Iterator[Piece]:
        """What is added: some rows after the other, of expert after expert where the tensor has them all.

        `read` may remember: experts that each have a tensor share their factors. UsageError when shapes do not fit.
        """
        a, b = read(self.factors)
        if self.half is not None:
            b = b.chunk(HALVES, dim=1)[self.half]
        wanted, all_experts = [b.shape[1], a.shape[2]], bool(self.factors.experts) and self.expert is None
        if list(shape) != ([len(a), *wanted] if all_experts else wanted):
            raise UsageError(
                f"{self.factors.key} is for a tensor of {wanted}; the base has {list(shape)[-2:]}",
                where=str(self.factors.a.file),
                remedy="merge into the base that it was trained on",
            )
        begin = 0
        for expert in range(len(a)) if all_experts else [self.expert or 0]:
            for rows in b[expert].split(max(1, PIECE // a.shape[2])):
                yield Piece(self.factors, rows, a[expert], begin)
                begin += len(rows) * a.shape[2]


@dataclass(frozen=True)
class Piece:
    """Some rows of what is added, after `begin` values of the tensor."""

    factors: Factors
    b: torch.Tensor
    a: torch.Tensor
    begin: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def added_to(self, part: torch.Tensor) -> torch.Tensor:
        """The sum, taken in float32 and rounded once. UsageError when it is not finite."""
        total = (self.b @ self.a).mul_(self.factors.scale).add_(part).to(part.dtype)
        # A finite sum, which costs a quarter of looking at each value, has no other values in it.
        if not total.sum(dtype=torch.float32).isfinite() and not total.isfinite().all():
            raise UsageError(f"{self.factors.key} makes values that are not finite", where=str(self.factors.a.file))
        return total


def targets(base: Path, adapter: Path) -> dict[str, Target]:
    """Each tensor that the adapter changes, by its name in the base folder's files.

    UsageError for adapters of other forms than LoRA's plain one, and for what is no adapter of this base.
    """
    config = LoraConfig.from_pretrained(str(adapter))
    for name in OTHER_FORMS:
        if getattr(config, name, None):
            raise UsageError(f"adapters with {name} cannot be merged", where=str(adapter / "adapter_config.json"))
    began = str(config.init_lora_weights).lower()
    if began.startswith(OTHER_BEGINNINGS):
        raise UsageError(f"adapters begun as {began} cannot be merged", where=str(adapter / "adapter_config.json"))
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
    tensors = {place.name: place for place in places_in(file)}
    keys = sorted(name.removesuffix(A) for name in tensors if name.endswith(A))
    if others := sorted(tensors.keys() - {key + end for key in keys for end in (A, B)}):
        raise UsageError(
            f"holds {others[0]}, which is no part of a plain LoRA and would be lost",
            where=str(file),
            remedy="merge it with PEFT (merge_and_unload), and give the merged folder: --from FOLDER",
        )
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
        a, b = tensors[key + A], tensors.get(key + B)
        rank, rest = divmod(a.shape[0] if len(a.shape) == 2 else 0, max(1, experts))
        if not rank or rest or b is None or len(b.shape) != 2 or b.shape[1] != a.shape[0]:
            raise UsageError(f"{key} has no two matrices that fit each other", where=str(file))
        pattern = get_pattern_key(config.alpha_pattern.keys(), name.removesuffix(".weight"))
        alpha = config.alpha_pattern.get(pattern, config.lora_alpha)
        scale = alpha / (rank**0.5 if config.use_rslora else rank)
        found[name] = Factors(key, a, b, scale, experts, gated)
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
