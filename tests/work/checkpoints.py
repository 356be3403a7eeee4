"""Checkpoints in FP8 as others write them, made of a folder in 16 bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

IGNORED = "model.layers.1.mlp.down_proj"  # left in 16 bit by both, as checkpoints leave single layers


def fp8_dynamic(folder: Path, into: Path) -> Path:
    """As llm-compressor writes FP8_DYNAMIC: scales by channel, in the weights' own dtype, activations at run time."""
    import torch

    from radeon_stack.kernels.fp8 import quantize

    def convert(matrix: Any) -> dict[str, Any]:
        weight = quantize(matrix)
        return {"weight": weight.codes, "weight_scale": weight.scale.to(torch.bfloat16)}

    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", IGNORED],
    }
    return converted(folder, into, config, convert)


def block_fp8(folder: Path, into: Path) -> Path:
    """As DeepSeek's and Qwen's FP8 checkpoints are: scales by blocks of 128 × 128."""
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", IGNORED],
    }
    return converted(folder, into, config, by_block)


def by_block(matrix: Any) -> dict[str, Any]:
    import torch

    rows, columns = matrix.shape
    scale = torch.empty(-(-rows // 128), -(-columns // 128))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            here = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            block = matrix[here].float()
            scale[i, j] = block.abs().max() / 448
            codes[here] = (block / scale[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}


def converted(folder: Path, into: Path, config: dict[str, Any], convert: Any) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, into)
    tensors: dict[str, Any] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if not name.endswith("_proj.weight") or layer == IGNORED:
            tensors[name] = tensor
        else:
            tensors |= {f"{layer}.{part}": value for part, value in convert(tensor).items()}
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    file = into / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    return into
