"""The arithmetic of scaling_model.py for two models, five networks and a few assumed cards: what the page has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.scaling_model import (
    BACKWARD,
    BUCKET,
    NODES,
    PAYS,
    Load,
    Network,
    Parallel,
    Step,
    pays,
    strong,
    weak,
)
from radeon_stack.launch.estimate import GATHERED, Training, estimate
from radeon_stack.launch.model_shape import ModelConfig, ModelShape, shape_of
from tests.shapes import llama_8b, qwen3_30b_a3b

H200 = Path(__file__).with_name("train_speed_llama_short.json")
PARALLEL: tuple[Parallel, ...] = ("data", "sharded")
GBITS = (1, 10, 25, 100, 200)
PASSES = 2  # of a step: the recipes' gradient_accumulation
MORE_PASSES = 16
ALL_PASSES = 64  # of strong scaling's step, which 64 nodes share out
DIGITS = 4


@dataclass(frozen=True)
class Card:
    """Seconds of a step of `PASSES` passes on one card, and where they come from."""

    step_seconds: float
    source: str

    @property
    def pass_seconds(self) -> float:
        return self.step_seconds / PASSES


ASSUMED = (Card(2.0, "assumed"), Card(10.0, "assumed"))


def shapes() -> dict[str, tuple[ModelShape, Training]]:
    """The models, with LoRA of rank 64 on all linear layers but experts."""
    llama = Training(batch=1, length=1024, rank=64)
    qwen = Training(batch=1, length=1024, rank=64, double=False, experts_quantized=True)
    made = (("Llama-3.1-8B", llama_8b(), llama), ("Qwen3-30B-A3B", qwen3_30b_a3b(), qwen))
    return {
        name: (shape_of(ModelConfig.model_validate(config), tensors, name), training)
        for name, (config, tensors), training in made
    }


def load_of(shape: ModelShape, training: Training) -> Load:
    """By the memory estimate: the adapters' gradients, and a layer as FSDP2 gathers it, packed."""
    shared = estimate(shape, replace(training, processes=2, shares=2)).parts
    alone = estimate(shape, training).parts
    return Load(alone["gradients"], shape.layers, shared["gathered"] // GATHERED)


def cards(model: str) -> tuple[Card, ...]:
    """Assumed ones; for Llama-3.1-8B one that was measured, which is no Radeon."""
    if model != "Llama-3.1-8B":
        return ASSUMED
    record = json.loads(H200.read_text(encoding="utf-8"))
    ours = next(one for one in record["measured"] if one["implementation"] == "ours")
    seconds = ours["step_seconds"] * PASSES / ours["settings"]["accumulation"]
    source = f"{record['card']['name']}, 5 × 60 tokens a pass: benchmarks/{H200.name}"
    return (Card(round(seconds, 3), source), *ASSUMED)


def record() -> dict[str, Any]:
    """All of it, as JSON holds it."""
    models = {name: load_of(*of) for name, of in shapes().items()}
    return {
        "assumptions": {
            "networks": [asdict(Network(gbit)) for gbit in GBITS],
            "backward": round(BACKWARD, DIGITS),
            "bucket_bytes": BUCKET,
            "pays": PAYS,
            "passes": [PASSES, MORE_PASSES],
            "all_passes": ALL_PASSES,
            "nodes": list(NODES),
        },
        "models": {name: asdict(load) for name, load in models.items()},
        "cases": [row for name, load in models.items() for row in rows(name, load)],
    }


def rows(model: str, load: Load) -> Iterator[dict[str, Any]]:
    """Weak scaling for both numbers of passes, then strong, for each card, way and network."""
    for card in cards(model):
        for parallel in PARALLEL:
            for network in map(Network, GBITS):
                told = {"model": model, "parallel": parallel, "gbit": network.gbit, **asdict(card)}
                for passes in (PASSES, MORE_PASSES):
                    share = weak(load, parallel, Step(passes, card.pass_seconds), network)
                    yield told | {"scaling": "weak", "passes": passes, "values": _kept(share), "pays": pays(share)}
                times = strong(load, parallel, Step(ALL_PASSES, card.pass_seconds), network)
                each = {nodes: found / nodes for nodes, found in times.items()}
                yield told | {"scaling": "strong", "passes": ALL_PASSES, "values": _kept(times), "pays": pays(each)}


def _kept(values: Mapping[int, float]) -> dict[str, float]:
    return {str(nodes): round(value, DIGITS) for nodes, value in values.items()}
