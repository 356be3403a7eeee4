"""Configuration of the `export` workload: what is made of a fine-tuned model, who loads it, and what must hold."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from radeon_stack.contracts.sections import MayMerge, Section

Quantization = Literal["bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]
Loader = Literal["transformers", "llama.cpp", "vllm"]
Text = Annotated[str, Field(min_length=1, max_length=1 << 14)]


class Gguf(Section):
    """The files for llama.cpp. The first is converted, the others are quantised from it."""

    quantizations: Annotated[tuple[Quantization, ...], Field(strict=False, min_length=1, max_length=8)] = (
        "bf16",
        "q8_0",
        "q4_k_m",
    )


class Questions(Section):
    """What every loader is asked."""

    count: int = Field(5, ge=0, le=1024, description="sampled answers to the taught question")
    max_new_tokens: int = Field(48, ge=1, le=1 << 14)
    temperature: float = Field(0.7, ge=0.0, le=10.0)
    top_p: float = Field(0.9, gt=0.0, le=1.0)
    seed: int = Field(42, ge=0, lt=1 << 31)
    prompt: Text | None = Field(None, description="None: the question that the run was taught")
    expected: str | None = Field(None, description="what a right answer contains; None: what the run was taught")
    greedy: Annotated[tuple[Text, ...], Field(strict=False, max_length=16)] = Field(
        (
            "Name the planets of the solar system.",
            "What is a neural network? Answer in two sentences.",
            "Write a haiku about mountains.",
        ),
        description="asked besides, greedily: these conversations stand side by side",
    )
    greedy_tokens: int = Field(64, ge=1, le=4096, description="of a greedy answer, compared token by token")
    text: Annotated[str, Field(min_length=100, max_length=20_000)] | None = Field(
        None, description="perplexity is measured on it; None: a text that travels with us"
    )


class Limits(Section):
    """What must hold beside transformers, of each loader. A quantisation has limits of its own; None: not asked."""

    right_min: float | None = Field(1.0, ge=0, le=1, description="share of right answers to the taught question")
    agreement_min: float | None = Field(
        None, ge=0, le=1, description="share of greedy tokens before the first one that differs"
    )
    first_token_max: float | None = Field(
        None, gt=0, description="mean difference in log probability of the first token's ten likeliest"
    )
    perplexity_ratio_max: float | None = Field(None, gt=0, description="perplexity over transformers'")


class ExportConfig(MayMerge):
    """Everything the `export` workload can be told."""

    gguf: Gguf = Gguf()
    loaders: Annotated[tuple[Loader, ...], Field(strict=False, min_length=1)] | Literal["auto"] = Field(
        "auto", description="'auto': those that are installed where it runs; a list: all of them, or it fails"
    )
    questions: Questions = Questions()
    limits: Limits = Limits()
    limits_of: dict[Quantization | Loader, Limits] = Field(
        {}, max_length=16, description="by loader or quantisation, in place of limits: limits_of.q4_k_m"
    )
    threads: int = Field(0, ge=0, le=1024, description="on the CPU; 0: as many as there are cores")
