"""Figures of benchmarks: told in one line, the last word counts, and compared only where that means something."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from radeon_stack.catalog.load import read, resolve
from radeon_stack.contracts.bench import AttentionGrid, BenchConfig
from radeon_stack.errors import Exit, UsageError
from radeon_stack.figures import Case, Scalar, case_label, figure_line
from radeon_stack.runs import events as ev
from radeon_stack.runs.compare import Side, compare, lines
from radeon_stack.runs.measurements import counted, measurements_of, quickest
from radeon_stack.runs.outcome import judge
from radeon_stack.runs.store import RunStore, State, Status
from tests.conftest import Cli

SIZES: dict[str, Scalar] = {"batch": 4, "seq": 2048, "heads": 32, "kv_heads": 32, "head_dim": 128}
CASE: dict[str, Scalar] = {"dtype": "bfloat16", **SIZES, "causal": False, "varlen": False}
CARD = {"name": "Radeon AI PRO R9700", "arch": "gfx1201", "memory": 32 << 30, "torch": "2.9.1"}
TIMING = {"seconds": 0.5, "flush": True}


def times(forward: float, backward: float, *, spread: float = 0.01, **more: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for phase, seconds in (("forward", forward), ("backward", backward)):
        found |= {f"{phase}_seconds": seconds, f"{phase}_stable": 1.0, f"{phase}_of_floor": 2.0}
        found |= {f"{phase}_seconds_p20": seconds * (1 - spread), f"{phase}_seconds_p80": seconds * (1 + spread)}
    return found | more


def measured(name: str = "flash_attn", state: str = "ok", note: str = "", case: Case = CASE, **values: Any) -> Any:
    return ev.Measurement.model_validate(
        {"suite": "attention", "case": case, "implementation": name, "state": state, "note": note, **values}
    )


def a_side(*measurements: ev.Measurement, name: str = "a", **card: Any) -> Side:
    return Side(name, measurements, CARD | card, TIMING)


def test_a_figure_is_told_on_one_line_as_the_seed_told_it() -> None:
    values = times(7.05e-3, 70.68e-3, difference_forward=1.2e-3, difference_backward=3.4e-3)
    assert figure_line(CASE, "flash_attn", "ok", values) == (
        "bf16 b4 s2048 h32 d128 | flash_attn | diff fwd 1.2e-03 bwd 3.4e-03 | 7.05 ms fwd 70.68 ms bwd | stable"
        " | 2.0× 2.0× of the floor"
    )
    assert figure_line(CASE, "sdpa_cudnn", "missing", {}, "not on HIP").endswith("| sdpa_cudnn | missing: not on HIP")
    assert "| unstable |" in figure_line(CASE, "flash_attn", "ok", values | {"backward_stable": 0.0})


def test_a_case_is_written_with_what_is_special_about_it() -> None:
    assert case_label(CASE | {"kv_heads": 8, "causal": True}) == "bf16 b4 s2048 h32/8 d128 causal"
    assert case_label({"dtype": "float16", "experts": 64, "routing": "even"}) == "fp16 experts 64 even"


def test_the_last_word_on_an_implementation_counts_and_the_quickest_comes_first() -> None:
    found = measurements_of(
        [
            measured("b", values=times(2, 2)),
            measured("a", "missing"),
            measured("c", values=times(9, 9)),
            measured("c", values=times(1, 1)),
            ev.Attempt(pid=1),
        ]
    )
    assert [one.implementation for one in found] == ["c", "b", "a"]
    assert counted(found) == "2 of 3 measured, 1 missing"
    assert quickest(found) == "quickest in 1 of 1 cases: c"


def test_cases_are_listed_by_size_not_by_letters() -> None:
    found = measurements_of([measured(case=CASE | {"seq": seq}) for seq in (16384, 128, 2048)])
    assert [one.case["seq"] for one in found] == [128, 2048, 16384]


def test_a_run_compared_with_itself_is_the_same() -> None:
    found = compare(a_side(measured(values=times(1, 2))), a_side(measured(values=times(1, 2))))
    assert [(change.figure, change.ratio, change.verdict) for change in found.changes] == [
        ("forward_seconds", 1.0, "same"),
        ("backward_seconds", 1.0, "same"),
    ]


seconds = st.floats(1e-6, 10.0)
spreads = st.floats(0.0, 0.3)


@given(seconds, spreads, seconds, spreads)
def test_what_is_worse_one_way_is_better_the_other_way(a: float, spread_a: float, b: float, spread_b: float) -> None:
    old, new = (a_side(measured(values=times(t, 1, spread=s))) for t, s in ((a, spread_a), (b, spread_b)))
    there, back = compare(old, new), compare(new, old)
    assert [change.figure for change in there.worse] == [change.figure for change in back.better]
    assert [change.figure for change in there.better] == [change.figure for change in back.worse]
    for one, other in zip(there.changes, back.changes, strict=True):
        assert one.ratio and other.ratio and math.isclose(one.ratio * other.ratio, 1.0)


@given(seconds, spreads, st.floats(1.0, 100.0))
def test_only_what_lies_beyond_the_spread_and_the_margin_is_worse(t: float, spread: float, factor: float) -> None:
    old = a_side(measured(values=times(t, 1, spread=spread)))
    found = compare(old, a_side(measured(values=times(t * factor, 1, spread=spread))), margin=0.05)
    apart = t * factor * (1 - spread) - t * (1 + spread)
    assume(abs(apart) > 1e-9 * t and abs(factor - 1.05) > 1e-9)
    assert bool(found.worse) == (apart > 0 and factor > 1.05)


@given(st.dictionaries(st.sampled_from(list(times(1, 1))), st.floats()))
def test_figures_that_make_no_sense_are_not_compared_and_break_nothing(values: dict[str, float]) -> None:
    odd, sound = a_side(measured(values=values)), a_side(measured(values=times(1, 1)))
    for found in (compare(odd, sound), compare(sound, odd)):
        assert all(isinstance(change.ratio, float) and 0 < change.ratio < math.inf for change in found.changes)
        lines(found)


def test_an_implementation_that_was_right_and_crashes_now_is_worse() -> None:
    right, crashed = a_side(measured(values=times(1, 1))), a_side(measured(state="crashed"))
    assert [(c.figure, c.old, c.new) for c in compare(right, crashed).worse] == [("state", "ok", "crashed")]
    assert [c.figure for c in compare(crashed, right).better] == ["state"]
    assert not compare(crashed, crashed).changes


def test_what_it_allocates_is_compared_by_the_margin_alone() -> None:
    old, new = (a_side(measured(values=times(1, 1, forward_peak_bytes=size))) for size in (100.0, 106.0))
    assert [change.figure for change in compare(old, new).worse] == ["forward_peak_bytes"]


def test_other_software_is_told_and_another_card_refused() -> None:
    old = a_side(measured(values=times(1, 1)))
    found = compare(old, a_side(measured(values=times(1, 1)), torch="2.10.0"))
    assert "  torch: 2.9.1 → 2.10.0" in lines(found)
    with pytest.raises(UsageError, match="another card: arch gfx1100, not gfx1201"):
        compare(old, a_side(measured(values=times(1, 1)), arch="gfx1100"))


def test_other_cases_and_other_ways_of_timing_are_refused() -> None:
    old = a_side(measured(values=times(1, 1)))
    both = a_side(measured(values=times(1, 1)), measured(case=CASE | {"seq": 128}, values=times(1, 1)))
    with pytest.raises(UsageError, match="1 cases are in one of the runs alone, such as bf16 b4 s128"):
        compare(old, both)
    assert len(compare(old, both, common=True).changes) == 2
    with pytest.raises(UsageError, match="has no case of it"):
        compare(old, a_side(measured(case=CASE | {"seq": 128})), common=True)
    warm = Side("b", old.measurements, CARD, TIMING | {"flush": False})
    with pytest.raises(UsageError, match=r"timed in another way: timing\.flush"):
        compare(old, warm)


def test_a_card_that_is_slower_itself_is_told() -> None:
    one = [measured(values=times(1, 1))]
    old, new = (Side("a", one, CARD, TIMING, {"copy": rate}) for rate in (600e9, 300e9))
    assert any("the card itself: copy rate 0.50×" in line for line in lines(compare(old, new)))


def recorded(home: Path, *events: ev.Event) -> str:
    run = RunStore(home).new("bench-attention")
    run.artifacts.mkdir(parents=True)
    run.write_status(
        Status(state=State.DONE, recipe="bench-attention", engine="local", started=1.0, ended=2.0, exit_code=0)
    )
    writer = ev.EventWriter(run.events)
    for event in events:
        writer(event)
    return run.id


def test_the_command_says_by_its_exit_code_whether_a_figure_became_worse(home: Path, cli: Cli) -> None:
    card = ev.Fact(name="card", value=CARD)
    quick = recorded(home, card, measured(values=times(12.1e-3, 1)))
    slow = recorded(home, card, measured(values=times(70.68e-3, 1)))
    worse = cli("runs", "compare", quick, slow)
    assert worse.code == Exit.CHECK
    assert "✗ bf16 b4 s2048 h32 d128 | flash_attn | forward 12.10 ms → 70.68 ms, 5.84×" in worse.out
    better = cli("runs", "compare", slow, quick, "--json")
    assert better.code == Exit.OK and better.json["worse"] == 0 and better.json["better"] == 1
    empty = recorded(home)
    assert cli("runs", "compare", quick, empty).code == Exit.USAGE
    other = recorded(home, ev.Fact(name="card", value=CARD | {"name": "Radeon RX 7900 XTX"}), measured())
    refused = cli("runs", "compare", quick, other)
    assert refused.code == Exit.USAGE and "another card" in refused.error
    listed = json.loads(cli("runs", "show", slow, "--json").out)["measurements"]
    assert listed[0]["values"]["forward_seconds"] == 70.68e-3
    assert "1 of 1 measured" in cli("runs", "list").out


def test_a_benchmark_with_wrong_numbers_fails_its_run() -> None:
    expect = resolve(read("bench-attention")).recipe.expect.model_dump()
    found = judge(0, [ev.Result(values={"ok": 3, "wrong": 1})], expect, run="r")
    assert found.exit_code == Exit.CHECK and found.what == "wrong is 1, at most 0 was expected"
    assert judge(0, [ev.Result(values={"ok": 3, "wrong": 0, "crashed": 2})], expect, run="r").exit_code == Exit.OK


def test_a_comparison_is_asked_for_before_anything_is_run(home: Path, cli: Cli) -> None:
    assert "no runs in" in cli("run", "bench-attention", "--preset", "demo", "--compare", "last").error
    recorded(home)
    nothing = cli("run", "bench-attention", "--preset", "demo", "--compare", "last")
    assert nothing.code == Exit.USAGE and "measured nothing that could be compared" in nothing.error
    detached = cli("run", "bench-attention", "--preset", "demo", "--compare", "last", "--detach")
    assert detached.code == Exit.USAGE and "runs compare" in detached.error


def test_the_default_grid_is_the_seeds() -> None:
    config = resolve(read("bench-attention")).config
    assert isinstance(config, BenchConfig)
    cases = [(c["dtype"], c["batch"], c["seq"]) for c in config.attention.combinations()]
    assert sorted(cases) == sorted((d, b, s) for d in ("fp16", "bf16") for b in (1, 4) for s in (128, 2048))
    assert {(c["heads"], c["kv_heads"], c["head_dim"]) for c in config.attention.combinations()} == {(32, 32, 128)}


def test_the_long_grid_has_what_long_contexts_are_made_of() -> None:
    config = resolve(read("bench-attention"), "long").config
    assert isinstance(config, BenchConfig)
    cases = list(config.attention.combinations())
    assert {c["head_dim"] for c in cases} == {64, 128, 256} and {c["kv_heads"] for c in cases} == {32, 8}
    assert max(c["seq"] for c in cases) == 16384 and {c["varlen"] for c in cases} == {True, False}


def test_heads_that_cannot_be_shared_out_are_no_case_and_none_comes_twice() -> None:
    grid = AttentionGrid(heads=(8, 12), kv_heads=(0, 8), dtypes=("bf16",), batch=(1,), seq=(128,))
    assert [(c["heads"], c["kv_heads"]) for c in grid.combinations()] == [(8, 8), (12, 12)]


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("attention.seq=[]", "config.attention.seq"),
        ("attention.dtypes=['fp8']", "config.attention.dtypes"),
        ("timing.least=200", "least not above most"),
        ("timing.seconds=0.0", "config.timing.seconds"),
        ("suites=['typo']", "config.suites"),
        ("seeed=1", "seeed"),
    ],
)
def test_a_bad_value_is_told_with_its_key(assignment: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(read("bench-attention"), "demo", (assignment,))
    assert told in str(caught.value)


def test_a_grid_of_too_many_cases_is_refused() -> None:
    many = list(range(1, 65))
    with pytest.raises(UsageError, match="at most 4096 cases"):
        resolve(read("bench-attention"), None, (f"attention.seq={many}", f"attention.batch={many}"))


def test_a_benchmark_is_launched_without_a_model(cli: Cli) -> None:
    told = cli("run", "bench-attention", "--preset", "demo", "--engine", "local", "--dry-run", "--json").json
    assert "radeon_stack.workloads.bench" in told["command"]
    assert "--model" not in told["command"] and "--data" not in told["command"]
    refused = cli("run", "bench-attention", "--preset", "demo", "--engine", "local", "--model", "x", "--dry-run")
    assert refused.code == Exit.USAGE and "config.model" in refused.error
