"""Every tensor of a converted file against the safetensors it was made of: names, shapes and values.

Names are ggml's own map's. What the converter changes on the way is done by the lines below too: of LLaMA's it turns
query and key rows about (its rotary embedding pairs neighbours, where transformers' pairs halves), of a mixture of
experts it lays each layer's experts in one tensor.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

from radeon_stack.errors import CheckError
from radeon_stack.safetensor_files import places
from radeon_stack.workloads.export.gguf_files import architecture, require_whole_gguf
from radeon_stack.workloads.finetune.streams import read_values

# Architectures whose way through the converter is known here, by ggml's names.
KNOWN = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe")
TURNED = ("llama",)  # query and key
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
FUSED = ("gate_up_proj", "down_proj")
# Root mean square of the error over that of the values, at most: some twice what normally distributed weights give.
LOOSE = {"F16": 1e-3, "Q8_0": 0.012, "Q6_K": 0.035, "Q5_K": 0.07, "Q5_0": 0.1, "Q5_1": 0.1, "Q4_K": 0.14}
LOOSE |= {"Q4_0": 0.2, "Q4_1": 0.2}
EXACT = {"F32": torch.float32, "BF16": torch.bfloat16}  # a weight in float32 may have been one in bf16
ROWS = 4096  # compared at a time


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint went: part `expert` of a tensor of the file, or all of it."""

    name: str
    expert: int | None = None


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """`{"file", "folder"}` → `{"compared", "exact", "worst", …}`. CheckError names the first tensor that is wrong.

    An architecture that is not known here is not compared, and that is told.
    """
    file, folder = Path(request["file"]), Path(request["folder"])
    reader = require_whole_gguf(file)
    kind = architecture(reader)
    if kind not in KNOWN:
        return {"compared": 0, "why_not": f"what the converter does to {kind} is not known here"}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    there = {tensor.name: tensor for tensor in reader.tensors}
    counts: Counter[str] = Counter()
    worst: dict[str, tuple[float, str]] = {}
    used = set()
    for name, weight in checkpoint(folder):
        place = placed(name, kind, int(config["num_hidden_layers"]))
        tensor = there.get(place.name)
        if tensor is None:
            raise CheckError(f"{name} is not in it ({place.name})", where=str(file))
        used.add(place.name)
        wanted = turned(weight, name, config) if kind in TURNED else weight
        error = difference(file, tensor, place.expert, wanted)
        bound = 0.0 if tensor.tensor_type.name in EXACT else LOOSE.get(tensor.tensor_type.name)
        if bound is None:
            raise CheckError(f"{tensor.name} is {tensor.tensor_type.name}, which has no bound here", where=str(file))
        if not error <= bound:
            what = f"{tensor.name} is not {name}: off by {error:.2g} of its size, {bound:g} at most is expected"
            raise CheckError(what, where=str(file))
        counts[tensor.tensor_type.name] += 1
        worst[tensor.tensor_type.name] = max(worst.get(tensor.tensor_type.name, (0.0, "")), (error, tensor.name))
    if extra := sorted(set(there) - used - {"rope_freqs.weight"}):  # made of the configuration
        raise CheckError(f"{extra[0]} is of no tensor of the checkpoint", where=str(file))
    errors = {kind: {"error": error, "tensor": name} for kind, (error, name) in worst.items() if error}
    return {"compared": sum(counts.values()), "types": dict(counts), "worst": errors}


def checkpoint(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor by its name; fused experts one by one, as a checkpoint of single ones has them."""
    for name, place in sorted(places(folder).items()):
        weight = read_values(place)
        end = name.removesuffix(".weight").rpartition(".")[2]
        if ".experts." in name and end in FUSED and weight.ndim == 3:
            stem = name.removesuffix(".weight").removesuffix(end)
            for expert, matrix in enumerate(weight):
                halves = matrix.chunk(2)
                gated = {"gate_proj": halves[0], "up_proj": halves[1]}
                for part, rows in (gated if end == FUSED[0] else {end: matrix}).items():
                    yield f"{stem}{expert}.{part}.weight", rows
        else:
            yield name, weight


def placed(name: str, kind: str, layers: int) -> Place:
    """Where the file has a tensor of the checkpoint. CheckError for one that ggml's map does not have."""
    expert = EXPERT.fullmatch(name)
    asked = f"{expert[1]}.{expert[3]}" if expert else name
    found = _names(kind, layers).get_name(asked, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise CheckError(f"{name} has no name in GGUF for {kind}", where="model.safetensors")
    return Place(found, int(expert[2]) if expert else None)


@lru_cache
def _names(kind: str, layers: int) -> Any:
    arch = next(arch for arch, word in gguf.MODEL_ARCH_NAMES.items() if word == kind)
    return gguf.get_tensor_name_map(arch, layers)


def turned(weight: torch.Tensor, name: str, config: Mapping[str, Any]) -> torch.Tensor:
    """Rows of a query or key projection as ggml has them: of each head, its halves' in turn. [out, in] or [out]."""
    end = name.rpartition(".")[0].rpartition(".")[2]
    if end not in ("q_proj", "k_proj"):
        return weight
    heads = int(config["num_attention_heads"])
    heads = heads if end == "q_proj" else int(config.get("num_key_value_heads") or heads)
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def difference(file: Path, tensor: Any, expert: int | None, wanted: torch.Tensor) -> float:
    """Root mean square of the error over that of the values; inf where shapes differ. Exact types: 0.0 or inf."""
    shape = [int(size) for size in reversed(tensor.shape)]
    if (shape if expert is None else shape[1:]) != list(wanted.shape):
        return float("inf")
    kind = tensor.tensor_type
    rows = wanted.reshape(-1, wanted.shape[-1])
    row_bytes = tensor.n_bytes // (rows.shape[0] * (1 if expert is None else shape[0]))
    error, size = 0.0, 0.0
    with file.open("rb") as stream:  # read, not mapped: pages once touched would count as memory in use
        stream.seek(int(tensor.data_offset) + (expert or 0) * rows.shape[0] * row_bytes)
        for mine in rows.split(ROWS):
            data = bytearray(stream.read(len(mine) * row_bytes))
            if kind.name in EXACT:
                found = torch.frombuffer(data, dtype=EXACT[kind.name]).view_as(mine)
                if not torch.equal(found, mine.to(found.dtype)):
                    return float("inf")
                continue
            blocks = np.frombuffer(data, np.float16 if kind.name == "F16" else np.uint8).reshape(len(mine), -1)
            found, mine = torch.from_numpy(dequantize(blocks, kind)).float(), mine.float()
            error += float(torch.linalg.vector_norm(found - mine)) ** 2
            size += float(torch.linalg.vector_norm(mine)) ** 2
    return (error / size) ** 0.5 if size else error
