"""What a model folder says of the model's size: config.json and the headers of its safetensors. Needs no torch.

A folder may come from anywhere: every file is bounded, every number checked, and no tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from radeon_stack.errors import UsageError
from radeon_stack.launch.model_files import read_header, read_object, weight_files
from radeon_stack.text import one_line

MAX_CONFIG_BYTES = 4 << 20
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 50

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings)\.weight$")
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
_ROUTER = re.compile(r"\.(gate|router)\.weight$")
_EXPERT = re.compile(r"\.experts\.")
_FP8_SCALES = re.compile(r"\.(weight_scale|weight_scale_inv|input_scale)$")

Width = Annotated[int, Field(ge=1, le=1 << 32)]
Few = Annotated[int, Field(ge=1, le=100_000)]


class ModelConfig(BaseModel):
    """The part of config.json that activations depend on, in transformers' names."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    hidden_size: Width
    num_hidden_layers: Few
    num_attention_heads: Few
    num_key_value_heads: Few | None = None
    head_dim: Width | None = None
    intermediate_size: Width | None = None
    tie_word_embeddings: bool = False
    moe_intermediate_size: Width | None = None
    num_experts_per_tok: Few | None = None
    vocab_size: Width | None = None
    quantization_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Linear:
    """A linear layer: its name without `.weight`, and its sizes."""

    name: str
    outputs: int
    inputs: int

    @property
    def parameters(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder, in elements; `key_value` is the width of the keys, which is that of the values.

    `query` is that of the queries.

    `linears` are what a 4-bit loader quantises and LoRA adapts, the output head left out; `experts` the elements of
    fused or separate experts, `kept` those that stay in 16 bit (embeddings, head, norms, routers, biases). A head that
    is tied to the embeddings is counted once. `expert_width` and `experts_per_token` are 0 without experts, and
    `words` where nothing says how many the head knows.
    """

    hidden: int
    layers: int
    heads: int
    query: int
    key_value: int
    intermediate: int
    linears: tuple[Linear, ...]
    experts: int
    kept: int
    expert_width: int = 0
    experts_per_token: int = 0
    words: int = 0

    @property
    def quantizable(self) -> int:
        return sum(linear.parameters for linear in self.linears)

    @property
    def expert_count(self) -> int:
        """Of all layers together: three matrices each (gate, up, down), biases being few beside them."""
        return self.experts // (3 * self.hidden * self.expert_width) if self.experts else 0

    @property
    def parameters(self) -> int:
        return self.quantizable + self.experts + self.kept


def read_shape(folder: Path) -> ModelShape:
    """The shape of a model folder. UsageError, with the file, for what is none or makes no sense."""
    file = folder / "config.json"
    return shape_of(_config(read_object(file, MAX_CONFIG_BYTES), file), dict(_tensors(folder)), str(folder))


def shape_of(config: ModelConfig, tensors: Mapping[str, tuple[int, ...]], where: str) -> ModelShape:
    """The shape by the tensors' names and sizes. UsageError for weights that are stored quantised, but for FP8."""
    stored = config.quantization_config or {}
    # `float-quantized`: llm-compressor's word for FP8; its other formats pack several values into one.
    in_fp8 = stored.get("quant_method") == "fp8" or stored.get("format") == "float-quantized"
    if stored and not in_fp8:
        raise UsageError("its weights are stored quantised, of which nothing is estimated", where=where)
    linears, experts, kept = [], 0, 0
    for name, sizes in tensors.items():
        if in_fp8 and _FP8_SCALES.search(name):
            continue
        if _HEAD.search(name) and config.tie_word_embeddings:
            continue  # a copy of the embeddings, which the loader drops
        if _EXPERT.search(name):
            experts += prod(sizes)
        elif len(sizes) == 2 and not any(kind.search(name) for kind in (_EMBEDDING, _HEAD, _ROUTER)):
            linears.append(Linear(name.removesuffix(".weight"), *sizes))
        else:
            kept += prod(sizes)
    if not linears:
        raise UsageError("there is no linear layer among its tensors", where=where)
    heads = config.num_attention_heads
    head = config.head_dim or max(config.hidden_size // heads, 1)
    return ModelShape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        query=head * heads,
        key_value=head * (config.num_key_value_heads or heads),
        intermediate=config.intermediate_size or 4 * config.hidden_size,
        linears=tuple(linears),
        experts=experts,
        kept=kept,
        expert_width=(config.moe_intermediate_size or config.intermediate_size or 0) if experts else 0,
        experts_per_token=(config.num_experts_per_tok or 1) if experts else 0,
        words=config.vocab_size or 0,
    )


def _config(tree: dict[str, Any], file: Path) -> ModelConfig:
    inner = tree.get("text_config")  # of models that also see or hear
    try:
        return ModelConfig.model_validate({**tree, **inner} if isinstance(inner, dict) else tree)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{one_line('.'.join(map(str, first['loc'])))}: {first['msg']}"
        raise UsageError(what, where=str(file), remedy="is it the folder of a language model?") from None


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    count = 0
    for file in weight_files(folder):
        for name, entry in read_header(file).items():
            if name == "__metadata__":
                continue
            count += 1
            sizes = entry.get("shape") if isinstance(entry, dict) else None
            if count > MAX_TENSORS or not _plausible(sizes):
                raise UsageError(f"no plausible tensor: {one_line(name)}", where=str(file))
            yield name, tuple(sizes or ())


def _plausible(sizes: Any) -> bool:
    whole = isinstance(sizes, list) and len(sizes) <= MAX_DIMENSIONS
    return whole and all(type(size) is int and 0 <= size <= MAX_ELEMENTS for size in sizes) and _few(sizes)


def _few(sizes: list[int]) -> bool:
    return prod(sizes) <= MAX_ELEMENTS
