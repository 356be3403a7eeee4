"""Configuration of the `bench` workload. The default is the seed's attention benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from radeon_stack.contracts.sections import Section

T = TypeVar("T")
MAX_CASES = 4096
Several = Annotated[tuple[T, ...], Field(strict=False, min_length=1, max_length=64)]
Positive = Annotated[int, Field(ge=1, le=1 << 24)]


class AttentionGrid(Section):
    """Every combination is a case; those whose heads cannot be shared out are left out."""

    dtypes: Several[Literal["fp16", "bf16", "fp32"]] = ("fp16", "bf16")
    batch: Several[Positive] = (1, 4)
    seq: Several[Positive] = Field((128, 2048), description="tokens of a sequence")
    heads: Several[Positive] = (32,)
    kv_heads: Several[Annotated[int, Field(ge=0, le=1 << 16)]] = Field(
        (0,), description="heads of keys and values; 0: as many as heads"
    )
    head_dim: Several[Positive] = (128,)
    causal: Several[bool] = (False,)
    varlen: Several[bool] = Field((False,), description="true: documents of uneven length packed in batch × seq tokens")

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Each case's values, once; `kv_heads` is never 0."""
        seen = set()
        names = ("dtypes", "batch", "seq", "heads", "kv_heads", "head_dim", "causal", "varlen")
        for values in product(*(getattr(self, name) for name in names)):
            case = dict(zip(("dtype", *names[1:]), values, strict=True))
            case["kv_heads"] = case["kv_heads"] or case["heads"]
            if case["heads"] % case["kv_heads"] == 0 and tuple(case.values()) not in seen:
                seen.add(tuple(case.values()))
                yield case


class Timing(Section):
    """How long each implementation is timed, and how."""

    seconds: float = Field(0.5, gt=0.0, le=600.0, description="of its own time, in each phase")
    least: int = Field(5, ge=2, le=10_000, description="rounds at least, though `seconds` is over")
    most: int = Field(100, ge=2, le=100_000, description="rounds at most")
    warmup: int = Field(3, ge=0, le=1000, description="calls before the first round")
    warmup_seconds: float = Field(0.1, ge=0.0, le=60.0, description="… and time: clocks rise only under load")
    flush: bool = Field(True, description="write over the caches before each timed call")
    graph: bool = Field(False, description="time replays of a captured graph where one can be captured")

    @model_validator(mode="after")
    def _ordered(self) -> Timing:
        if self.least > self.most:
            raise ValueError("least not above most")
        return self


class BenchConfig(Section):
    """Everything the `bench` workload can be told."""

    suites: Several[Literal["attention"]] = ("attention",)
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="'cuda' is torch's name for a Radeon too")
    implementations: Several[Annotated[str, Field(min_length=1, max_length=64)]] | Literal["all"] = "all"
    seed: int = Field(0, ge=0, lt=1 << 31, description="inputs are drawn from it, anew for each case")
    timeout: float = Field(
        300.0, gt=0.0, le=86400.0, description="seconds for one case of one implementation, compiling included"
    )
    timing: Timing = Timing()
    attention: AttentionGrid = AttentionGrid()

    @model_validator(mode="after")
    def _bounded(self) -> BenchConfig:
        if (cases := sum(1 for _ in self.attention.combinations())) > MAX_CASES:
            raise ValueError(f"at most {MAX_CASES} cases; the grid has {cases}")
        return self
