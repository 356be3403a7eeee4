"""Configuration of the `bench` workload. The default is the seed's attention benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import Field, model_validator

from radeon_stack.contracts.sections import Section

T = TypeVar("T")
MAX_CASES = 4096
Several = Annotated[tuple[T, ...], Field(strict=False, min_length=1, max_length=64)]
Positive = Annotated[int, Field(ge=1, le=1 << 24)]
Dtype = Literal["fp16", "bf16", "fp32"]


class Grid(Protocol):
    """Sizes of a suite's cases."""

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Each case's values, once."""


class AttentionGrid(Section):
    """Every combination is a case; those whose heads cannot be shared out are left out."""

    dtypes: Several[Dtype] = ("fp16", "bf16")
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


class FfnGrid(Section):
    """Experts of a mixture-of-experts layer. The default is the seed's grid; it names neither the inner size nor how
    many experts a token has: they are DeepSeek-V2-Lite's, a model of that width and number of experts, and Qwen3's.
    """

    dtypes: Several[Dtype] = ("fp16", "bf16")
    batch: Several[Positive] = (1, 4)
    seq: Several[Positive] = Field((128, 512), description="tokens of a sequence")
    hidden: Several[Positive] = (2048,)
    intermediate: Several[Positive] = Field((1408,), description="inner size of one expert")
    experts: Several[Annotated[int, Field(ge=1, le=1024)]] = (64,)
    top_k: Several[Annotated[int, Field(ge=1, le=64)]] = Field((8,), description="experts of a token")
    routing: Several[Literal["even", "skewed", "single"]] = Field(
        ("even",), description="random, by Zipf's law, or all to one expert"
    )

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Each case's values, once; those with more choices than experts are left out."""
        names = ("batch", "seq", "hidden", "intermediate", "experts", "top_k", "routing")
        return (case for case in products(self, ("dtypes", *names)) if case["top_k"] <= case["experts"])


class GatingGrid(Section):
    """A mixture-of-experts layer's router. The default is the seed's grid."""

    dtypes: Several[Dtype] = ("fp16", "bf16")
    batch: Several[Positive] = (1, 4)
    seq: Several[Positive] = Field((128, 512), description="tokens of a sequence")
    hidden: Several[Positive] = (2048,)
    experts: Several[Annotated[int, Field(ge=1, le=1024)]] = (64,)
    top_k: Several[Annotated[int, Field(ge=1, le=64)]] = (8,)
    part: Several[Literal["router", "bare"]] = Field(
        ("router", "bare"), description="with its linear layer, or what follows that"
    )
    layers: Several[Annotated[int, Field(ge=1, le=256)]] = Field(
        (1,), description="routers before the way back through all: a model has one a layer"
    )

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Each case's values, once; those with more choices than experts are left out."""
        names = ("batch", "seq", "hidden", "experts", "top_k", "part", "layers")
        return (case for case in products(self, ("dtypes", *names)) if case["top_k"] <= case["experts"])


class LinearGrid(Section):
    """An NF4 linear layer with a LoRA adapter; `shapes` are [out, in]."""

    dtypes: Several[Dtype] = ("bf16",)
    tokens: Several[Positive] = (16, 64, 128, 256, 512, 1024)
    shapes: Several[Annotated[tuple[Positive, Positive], Field(strict=False)]] = Field(
        ((4096, 4096), (4096, 14336), (14336, 4096)), description="[out, in] of the weight"
    )
    rank: Several[Annotated[int, Field(ge=1, le=256)]] = (64,)

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Each case's values, once."""
        for case in products(self, ("dtypes", "tokens", "shapes", "rank")):
            out, wide = case.pop("shapes")
            yield {**case, "out": out, "in": wide}


def products(grid: Section, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Every combination of the fields' values, once; `dtypes` gives a `dtype`."""
    combinations = product(*(getattr(grid, name) for name in names))
    for values in dict.fromkeys(combinations):
        yield dict(zip(("dtype" if name == "dtypes" else name for name in names), values, strict=True))


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

    suites: Several[Literal["attention", "gating", "ffn", "linear"]] = ("attention",)
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="'cuda' is torch's name for a Radeon too")
    implementations: Several[Annotated[str, Field(min_length=1, max_length=64)]] | Literal["all"] = "all"
    seed: int = Field(0, ge=0, lt=1 << 31, description="inputs are drawn from it, anew for each case")
    timeout: float = Field(
        300.0, gt=0.0, le=86400.0, description="seconds for one case of one implementation, compiling included"
    )
    timing: Timing = Timing()
    attention: AttentionGrid = AttentionGrid()
    gating: GatingGrid = GatingGrid()
    ffn: FfnGrid = FfnGrid()
    linear: LinearGrid = LinearGrid()

    @model_validator(mode="after")
    def _bounded(self) -> BenchConfig:
        for suite in self.suites:
            grid: Grid = getattr(self, suite)
            if sum(1 for _ in islice(grid.combinations(), MAX_CASES + 1)) > MAX_CASES:
                raise ValueError(f"at most {MAX_CASES} cases; the grid of {suite} has more")
        return self
