"""The LoRA adapter: its configuration, its statistics, and the check that it matched what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from radeon_stack.contracts.finetune import Lora, Speed
from radeon_stack.errors import UsageError
from radeon_stack.kernels.adapters import use_nf4_linear

Statistics = dict[str, dict[str, Any]]


def lora_config(lora: Lora, model: torch.nn.Module, speed: Speed) -> LoraConfig:
    """PEFT's configuration, and which layers are ours. UsageError for a target that names no layer of the model."""
    targets: Any = lora.target_modules
    if not isinstance(targets, str):
        ends = {name.rpartition(".")[2] for name, module in model.named_modules() if _linear(module)}
        unmatched = [target for target in targets if target.rpartition(".")[2] not in ends]
        if unmatched:
            raise UsageError(
                f"'{unmatched[0]}' matches no layer of the model; its linear layers: {', '.join(sorted(ends))}",
                where="config.lora.target_modules",
            )
        targets = list(targets)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    return use_nf4_linear(config) if speed.nf4_linear else config


def load_into(model: Any, folder: Path) -> None:
    """A saved adapter's weights in place of the model's own, in the dtype that these have.

    PEFT (0.21) would make them float32, and TRL trains those of a quantised model in bf16: a resumed run would round
    otherwise than an uninterrupted one, and take twice the memory for adapter, gradients and their copies.
    """
    model.load_adapter(str(folder), adapter_name="default", is_trainable=True, autocast_adapter_dtype=False)


def linear_names(model: Any) -> set[str]:
    """What 'all-linear' is: the last names of all linear layers but the output head's, and those inside experts."""
    head = model.get_output_embeddings()
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if _linear(module) and module is not head and ".experts." not in name
    }


def experts_alpha(lora: Lora) -> float:
    """alpha of the experts' adapters: their update is scaled as the others' is."""
    return lora.alpha / lora.rank * lora.experts_rank


def lora_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by their name in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def statistics(model: torch.nn.Module) -> Statistics:
    """Of A and B of each adapted layer in the first decoder layer: shape, mean, std, extremes and quartiles."""
    layers = lora_layers(model)
    first = next(iter(layers), "").partition(".0.")[0] + ".0."
    return {
        name: {"A": _describe(layer.lora_A["default"].weight), "B": _describe(layer.lora_B["default"].weight)}
        for name, layer in layers.items()
        if name.startswith(first)
    }


def _describe(weight: torch.Tensor) -> dict[str, Any]:
    values = weight.detach().float().cpu()
    quarters = values.flatten().sort().values[[values.numel() * k // 4 for k in (1, 2, 3)]]
    return {
        "shape": list(weight.shape),
        "mean": values.mean().item(),
        "std": values.std().item(),
        "min": values.min().item(),
        "q25": quarters[0].item(),
        "median": quarters[1].item(),
        "q75": quarters[2].item(),
        "max": values.max().item(),
    }


def _linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)
