"""Model folders of real shapes that hold no weights: config.json and the header of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Tensors = dict[str, tuple[int, ...]]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama_8b(layers: int = 32) -> tuple[dict[str, Any], Tensors]:
    """Llama-3.1-8B: its config.json and its tensors."""
    h, f, kv, words = 4096, 14336, 1024, 128256
    tensors: Tensors = {
        "model.embed_tokens.weight": (words, h),
        "lm_head.weight": (words, h),
        "model.norm.weight": (h,),
    }
    for n in range(layers):
        tensors |= {f"model.layers.{n}.{norm}.weight": (h,) for norm in ("input_layernorm", "post_attention_layernorm")}
        tensors |= _attention(n, h, h, kv)
        tensors |= {f"model.layers.{n}.mlp.{name}.weight": (f, h) for name in ("gate_proj", "up_proj")}
        tensors[f"model.layers.{n}.mlp.down_proj.weight"] = (h, f)
    config = {"hidden_size": h, "intermediate_size": f, "num_attention_heads": 32, "num_key_value_heads": 8}
    return config | {"num_hidden_layers": layers, "vocab_size": words, "tie_word_embeddings": False}, tensors


def qwen3_30b_a3b(layers: int = 48) -> tuple[dict[str, Any], Tensors]:
    """Qwen3-30B-A3B, its experts one by one as in its files."""
    h, f, words, experts = 2048, 768, 151936, 128
    tensors: Tensors = {
        "model.embed_tokens.weight": (words, h),
        "lm_head.weight": (words, h),
        "model.norm.weight": (h,),
    }
    for n in range(layers):
        prefix = f"model.layers.{n}."
        tensors |= {f"{prefix}{norm}.weight": (h,) for norm in ("input_layernorm", "post_attention_layernorm")}
        tensors |= {f"{prefix}self_attn.{norm}.weight": (128,) for norm in ("q_norm", "k_norm")}
        tensors |= _attention(n, h, 4096, 512) | {f"{prefix}mlp.gate.weight": (experts, h)}
        for expert in range(experts):
            place = f"{prefix}mlp.experts.{expert}."
            tensors |= {f"{place}gate_proj.weight": (f, h), f"{place}up_proj.weight": (f, h)}
            tensors[f"{place}down_proj.weight"] = (h, f)
    config = {"hidden_size": h, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4}
    config |= {"head_dim": 128, "moe_intermediate_size": f, "num_experts_per_tok": 8, "num_experts": experts}
    return config | {"num_hidden_layers": layers, "vocab_size": words, "tie_word_embeddings": False}, tensors


def folder_of(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Path:
    """A folder that a launch plan takes for a model's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    entries = {name: {"dtype": "BF16", "shape": sizes, "data_offsets": (0, 0)} for name, sizes in tensors.items()}
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def _attention(layer: int, hidden: int, queries: int, keys: int) -> Tensors:
    place = f"model.layers.{layer}.self_attn."
    sizes = ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries))
    return {f"{place}{name}.weight": size for name, size in zip(ATTENTION, sizes, strict=True)}
