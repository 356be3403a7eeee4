"""Benchmarks: crashes stay where they happen, wrong numbers are told as wrong, and contestants are timed in turns."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from radeon_stack.errors import Exit, UsageError, WorkloadError
from radeon_stack.figures import Case
from tests.conftest import Cli

pytestmark = pytest.mark.work
torch = pytest.importorskip("torch")

from radeon_stack.workloads.bench import attention, card, isolate, work  # noqa: E402
from radeon_stack.workloads.bench.floor import Floor, matrix_rate  # noqa: E402
from radeon_stack.workloads.bench.race import ALONE, Figure, Ground, Settings, chosen, race  # noqa: E402
from radeon_stack.workloads.bench.timing import Budget, Call, measure, quantile, summarise  # noqa: E402
from tests.work.bench_suite import SUITE  # noqa: E402

ECHO = "tests.work.bench_suite:echo"
CPU = torch.device("cpu")
FLOOR = Floor(bandwidth=1e10, matrix={"float32": 1e11})
GROUND = Ground({"name": "a CPU"}, FLOOR.facts())
QUICK: dict[str, Any] = {"seconds": 1e-4, "least": 3, "most": 5, "warmup": 1, "warmup_seconds": 0.0}


class FakeClock:
    """Lets each contestant take the times it is given, and writes down whose turn it was."""

    def __init__(self, times: dict[str, list[float]]) -> None:
        self.times = {name: iter(values) for name, values in times.items()}
        self.turns: list[str] = []

    def time(self, call: Callable[[], Any], before: Callable[[], Any]) -> float:
        before()
        name = call()
        self.turns.append(name)
        return next(self.times[name])

    def wait(self) -> float:
        return 0.0


def test_contestants_take_turns_and_nobody_always_follows_the_same_one() -> None:
    clock = FakeClock({name: [1.0] * 6 for name in "abc"})
    calls = {name: lambda name=name: name for name in "abc"}
    budget = Budget(seconds=6, least=1, most=6, warmup=0, warmup_seconds=0)
    measure(calls, device="cpu", budget=budget, flush=False, clock=clock)
    assert "".join(clock.turns) == "abcbcacab" * 2


def test_who_has_had_its_time_leaves_and_the_others_go_on() -> None:
    clock = FakeClock({"slow": [5.0] * 9, "quick": [1.0] * 9})
    calls = {name: lambda name=name: name for name in clock.times}
    budget = Budget(seconds=4, least=2, most=9, warmup=0, warmup_seconds=0)
    found = measure(calls, device="cpu", budget=budget, flush=False, clock=clock).times
    assert (found["slow"].n, found["quick"].n) == (2, 4)


def test_the_median_and_its_spread_are_of_what_the_clock_said() -> None:
    clock = FakeClock({"a": [9.0, 1.0, 2.0, 3.0, 4.0]})
    budget = Budget(seconds=1e9, least=1, most=5, warmup=0, warmup_seconds=0)
    one = measure({"a": lambda: "a"}, device="cpu", budget=budget, flush=False, clock=clock).times["a"]
    assert (one.median, one.p20, one.p80) == pytest.approx((3.0, 1.8, 5.0))
    assert one.n == 5 and not one.stable
    assert one.peak_bytes is None


def test_one_that_raises_leaves_the_race_with_its_reason() -> None:
    def raises() -> None:
        raise ValueError("too long\nand more")

    found = measure({"a": lambda: None, "b": raises}, device="cpu", budget=Budget(**QUICK))
    assert list(found.times) == ["a"] and found.failed == {"b": "ValueError: too long"}


def test_what_is_prepared_is_handed_over_and_not_kept() -> None:
    given: list[int] = []
    prepared = iter(range(100))
    measure({"a": Call(given.append, prepare=lambda: next(prepared))}, device="cpu", budget=Budget(**QUICK))
    assert given == list(range(len(given))) and len(given) >= QUICK["least"]


def test_a_graph_that_cannot_be_captured_is_said_and_the_call_timed_as_it_is() -> None:
    one = measure({"a": lambda: None}, device="cpu", budget=Budget(**QUICK), graph=True).times["a"]
    assert not one.graph and one.note == "no graph: a CPU has none"


def test_caches_are_written_over_before_each_timed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr("radeon_stack.workloads.bench.timing.flusher", lambda device: lambda: flushed.append(1))
    for flush in (True, False):
        budget = Budget(seconds=1e9, least=4, most=4, warmup=0, warmup_seconds=0)
        measure({"a": lambda: None}, device="cpu", budget=budget, flush=flush)
    assert len(flushed) == 4


def test_equal_samples_are_stable_and_quantiles_lie_between_neighbours() -> None:
    assert summarise([2.0, 2.0, 2.0]).stable and summarise([2.0, 2.0, 2.0]).spread == 0
    assert not summarise([2.0]).stable, "one sample shows no spread"
    assert [quantile([4.0, 1.0, 3.0, 2.0], share) for share in (0, 0.5, 1)] == [1.0, 2.5, 4.0]
    with pytest.raises(ValueError, match="no samples"):
        quantile([], 0.5)


def test_the_floor_is_the_larger_of_the_two_times() -> None:
    floor = Floor(bandwidth=100.0, matrix={"bfloat16": 1000.0})
    assert (floor.seconds(200, 1000, "bfloat16"), floor.bound(200, 1000, "bfloat16")) == (2.0, "memory")
    assert (floor.seconds(50, 4000, "bfloat16"), floor.bound(50, 4000, "bfloat16")) == (4.0, "compute")
    assert Floor(**floor.facts()) == floor


def test_a_dtype_without_a_matrix_product_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise RuntimeError("not implemented for this dtype")

    monkeypatch.setattr(torch, "mm", none)
    assert matrix_rate(CPU, "float32", budget=Budget(**QUICK)) == 0


def test_a_crash_is_told_with_its_signal_and_the_next_task_is_done_by_another_process() -> None:
    tasks = [{"do": name} for name in ("one", "segfault", "two", "abort", "exit", "raise", "three")]
    one, segfault, two, abort, gone, raised, three = isolate.answers(ECHO, tasks, seconds=60)
    assert [a.state for a in (one, two, three)] == ["ok"] * 3
    assert len({a.value["pid"] for a in (one, two, three)}) == 3
    assert segfault.state == "crashed" and segfault.note.startswith("SIGSEGV: ")
    assert "doing segfault" in segfault.note and "in string_at" in segfault.note, "what it said, and where it was"
    assert abort.note.startswith("SIGABRT: ") and gone.note == "exit code 3: doing exit"
    assert (raised.state, raised.note) == ("failed", "ValueError: no and why")


@pytest.mark.parametrize(("fault", "state"), [("gpu_fault", "crashed"), ("illegal_access", "failed")])
def test_after_a_gpu_fault_nothing_more_is_done(fault: str, state: str) -> None:
    listening = isolate.answers(ECHO, [{"do": "one"}, {"do": fault}, {"do": "two"}], seconds=60)
    assert [next(listening).state, next(listening).state] == ["ok", state]
    with pytest.raises(WorkloadError, match="the GPU faulted: ") as told:
        next(listening)
    assert "reboot" in told.value.remedy


def test_tasks_that_go_well_share_a_process() -> None:
    found = list(isolate.answers(ECHO, [{"do": "one"}, {"do": "two"}], seconds=60))
    assert found[0].value["pid"] == found[1].value["pid"]


def test_one_that_hangs_is_ended_and_the_others_are_done() -> None:
    hung, fine = isolate.answers(ECHO, [{"do": "hang"}, {"do": "one"}], seconds=6)
    assert hung.state == "crashed" and hung.note.startswith("timeout: silent for 6 s")
    assert fine.state == "ok"


def test_a_process_that_never_comes_to_its_work_answers_for_all_of_it() -> None:
    found = list(isolate.answers("tests.work.bench_suite:no_such", [{}] * 3, seconds=60))
    assert [answer.state for answer in found] == ["crashed"] * 3
    assert "AttributeError" in found[0].note


def raced(*names: str, cases: int = 1, seconds: float = 60) -> dict[str, Figure]:
    told: list[Figure] = []
    settings = Settings(device="cpu", budget=QUICK, flush=False, seconds=seconds)
    found = race(
        SUITE,
        SUITE.cases(None)[:cases],
        chosen([SUITE], names)[SUITE.name],
        settings,
        GROUND,
        tell=told.append,
        progress=lambda *_: None,
    )
    assert sorted(map(repr, told)) == sorted(map(repr, found)), "each figure is told once"
    return {f"{one.implementation} {one.case['size']}" if cases > 1 else one.implementation: one for one in found}


def test_each_way_of_being_unfit_has_its_name_and_its_reason_and_the_others_are_timed() -> None:
    found = raced("add", "multiply", "thrice", "nan", "moving", "absent", "raises", "segfault", "exits")
    states = ["ok", "ok", "wrong", "wrong", "wrong", "missing", "failed", "crashed", "crashed"]
    assert [one.state for one in found.values()] == states
    assert found["thrice"].values["difference_out"] == pytest.approx(0.5)
    assert "above 1.0e-03: out 5.0e-01" in found["thrice"].note
    assert "out nan" in found["nan"].note
    assert "again" in found["moving"].note, "it differs from itself"
    assert found["absent"].note == "nobody wrote it"
    assert found["raises"].note.startswith("RuntimeError: The size of tensor a (64) must match")
    assert found["segfault"].note.startswith("SIGSEGV")
    for name in ("add", "multiply"):
        values = found[name].values
        assert values["forward_seconds"] > 0 and values["forward_samples"] >= QUICK["least"]
        assert values["forward_of_floor"] == pytest.approx(values["forward_seconds"] / (8 * 64 / 1e10))
        assert values["forward_memory_bound"] == 1 and values["difference_forward"] == 0
    assert "forward_seconds" not in found["thrice"].values, "what is wrong is not timed"


def test_an_output_that_is_never_written_is_wrong() -> None:
    assert raced("unwritten")["unwritten"].state == "wrong"


def test_where_they_crash_together_each_is_timed_alone_and_it_is_said() -> None:
    found = raced("multiply", "crashes_in_company", cases=2)
    assert {one.state for one in found.values()} == {"ok"}
    assert all(ALONE in one.note and one.values["forward_seconds"] > 0 for one in found.values())


def test_one_that_dies_when_it_is_timed_does_not_take_the_others_figures() -> None:
    found = raced("multiply", "crashes_when_timed")
    assert found["multiply"].state == "ok" and found["multiply"].values["forward_seconds"] > 0
    assert found["crashes_when_timed"].state == "crashed"
    assert "right when it ran alone, then timed: SIGSEGV" in found["crashes_when_timed"].note


def test_one_that_hangs_is_told_and_given_up() -> None:
    found = raced("hangs", "multiply", seconds=8)
    assert found["hangs"].state == "crashed" and "timeout" in found["hangs"].note
    assert found["multiply"].state == "ok"


def test_an_implementation_that_does_not_exist_is_refused_by_name() -> None:
    assert chosen([SUITE, attention.SUITE], ["add", "reference"]) == {"doubling": ["add"], "attention": ["reference"]}
    with pytest.raises(UsageError, match="no implementation 'ad' in doubling, attention"):
        chosen([SUITE, attention.SUITE], ["add", "ad"])


def a_case(**more: Any) -> Case:
    sizes = {"batch": 2, "seq": 40, "heads": 4, "kv_heads": 2, "head_dim": 16}
    return {"dtype": "float32", **sizes, "causal": True, "varlen": False, **more}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_the_truth_is_what_autograd_finds_in_float64(causal: bool, varlen: bool, kv_heads: int) -> None:
    setting = attention.SUITE.setting(a_case(causal=causal, varlen=varlen, kv_heads=kv_heads), CPU, 3)
    truth, part = attention.SUITE.truth(setting)
    assert part == ""
    leaves = [one.detach().double().requires_grad_() for one in (setting.q, setting.k, setting.v)]
    q, k, v = (one.reshape(-1, *one.shape[-2:]) for one in leaves)
    k, v = (one.repeat_interleave(4 // kv_heads, 1) for one in (k, v))
    outs = []
    for a, b in setting.documents:
        allowed = torch.ones(b - a, b - a).tril().bool() if causal else None
        heads = (one[a:b].transpose(0, 1) for one in (q, k, v))
        outs.append(torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=allowed).transpose(0, 1))
    out = torch.cat(outs).reshape(setting.q.shape)
    grads = torch.autograd.grad(out, leaves, setting.grad.double())
    found = attention.SUITE.part(setting, dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True)))
    for name, true in truth.items():
        assert work.difference(found[name], true) < 1e-12, name


def test_a_large_case_is_compared_in_part_from_its_first_to_its_last_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = a_case(batch=3)
    whole = 3 * attention.truth_operations(40, 16, 4)
    monkeypatch.setattr(attention, "TRUTH_OPERATIONS", whole / 2)
    setting = attention.SUITE.setting(case, CPU, 0)
    pairs = setting.pairs()
    assert len(pairs) == 3 and pairs[0] == (80, 120, 1)
    truth, part = attention.SUITE.truth(setting)
    assert part == "3 of 6 documents × kv heads"
    assert truth["out"].numel() == attention.SUITE.part(setting, {"out": setting.q})["out"].numel()


def test_documents_fill_their_tokens_unevenly_and_are_the_same_each_time() -> None:
    offsets = attention.offsets_of(a_case(varlen=True, batch=2, seq=1024))
    lengths = {b - a for a, b in pairwise(offsets)}
    assert offsets[0] == 0 and offsets[-1] == 2048 and len(lengths) > 3 and min(lengths) > 0
    assert offsets == attention.offsets_of(a_case(varlen=True, batch=2, seq=1024, dtype="bfloat16"))
    assert attention.offsets_of(a_case(batch=3, seq=5)) == (0, 5, 10, 15)


def test_the_least_work_is_counted_from_the_definition() -> None:
    forward, backward = attention.SUITE.work(a_case(dtype="bfloat16", causal=False, kv_heads=4)).values()
    assert forward.operations == 2 * (2 * 2 * 4 * 40 * 40 * 16), "two products, a multiply-add is two"
    assert backward.operations == 2.5 * forward.operations
    tensor, row = 2 * 40 * 4 * 16 * 2, 2 * 40 * 4 * 4
    assert (forward.bytes, backward.bytes) == (4 * tensor + row, 8 * tensor + row)
    causal = attention.SUITE.work(a_case(dtype="bfloat16", kv_heads=4))["forward"]
    assert causal.operations == forward.operations / 2


def test_an_attention_with_a_wrong_scale_is_told_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def unscaled(setting: attention.Setting) -> tuple[attention.Forward, str]:
        q, k, v = (one.transpose(1, 2) for one in (setting.q, setting.k, setting.v))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True, scale=0.3).transpose(1, 2), ""

    monkeypatch.setattr(attention, "IMPLEMENTATIONS", {"unscaled": unscaled, "reference": attention.reference})
    task = {"suite": attention.SUITE.address, "case": a_case(), "seed": 0}
    found = {name: work.prove({**task, "implementation": name}, CPU) for name in attention.IMPLEMENTATIONS}
    assert found["reference"]["state"] == "ok", found["reference"]
    assert found["unscaled"]["state"] == "wrong" and found["unscaled"]["values"]["difference_out"] > 1e-2


def test_flash_attn_without_a_gpu_is_missing_with_the_reason() -> None:
    task = {"suite": attention.SUITE.address, "case": a_case(), "seed": 0, "implementation": "flash_attn"}
    assert work.prove(task, CPU) == {"state": "missing", "values": {}, "note": "flash_attn needs a GPU"}


def test_differences_see_shapes_zeros_and_nan() -> None:
    one = torch.ones(4)
    assert work.difference(2 * one, one) == 1 and work.difference(0 * one, 0 * one) == 0
    assert work.difference(one[:3], one) == float("inf")
    assert work.worst([1.0, float("nan"), 2.0]) != work.worst([1.0, 2.0]) == 2.0


def test_the_active_clock_is_the_one_with_a_star() -> None:
    assert card.dpm_levels("0: 500Mhz \n1: 2350Mhz *\nS: 19Mhz\n") == [(500.0, False), (2350.0, True), (19.0, False)]
    assert card.dpm_levels("") == []


def test_amdgpus_files_are_read_and_what_is_not_there_is_none(tmp_path: Any) -> None:
    (tmp_path / "pp_dpm_sclk").write_text("0: 500Mhz\n1: 2920Mhz *\n2: 3000Mhz\n")
    (tmp_path / "hwmon" / "hwmon3").mkdir(parents=True)
    (tmp_path / "hwmon" / "hwmon3" / "temp1_input").write_text("61000\n")
    known = {"sclk": 2920.0, "sclk_max": 3000.0, "temperature": 61.0}
    assert card.amd_state(tmp_path) == {**known, "mclk": None, "power": None}
    assert card.amd_state(None) == {}


def test_the_demo_runs_from_the_command_line_to_its_report(cli: Cli) -> None:
    arguments = ("run", "bench-attention", "--preset", "demo", "--engine", "local", "--json")
    result = cli(*arguments, "--set", "attention.kv_heads=[2]", "--set", "attention.dtypes=['bf16']")
    assert result.code == Exit.OK, result.err
    told = result.json
    states = {(one["implementation"], one["case"]["varlen"]): one["state"] for one in told["measurements"]}
    assert len(states) == 14, "every implementation is told in every case"
    assert states["reference", False] == states["reference", True] == states["sdpa_math", False] == "ok"
    assert states["flash_attn", False] == "missing"
    assert {"card", "floor", "timing"} <= set(told["facts"])
    assert told["facts"]["floor"]["bandwidth"] > 0 and told["facts"]["card"]["clocks"] == {
        "before": {},
        "loaded": {},
        "after": {},
    }
    line = r"bf16 b2 s96 h4/2 d32 causal \| reference \| diff fwd \S+ bwd \S+ \| \S+ ms fwd \S+ ms bwd \| (un)?stable"
    assert re.search(line, result.err)
    assert told["result"]["cases"] == 2 and told["result"]["wrong"] == 0
    again = cli("runs", "compare", "last", "last")
    assert again.code == Exit.OK and "0 worse, 0 better" in again.out
    if not torch.cuda.is_available():
        absent = cli(*arguments, "--set", "device=cuda")
        assert absent.code == Exit.MACHINE and "torch sees no GPU" in absent.error
    wrong = cli(*arguments, "--set", "implementations=['reference', 'typo']")
    assert wrong.code == Exit.USAGE and "no implementation 'typo'" in wrong.error
