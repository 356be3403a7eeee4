"""Tiny models of transformers' kinds, most of them mixtures of experts, in folders as a hub would have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 64,
}
EXPERT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 64, "num_experts": 5, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}),
}

DENSE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {"llama": ("Llama", {}), "qwen3": ("Qwen3", {})}


def folder_of(kind: str, folder: Path, **more: Any) -> Path:
    """A model with random weights, in bf16, saved as its kind is published: Qwen's and Mixtral's experts one by one."""
    import torch
    import transformers

    name, own = (EXPERT_MODELS | DENSE_MODELS)[kind]
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **own, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder
