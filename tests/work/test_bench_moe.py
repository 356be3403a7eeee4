"""The suites of MoE layers and NF4 linear layers: their truths are the definitions, and what is not true is told so."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

from radeon_stack.contracts.bench import BenchConfig
from radeon_stack.errors import Exit
from radeon_stack.figures import Case
from tests.conftest import Cli

pytestmark = pytest.mark.work
torch = pytest.importorskip("torch")

from radeon_stack.workloads.bench import ffn, gating, linear, work  # noqa: E402
from radeon_stack.workloads.bench.suite import Built, Suite, Work  # noqa: E402
from radeon_stack.workloads.bench.timing import Call  # noqa: E402

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"hidden": 64, "intermediate": 64, "experts": 6, "top_k": 2}


def experts_case(**more: Any) -> Case:
    return {"dtype": "float32", "batch": 2, "seq": 9, **SIZES, "routing": "even", **more}


def router_case(**more: Any) -> Case:
    sizes = {"batch": 2, "seq": 9, "hidden": 32, "experts": 8, "top_k": 3}
    return {"dtype": "float32", **sizes, "part": "router", "layers": 1, **more}


def linear_case(**more: Any) -> Case:
    return {"dtype": "float32", "tokens": 7, "out": 64, "in": 128, "rank": 4, **more}


def proved(suite: Suite, case: Case, name: str) -> dict[str, Any]:
    return work.prove({"suite": suite.address, "case": case, "seed": 0, "implementation": name}, CPU)


def held_to(suite: Suite, setting: Any, results: dict[str, Any]) -> None:
    truth, _ = suite.truth(setting)
    found = suite.part(setting, results)
    assert truth.keys() == found.keys() == suite.results.keys()
    for name, true in truth.items():
        assert work.difference(found[name], true) < 1e-12, name


def doubled(*tensors: Any) -> list[Any]:
    return [one.detach().double().requires_grad_() for one in tensors]


@pytest.mark.parametrize("routing", ["even", "skewed", "single"])
def test_the_experts_truth_is_what_autograd_finds_token_by_token(routing: str) -> None:
    setting = ffn.SUITE.setting(experts_case(routing=routing), CPU, 3)
    x, share = doubled(setting.hidden, setting.share)
    gate_up, down = setting.gate_up.double(), setting.down.double()
    rows = []
    for token in range(setting.tokens):
        total = torch.zeros(64, dtype=torch.float64)
        for choice in range(2):
            expert = setting.index[token, choice]
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            y = down[expert] @ (torch.nn.functional.silu(gate) * up)
            total = total + share[token, choice] * y
        rows.append(total)
    out = torch.stack(rows)
    d_hidden, d_share = torch.autograd.grad(out, (x, share), setting.grad.double())
    held_to(ffn.SUITE, setting, {"out": out, "d_hidden": d_hidden, "d_share": d_share})


@pytest.mark.parametrize("part", ["router", "bare"])
def test_the_routers_truth_is_what_autograd_finds(part: str) -> None:
    setting = gating.SUITE.setting(router_case(part=part), CPU, 3)
    (x,) = doubled(setting.x)
    logits = x if part == "bare" else x @ setting.weight.double().T
    weights, index = logits.softmax(-1).topk(3)
    weights = weights / weights.sum(-1, keepdim=True)
    (d_x,) = torch.autograd.grad(weights, x, setting.grad.double().gather(1, index))
    chosen = gating.by_expert(torch.ones_like(weights), index, setting)
    held_to(gating.SUITE, setting, {"chosen": chosen, "weights": gating.by_expert(weights, index, setting), "d_x": d_x})


def test_the_gradients_of_many_routers_are_each_ones_own() -> None:
    setting = gating.SUITE.setting(router_case(layers=3), CPU, 3)
    built = gating.SUITE.build("transformers", setting)
    together = built.calls["step"].run()
    assert len(together) == 3 and len({float(grad.sum()) for grad in together}) == 3
    assert torch.equal(together[0], built.results()["d_x"])
    one = gating.SUITE.work(router_case())["step"]
    assert gating.SUITE.work(router_case(layers=3))["step"] == Work(3 * one.bytes, 3 * one.operations, "float32", 18)


def test_a_tie_between_the_last_chosen_and_the_next_is_nobodys_mistake() -> None:
    setting = gating.SUITE.setting(router_case(part="bare"), CPU, 3)
    x = setting.x.detach().clone()
    x[4] = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # three of these: which third?
    x[5] = torch.tensor([3.0, 3.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0])  # a tie among the chosen decides nothing
    tied = replace(setting, x=x.requires_grad_())
    assert tied.clear().tolist() == [row != 4 for row in range(18)]
    truth, part = gating.SUITE.truth(tied)
    assert len(truth["chosen"]) == 17 and part.startswith("17 of 18 tokens")


def test_the_linear_layers_truth_is_what_autograd_finds() -> None:
    setting = linear.SUITE.setting(linear_case(), CPU, 3)
    assert setting.b.abs().sum() > 0, "of a fresh adapter's zeros, a's gradient would be zero"
    x, a, b = doubled(setting.x, setting.a, setting.b)
    out = x @ (setting.weight.double() + linear.SCALE * b @ a).T
    d_x, d_a, d_b = torch.autograd.grad(out, (x, a, b), setting.grad.double())
    held_to(linear.SUITE, setting, {"out": out, "d_x": d_x, "d_a": d_a, "d_b": d_b})


def test_many_tokens_are_compared_in_part_and_the_last_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    case = experts_case()
    setting = ffn.SUITE.setting(case, CPU, 0)
    whole, _ = ffn.SUITE.truth(setting)
    monkeypatch.setattr(ffn, "TRUTH_OPERATIONS", 2 * ffn.operations(case) / 3)
    truth, part = ffn.SUITE.truth(setting)
    assert part == "6 of 18 tokens" and setting.rows().tolist() == [2, 5, 8, 11, 14, 17]
    for name, true in truth.items():
        assert work.difference(true, whole[name][setting.rows()]) < 1e-12
        assert torch.equal(ffn.SUITE.part(setting, whole)[name], whole[name][setting.rows()])


def test_routings_are_what_they_are_called() -> None:
    generator = torch.Generator().manual_seed(0)
    even, skewed, single = (ffn.routed(how, 4000, 16, 4, generator) for how in ("even", "skewed", "single"))
    for index in (even, skewed):
        assert all(len(set(row)) == 4 for row in index.tolist()), "a token has an expert once"
    counts = torch.bincount(even.flatten(), minlength=16)
    assert counts.min() > 850 and counts.max() < 1150
    first, *_, last = torch.bincount(skewed.flatten(), minlength=16).tolist()
    assert first > 5 * last > 0
    assert single.unique().numel() == 1


def test_the_least_work_is_counted_from_the_definition() -> None:
    case = experts_case(dtype="bfloat16")
    forward, backward, step = ffn.SUITE.work(case).values()
    slots, weights = 18 * 2, 6 * 3 * 64 * 64 * 2
    assert forward.operations == backward.operations == 2 * slots * 3 * 64 * 64
    assert forward.bytes == weights + 2 * (18 * 64 * 2) + slots * (2 + 8)
    assert backward.bytes == weights + 3 * (18 * 64 * 2) + slots * (2 + 8 + 2)
    assert (step.bytes, step.operations) == (forward.bytes + backward.bytes, 2 * forward.operations)
    assert forward.tokens == 18
    few = ffn.SUITE.work(experts_case(dtype="bfloat16", batch=1, seq=1))["forward"]
    assert few.bytes == weights / 3 + 2 * (64 * 2) + 2 * (2 + 8), "two choices touch two experts of six"
    adapted = linear.SUITE.work(linear_case(dtype="bfloat16"))["backward"]
    assert adapted.operations == 2 * 7 * (64 * 128 + 2 * 4 * (64 + 128))


def test_quantised_experts_are_held_to_the_weights_that_they_have_and_their_own_difference_is_told() -> None:
    pytest.importorskip("bitsandbytes")
    found = proved(ffn.SUITE, experts_case(dtype="float16"), "dequantize_grouped_mm")
    values = found["values"]
    assert found["state"] == "ok", found
    assert values["difference_out"] < 2e-3 < 5e-2 < values["quantised_out"] < 0.5
    assert 0.25 < values["weights_ratio"] < 0.35
    setting = ffn.SUITE.setting(experts_case(dtype="float16", routing="single"), CPU, 0)
    sixteen, four = (ffn.SUITE.build(name, setting) for name in ("grouped_mm", "dequantize_grouped_mm"))
    weights = [one.values["weights_bytes"] / 6 for one in (sixteen, four)]
    read = [one.work["forward"].bytes for one in (sixteen, four)]
    assert read[0] - read[1] == pytest.approx(weights[0] - weights[1]), "one expert of six is touched, as it is stored"


def without_an_expert(setting: ffn.Setting) -> ffn.Layer:
    broken = replace(setting, gate_up=setting.gate_up.clone())
    broken.gate_up[setting.index[0, 0]] = 0
    return ffn.transformers_experts("grouped_mm")(broken)


def test_a_lost_expert_is_told_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn, "IMPLEMENTATIONS", {"lost": without_an_expert, **ffn.IMPLEMENTATIONS})
    found = proved(ffn.SUITE, experts_case(), "lost")
    assert found["state"] == "wrong" and found["values"]["difference_out"] > 0.1
    assert proved(ffn.SUITE, experts_case(), "grouped_mm")["state"] == "ok"


def test_a_router_that_takes_the_next_expert_is_told_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def next_best(setting: gating.Setting) -> tuple[gating.Router, str]:
        def route(logits: Any) -> gating.Routed:
            weights, index = gating.softmax_topk(logits, setting.top_k + 1)
            return weights[:, 1:], index[:, 1:]

        return route, ""

    monkeypatch.setattr(gating, "IMPLEMENTATIONS", {"next": next_best, **gating.IMPLEMENTATIONS})
    found = proved(gating.SUITE, router_case(part="bare"), "next")
    assert found["state"] == "wrong" and "chosen" in found["note"] and found["values"]["difference_router"] > 0.5
    assert proved(gating.SUITE, router_case(part="bare"), "transformers")["state"] == "ok"


def test_an_adapter_without_its_scale_is_told_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")

    def unscaled(setting: linear.Setting) -> linear.Layer:
        layer = linear.peft(factors_16bit=True)(replace(setting, b=setting.b * 2))
        return replace(layer, exact=replace(layer.exact, b=setting.b))

    monkeypatch.setattr(linear, "IMPLEMENTATIONS", {"unscaled": unscaled, **linear.IMPLEMENTATIONS})
    case = linear_case(dtype="float16")
    assert proved(linear.SUITE, case, "peft")["state"] == proved(linear.SUITE, case, "peft_16bit")["state"] == "ok"
    assert proved(linear.SUITE, case, "unscaled")["state"] == "wrong"


@pytest.mark.parametrize(
    ("suite", "case", "name", "why"),
    [
        (ffn.SUITE, experts_case(dtype="bfloat16"), "radeon_grouped", "Triton's interpreter has no bfloat16"),
        (gating.SUITE, router_case(dtype="bfloat16"), "radeon_router", "Triton's interpreter has no bfloat16"),
        (linear.SUITE, linear_case(dtype="bfloat16"), "radeon_linear", "Triton's interpreter has no bfloat16"),
        (linear.SUITE, linear_case(), "peft_16bit", "the case is 32 bit"),
        (ffn.SUITE, experts_case(hidden=96), "dequantize_grouped_mm", "rows of 96 values are no whole blocks of 64"),
    ],
)
def test_what_is_not_for_the_case_is_missing_with_the_reason(suite: Suite, case: Case, name: str, why: str) -> None:
    assert proved(suite, case, name) == {"state": "missing", "values": {}, "note": why}


def test_what_is_not_installed_is_missing_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    qwen3 = "transformers.models.qwen3_moe.modeling_qwen3_moe"
    for module in ("bitsandbytes.functional", "bitsandbytes.nn.parametrize", qwen3):
        monkeypatch.setitem(sys.modules, module, None)
    for suite, case, name, what in (
        (linear.SUITE, linear_case(), "peft", "bitsandbytes or peft cannot be imported"),
        (ffn.SUITE, experts_case(), "dequantize_grouped_mm", "bitsandbytes' parametrize cannot be imported"),
        (ffn.SUITE, experts_case(), "eager", "transformers' Qwen3MoeExperts cannot be imported"),
        (gating.SUITE, router_case(), "transformers", "transformers' Qwen3MoeTopKRouter cannot be imported"),
    ):
        found = proved(suite, case, name)
        assert found["state"] == "missing" and found["note"].startswith(what)


def test_copies_that_would_not_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn, "COPIED_CPU", 36 * 3 * 64 * 64 * 4 - 1)
    found = proved(ffn.SUITE, experts_case(), "batched_mm")
    assert found["state"] == "missing" and "copies an expert's weights for each choice" in found["note"]
    assert proved(ffn.SUITE, experts_case(seq=8), "batched_mm")["state"] == "ok"


def test_what_is_interpreted_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str) -> Built:
        def run() -> None:
            assert name == "compiled", "timed all the same"

        return Built(dict, {"forward": Call(run)}, timed=name == "compiled")

    class Two:
        def setting(self, *_: Any) -> None: ...

        def build(self, name: str, _: Any) -> Built:
            return build(name)

        def work(self, _: Case) -> dict[str, Work]:
            return {"forward": Work(1, 1, "float32", tokens=8)}

    monkeypatch.setattr(work, "find_suite", lambda _: Two())
    quick = {"seconds": 1e-4, "least": 2, "most": 2, "warmup": 0, "warmup_seconds": 0.0}
    task = {"suite": "", "case": {}, "seed": 0, "implementations": ["compiled", "interpreted"], "budget": quick}
    told = work.time_together({**task, "flush": False, "graph": False, "floor": {"bandwidth": 1, "matrix": {}}}, CPU)
    seconds = told["compiled"]["values"]["forward_seconds"]
    assert told["compiled"]["values"]["forward_tokens_per_second"] == 8 / seconds
    assert told["interpreted"] == {"values": {}, "notes": [], "failed": ""}


def test_grids_have_each_case_once_and_none_that_cannot_be() -> None:
    config = BenchConfig.model_validate({"suites": ["ffn"], "ffn": {"experts": [4, 4, 16], "top_k": [8, 2]}})
    cases = ffn.SUITE.cases(config)
    assert len(cases) == 2 * 2 * 2 * 3 and {(c["experts"], c["top_k"]) for c in cases} == {(4, 2), (16, 8), (16, 2)}
    shapes = BenchConfig.model_validate({"linear": {"shapes": [[64, 128]], "tokens": [5]}})
    assert linear.SUITE.cases(shapes) == [{"dtype": "bfloat16", "tokens": 5, "rank": 64, "out": 64, "in": 128}]
    wide = {"batch": list(range(1, 65)), "seq": list(range(1, 65))}
    with pytest.raises(ValidationError, match="at most 4096 cases; the grid of ffn has more"):
        BenchConfig.model_validate({"suites": ["ffn"], "ffn": wide})
    BenchConfig.model_validate({"suites": ["linear"], "ffn": wide})


def told_in(cli: Cli, recipe: str, *sets: str) -> tuple[Any, dict[tuple[str, str], Any]]:
    given = [argument for one in sets for argument in ("--set", one)]
    result = cli("run", recipe, "--preset", "demo", "--engine", "local", "--json", *given)
    assert result.code == Exit.OK, result.err
    return result, {(one["suite"], one["implementation"]): one for one in result.json["measurements"]}


def test_the_moe_demo_runs_from_the_command_line_to_its_report(cli: Cli) -> None:
    result, told = told_in(cli, "bench-moe", "gating.part=['router']", "ffn.routing=['even']")
    assert {key: one["state"] for key, one in told.items()} == {
        **{("ffn", name): "ok" for name in ffn.IMPLEMENTATIONS},
        **{("gating", name): "ok" for name in gating.IMPLEMENTATIONS},
    }
    for (_, name), one in told.items():
        ours = name.startswith("radeon")
        assert ("step_seconds" in one["values"]) != ours, "what is interpreted is not timed"
        assert ours == ("interpreted, not timed" in one["note"])
    assert told["ffn", "radeon_nf4"]["values"]["weights_ratio"] < 0.3
    assert told["ffn", "grouped_mm"]["values"]["step_tokens_per_second"] > 0
    number = r"\S+"
    line = (
        rf"top_k 2 even \| eager \| diff fwd {number} bwd {number} router {number} \| {number} ms fwd {number} ms bwd"
    )
    assert re.search(line, result.err)
    again = cli("runs", "compare", "last", "last")
    assert again.code == Exit.OK and "0 worse, 0 better" in again.out


def test_the_linear_demo_runs_from_the_command_line(cli: Cli) -> None:
    _, told = told_in(cli, "bench-linear", "linear.tokens=[5]")
    assert {name: one["state"] for (_, name), one in told.items()} == dict.fromkeys(linear.IMPLEMENTATIONS, "ok")
    assert told["linear", "peft"]["values"]["forward_seconds"] > 0


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """benchmarks/kernel_speed.py, under a name that nobody else has."""
    path = Path(__file__).parents[2] / "benchmarks" / "kernel_speed.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record_with(times: Callable[[str], float], *, equal: bool = True) -> dict[str, Any]:
    case = {"dtype": "bfloat16", "batch": 1, "seq": 128, "routing": "even"}
    names = ("grouped_mm", "dequantize_grouped_mm", "radeon_grouped", "radeon_nf4")
    figures: list[dict[str, Any]] = [
        {"part": "ffn", "case": case, "implementation": name, "values": {"step_seconds": times(name)}} for name in names
    ]
    figures[-1]["values"] |= {"weights_ratio": 0.26, "device_step_seconds": 0.5}
    off = {"grouped_mm": 2e-3, "radeon_grouped": 1e-3, "dequantize_grouped_mm": 1e-3, "radeon_nf4": 2e-3}
    proofs = [
        {"part": "ffn", "case": case, "implementation": name, "state": "ok", "values": {"difference_out": value}}
        for name, value in off.items()
    ]
    return {"figures": figures, "proofs": proofs, "decode": [{"equal": equal}, {"equal": True}]}


def test_targets_hold_or_do_not_by_the_figures_and_what_is_not_measured_does_not(script: ModuleType) -> None:
    times = {"grouped_mm": 4.0, "dequantize_grouped_mm": 7.0, "radeon_grouped": 2.0, "radeon_nf4": 4.0}
    verdicts = {one.target: one for one in script.judge(record_with(times.__getitem__), ["decode", "ffn", "seed"])}

    def told(target: str) -> tuple[float | None, bool]:
        return verdicts[target].ratio, verdicts[target].holds

    assert told("radeon_nf4 / grouped_mm") == (1.0, True)
    assert told("dequantize_grouped_mm / radeon_nf4") == (1.75, False)
    assert told("radeon_grouped / grouped_mm") == (0.5, True)
    assert told("nf4 / 16-bit weight memory") == (0.26, True)
    assert told("eager / radeon_nf4") == (None, False)
    assert told("nf4 decode equal to bitsandbytes to the bit") == (1.0, True)
    no_worse = {name: one for name, one in verdicts.items() if "difference from float64" in name}
    assert [(one.ratio, one.holds) for one in no_worse.values()] == [(0.5, True), (2.0, False)]
    unequal = script.judge(record_with(times.__getitem__, equal=False), ["ffn"])
    assert [one.holds for one in unequal if "to the bit" in one.target] == [False]
    assert not script.Verdict("a", "b", 0.61, True, 0.6).holds and script.Verdict("a", "b", 1.5, False, 1.5).holds


@pytest.mark.parametrize("smoke", [True, False])
def test_the_benchmarks_cases_are_the_suites(script: ModuleType, smoke: bool) -> None:
    suites: dict[str, Suite] = {"ffn": ffn.SUITE, "gating": gating.SUITE, "linear": linear.SUITE}
    for entry in script.plan(smoke=smoke):
        suite = suites[entry.suite]
        assert set(entry.names) <= set(suite.implementations)
        assert set(entry.phases) <= set(suite.work(entry.case))
