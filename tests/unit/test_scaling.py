"""The arithmetic of many nodes: what has to be true of it whatever is assumed, and bytes that are known."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest

from benchmarks.scaling_cases import GBITS, load_of, record, shapes
from benchmarks.scaling_model import (
    NODES,
    Load,
    Network,
    Parallel,
    Step,
    all_gather,
    all_reduce,
    gathered_ahead,
    pays,
    step_seconds,
    strong,
    weak,
)
from tests.conftest import ROOT

LLAMA = Load(gradients=335_544_320, layers=32, layer=112_513_024)
NO_HOPS = Network(10, share=1.0, hop=0.0)
BYTE_A_SECOND = Network(8e-9, share=1.0, hop=0.0)


def test_a_ring_sends_nearly_twice_what_it_reduces_and_once_what_it_gathers() -> None:
    assert [all_reduce(64, nodes, BYTE_A_SECOND) for nodes in (1, 2, 64)] == pytest.approx([0, 64, 126])
    assert [all_gather(64, nodes, BYTE_A_SECOND) for nodes in (1, 2, 64)] == pytest.approx([0, 32, 63])


def test_each_of_a_rings_steps_waits_for_a_hop() -> None:
    network = Network(10, hop=1.0)
    assert all_reduce(0, 5, network) == 8
    assert all_gather(0, 5, network) == 4


def test_a_layer_that_arrives_while_another_computes_costs_no_time_but_the_first() -> None:
    assert gathered_ahead(compute=10, layers=10, gather=0.5) == pytest.approx(10.5)
    assert gathered_ahead(compute=10, layers=10, gather=3) == pytest.approx(3 * 10 + 1)
    assert gathered_ahead(compute=10, layers=10, gather=0) == pytest.approx(10)


@pytest.mark.parametrize("parallel", ["data", "sharded"])
def test_one_node_sends_nothing(parallel: Parallel) -> None:
    assert step_seconds(LLAMA, parallel, Step(2, 1.0), 1, NO_HOPS) == pytest.approx(2)


def test_gradients_are_hidden_behind_the_last_way_back_but_for_their_last_bucket() -> None:
    bucket = all_reduce(25 << 20, 2, NO_HOPS)
    assert step_seconds(LLAMA, "data", Step(2, 1000.0), 2, NO_HOPS) == pytest.approx(2000 + bucket)
    waited = all_reduce(LLAMA.gradients, 2, NO_HOPS) - 2 / 3 * 0.1
    assert step_seconds(LLAMA, "data", Step(2, 0.1), 2, NO_HOPS) == pytest.approx(0.2 + waited)


def test_a_network_slower_than_the_cards_is_what_a_sharded_step_takes() -> None:
    sent = 2 * 2 * LLAMA.layers * all_gather(LLAMA.layer, 8, NO_HOPS)
    took = step_seconds(LLAMA, "sharded", Step(2, 0.01), 8, NO_HOPS)
    assert sent < took < 1.1 * sent


@pytest.mark.parametrize("parallel", ["data", "sharded"])
@pytest.mark.parametrize("seconds", [0.1, 1.0, 5.0])
def test_more_nodes_never_leave_a_card_more_of_its_time_and_a_faster_network_never_less(
    parallel: Parallel, seconds: float
) -> None:
    by_network = [weak(LLAMA, parallel, Step(2, seconds), Network(gbit)) for gbit in GBITS]
    for efficiency in by_network:
        assert all(before >= after for before, after in pairwise(efficiency.values()))
    for slower, faster in pairwise(by_network):
        assert all(slower[nodes] <= faster[nodes] for nodes in NODES)


@pytest.mark.parametrize("parallel", ["data", "sharded"])
def test_no_number_of_nodes_is_faster_than_their_number(parallel: Parallel) -> None:
    times = strong(LLAMA, parallel, Step(64, 1.0), Network(100))
    assert times[1] == pytest.approx(1)
    assert all(found <= nodes + 1e-9 for nodes, found in times.items())


def test_more_passes_a_step_hide_the_gradients_and_not_the_gathers() -> None:
    few, many = (Step(passes, 1.0) for passes in (2, 16))
    slow = Network(1)
    assert weak(LLAMA, "data", many, slow)[64] > 2 * weak(LLAMA, "data", few, slow)[64]
    assert weak(LLAMA, "sharded", many, slow)[64] < 1.2 * weak(LLAMA, "sharded", few, slow)[64]


def test_it_pays_up_to_the_first_number_of_nodes_that_leaves_less_than_half() -> None:
    assert pays({1: 1.0, 2: 0.8, 4: 0.5, 8: 0.4, 16: 0.6}) == 4
    assert pays({1: 1.0, 2: 0.3}) == 1


def test_bytes_are_those_of_the_models() -> None:
    llama, qwen = (load_of(*of) for of in shapes().values())
    assert llama.gradients == 2 * 167_772_160  # rank 64 on all linear layers of Llama-3.1-8B, in bf16
    packed = 6_979_321_856  # parameters of its linear layers
    assert packed / 2 < llama.layers * llama.layer < 1.1 * packed / 2
    assert qwen.layers * qwen.layer > 30.5e9 / 2 > llama.layers * llama.layer


def test_the_record_is_what_the_arithmetic_gives() -> None:
    kept = json.loads((ROOT / "benchmarks" / "scaling_nodes.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(record())), "python benchmarks/scaling.py --arithmetic"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    return import_module("scaling_page")


def test_the_page_says_that_nothing_was_measured_yet(written: ModuleType) -> None:
    assert "Not measured yet" in "\n".join(written.two_processes(None))


def test_the_page_tells_what_was_measured(written: ModuleType) -> None:
    seconds = {"p20": 1.0, "p80": 3.0, "timed": 11, "passes": 1}
    measured: dict[str, Any] = {
        "date": "2026-11-29",
        "commit": "0123456789",
        "machine": {"cpu": "a processor", "cores": 2, "python": "3.11"},
        **dict.fromkeys(("torch", "transformers", "peft", "trl", "bitsandbytes"), "1.0"),
        "model": "a model",
        "rows_a_pass": 2,
        "tokens_a_row": 64,
        "runs": {
            "one": {"processes": 1, "parallel": "auto", "seconds": 2.0, **seconds},
            "two, data": {"processes": 2, "parallel": "data", "seconds": 2.5, **seconds},
        },
        "scaling": [
            {"scaling": "strong", "parallel": "data", "speed_up": 1.6, "loss_off": 0.0004},
            {"scaling": "weak", "parallel": "data", "efficiency": 0.8},
        ],
        "gloo": {"gradients": {"bytes": 40_000_000, "times_a_step": 1, "seconds": 0.25}},
    }
    page = "\n".join(written.two_processes(measured))
    assert "a processor, 2026-11-29, commit 0123456" in page
    assert "two are 1.60 times as fast as one; no loss further than 0.04 %" in page
    assert "each of two has 80% of the speed of one alone" in page
    assert "| gradients | 1 | 40.00 | 250.0 | 0.250 | 10% |" in page
