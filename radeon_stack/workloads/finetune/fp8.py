"""A base in 8-bit floats, from each of three sources: compressed-tensors FP8, block-wise FP8, or a 16-bit checkpoint.

The first two are read as they are: no other package of theirs, and no 16-bit model on the way.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from radeon_stack import atomic
from radeon_stack.contracts.finetune import Quantization
from radeon_stack.errors import MachineError, UsageError
from radeon_stack.kernels import fp8_quantizer
from radeon_stack.kernels.fp8 import BLOCK, Fp8Linear, Fp8Weight, dequantize
from radeon_stack.kernels.sizes import cdiv
from radeon_stack.safetensor_files import BITS, Place, header, places
from radeon_stack.text import printable
from radeon_stack.workloads.capabilities.asking import answers
from radeon_stack.workloads.capabilities.questions import chosen
from radeon_stack.workloads.finetune.merging import REST
from radeon_stack.workloads.finetune.streams import FLOATS, as_bytes
from radeon_stack.workloads.job import Job

# quant_method in config.json: llm-compressor's checkpoints, and DeepSeek's and Qwen's block-wise ones.
METHODS = ("compressed-tensors", "fp8")
SCALES = (".weight_scale", ".weight_scale_inv")  # beside a layer's .weight
UNUSED = ".input_scale"  # of static activation scales: activations stay in 16 bit here
CODES = "F8_E4M3"  # safetensors' name for float8_e4m3fn
INDEX = "model.safetensors.index.json"
SHARD = 4 << 30  # bytes of a written file
SCALED_MM = "scaled_mm.row"  # the probe's question
NAME = 200  # characters of a tensor's name that are told


@dataclass(frozen=True)
class Checkpoint:
    """What of a folder is in FP8: layer → (the name of its scales' tensor, their shape), and each tensor's place."""

    layers: dict[str, tuple[str, tuple[int, int]]]
    places: dict[str, Place]


def arguments(folder: Path, quantization: Quantization) -> dict[str, Any]:
    """What `from_pretrained` is given to load `folder` for `quantization`; {} where this is no matter of FP8.

    UsageError for a checkpoint that is quantised and was not asked for as such, or in another way; MachineError where
    products are asked for that this card gets wrong.
    """
    method = quantized_by(folder)
    if quantization.kind != "fp8":
        if method in METHODS:
            raise UsageError(
                f"{folder.name} is in FP8 already ({method})",
                where="config.quantization.kind",
                remedy="train it as it is: radeon-stack run train-llama-fp8, or --set quantization.kind=fp8",
            )
        return {}
    if quantization.products == "scaled_mm":
        require_scaled_mm()
    fp8_quantizer.register()
    if method is None:
        return {"quantization_config": fp8_quantizer.Fp8Config(way=quantization.products)}
    found = read(folder)
    layers = {layer: shape for layer, (_, shape) in found.layers.items()}
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = fp8_quantizer.Fp8Config(layers, quantization.products).to_dict()
    return {"config": config}


def require_scaled_mm() -> None:
    """MachineError unless the probe's own question finds `torch._scaled_mm` right, in a process that may crash."""
    found = next(answers(chosen(SCALED_MM), seconds=120, seed=0))
    if found.verdict != "works":
        raise MachineError(
            f"torch._scaled_mm: {found.verdict}" + f" ({printable(found.detail)})" * bool(found.detail),
            where="config.quantization.products",
            remedy="leave it at 'auto'",
        )


def quantized_by(folder: Path) -> str | None:
    """`quant_method` of a folder's config.json; None for a checkpoint in 16 bit."""
    found = _config(folder).get("quantization_config")
    return printable(str(found.get("quant_method")))[:NAME] if isinstance(found, dict) else None


def read(folder: Path) -> Checkpoint:
    """The layers in FP8, by the tensors themselves. UsageError for what is no FP8 checkpoint, or none that is known."""
    method = quantized_by(folder)
    if method not in METHODS:
        raise UsageError(
            f"{folder.name} is quantised by {method}, not in FP8",
            where="config.quantization.kind",
            remedy=f"a checkpoint in 16 bit, or in FP8 ({', '.join(METHODS)})",
        )
    _refuse_other_blocks(_config(folder)["quantization_config"])
    found = places(folder)
    layers = {}
    for name, place in found.items():
        if place.dtype != CODES:
            continue
        layer = name.removesuffix(".weight")
        scales = next((layer + end for end in SCALES if layer + end in found), None)
        if layer == name or scales is None:
            raise _unknown(f"{name[:NAME]} is in FP8 and has no scales beside it")
        layers[layer] = scales, _scale_shape(scales, found[scales].shape, place.shape)
    if not layers:
        raise _unknown(f"{folder.name} says that it is in FP8 ({method}), and no tensor of it is")
    return Checkpoint(layers, found)


def _scale_shape(name: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = weight if len(weight) == 2 else (0, 0)
    if shape in ((rows, 1), (cdiv(rows, BLOCK), cdiv(columns, BLOCK))):
        return shape[0], shape[1]
    raise _unknown(f"{name[:NAME]}: scales {list(shape)} of a weight {list(weight)}")


def _refuse_other_blocks(config: dict[str, Any]) -> None:
    block = config.get("weight_block_size")
    if block not in (None, [BLOCK, BLOCK]):
        raise _unknown(f"scales by blocks of {printable(str(block))[:NAME]}")


def _unknown(what: str) -> UsageError:
    return UsageError(
        printable(what),
        where="config.model",
        remedy=f"known are scales by channel ([N, 1]) and by blocks of {BLOCK} × {BLOCK}; or train the 16-bit model",
    )


@contextmanager
def in_16_bit(job: Job, folder: Path, dtype: torch.dtype) -> Iterator[Path]:
    """The folder to merge into: itself, or in FP8 its values in `dtype`, written out for as long as they are needed."""
    if quantized_by(folder) not in METHODS:
        yield folder
        return
    whole = job.artifacts / f"base-16-bit{atomic.PARTIAL}"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir(parents=True)
    try:
        write_16_bit(job, folder, whole, dtype)
        yield whole
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def write_16_bit(job: Job, folder: Path, into: Path, dtype: torch.dtype) -> None:
    """A checkpoint in FP8 as one in 16 bit: weights decoded tensor by tensor, and what else lies beside them."""
    found = read(folder)
    dropped = {scales for scales, _ in found.layers.values()}
    names = [name for name in sorted(found.places) if name not in dropped and not name.endswith(UNUSED)]
    decoded: list[Place] = []
    total = 0
    for name in names:
        file = into / f"model-{total // SHARD + 1:05}.safetensors"
        decoded.append(_decoded_place(found.places[name], file, dtype))
        total += decoded[-1].bytes
    done = 0
    for file, tensors in groupby(decoded, key=attrgetter("file")):
        with file.open("wb") as stream:
            stream.write(header(shard := list(tensors)))
            for place in shard:
                stream.write(as_bytes(_decoded(found, place.name, dtype).contiguous()))
                done += 1
                job.progress("decode FP8", done, len(names), unit="tensors")
    for file in {file for pattern in REST for file in folder.glob(pattern)}:
        shutil.copyfile(file, into / file.name)
    index = {"metadata": {"total_size": total}, "weight_map": {place.name: place.file.name for place in decoded}}
    atomic.write_text(into / INDEX, json.dumps(index))
    config = {key: value for key, value in _config(folder).items() if key != "quantization_config"}
    atomic.write_text(into / "config.json", json.dumps(config))


def facts(model: torch.nn.Module) -> dict[str, Any]:
    """What of a model is in 8 bit: {} if nothing is."""
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    if not layers:
        return {}
    by_block = sum(layer.quantized.by_block for layer in layers)
    return {
        "parameters_8bit": sum(layer.weight.numel() for layer in layers),
        "layers_8bit": len(layers),
        "scales_8bit": sum(layer.weight_scale.numel() for layer in layers),
        "scaled_by": "block" if by_block == len(layers) else "block and channel" if by_block else "channel",
        "weights_8bit_bytes": sum(layer.quantized.nbytes for layer in layers),
    }


def _decoded(found: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    tensor = _tensor(found.places[name])
    layer = name.removesuffix(".weight")
    if name == layer or layer not in found.layers:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor
    scales = _tensor(found.places[found.layers[layer][0]]).float()
    return dequantize(Fp8Weight(tensor, scales), dtype)


def _decoded_place(place: Place, file: Path, dtype: torch.dtype) -> Place:
    """Where its values in `dtype` will be; those that are no floats stay as they are."""
    name = next(name for name, of_torch in FLOATS.items() if of_torch == dtype) if "F" in place.dtype else place.dtype
    return Place(file, place.name, name, place.shape, 0, math.prod(place.shape) * BITS[name] // 8)


def _tensor(place: Place) -> torch.Tensor:
    with safe_open(place.file, framework="pt") as tensors:
        return tensors.get_tensor(place.name)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found if isinstance(found, dict) else {}
