"""What was measured on a card: kept whole, read as hostile text, and chosen by with the reason."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.catalog.load import read, resolve
from radeon_stack.cli.explain import lines
from radeon_stack.contracts.capabilities import VERDICTS, Answer, Part, Verdict, counts
from radeon_stack.errors import MachineError
from radeon_stack.host.choices import ATTENTION, EXPERTS, Choice, choices
from radeon_stack.host.known_issues import Mitigation, Setup
from radeon_stack.host.probes import MAX_BYTES, Found, Kept, Probe, Subject, key, load, save
from radeon_stack.launch.planner import plan
from radeon_stack.launch.probing import decided, keep_answers
from radeon_stack.runs import events as ev
from radeon_stack.runs.report import render
from radeon_stack.runs.store import Run, RunStore, State, Status
from radeon_stack.runs.view import LineView
from tests.conftest import Cli
from tests.stages import STAGES, build
from tests.unit.test_launch import circumstances, demo_plan, model_in

NOON = 1_795_521_600.0  # 2026-11-24 12:00 UTC
R9700: Subject = (("gfx", "gfx1201"), ("card", "AMD Radeon AI PRO R9700"), ("image", "sha256:" + "a" * 64))
GFX1201 = Setup(frozenset({"gfx1201"}), 1, rocm="7.1.1")
GFX1100 = Setup(frozenset({"gfx1100"}), 1, rocm="7.1.1")
CPU = Setup(frozenset(), 0)


def answer(question: str, forward: float = 1.0, backward: float = 2.0, verdict: Verdict = "works") -> Answer:
    """One that works, or whose backward does not."""
    good = verdict == "works"
    parts = (
        Part(name="forward", verdict="works", error=1e-3, milliseconds=forward),
        Part(name="backward", verdict=verdict, milliseconds=backward if good else None),
    )
    detail = {"works": "", "crashed": "backward: SIGSEGV"}.get(verdict, "backward: it does not")
    return Answer(question=question, verdict=verdict, detail=detail, seconds=1.0, parts=parts)


def probe(*answers: Answer, subject: Subject = R9700) -> Found:
    return Found(Probe(subject=dict(subject), answers=tuple(Kept(answer=a, run="r", asked=NOON) for a in answers)))


def chosen(found: Found, setup: Setup = GFX1201) -> dict[str, Choice]:
    return {choice.name: choice for choice in choices(found, setup)}


# What is kept


def test_answers_are_read_back_as_they_were_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "probes", R9700, [answer("sdpa.bf16.d128")], run="one", asked=NOON)
    assert path.name.startswith("gfx1201-amd-radeon-ai-pro-r9700-")
    found = load(tmp_path / "probes", R9700).probe
    assert found is not None and found.date() == "2026-11-24"
    assert found.asked("sdpa.") == {"bf16.d128": answer("sdpa.bf16.d128")}
    assert [path.name for path in (tmp_path / "probes").iterdir()] == [path.name]


def test_a_later_probe_replaces_the_answers_it_has_and_keeps_the_others(tmp_path: Path) -> None:
    save(tmp_path, R9700, [answer("a"), answer("b")], run="one", asked=NOON)
    left_out = Answer(question="a", verdict="not asked")
    save(tmp_path, R9700, [answer("b", verdict="crashed"), answer("c"), left_out], run="two", asked=NOON + 86400)
    found = load(tmp_path, R9700).probe
    assert found is not None and found.date() == "2026-11-25"
    assert {k.answer.question: (k.answer.verdict, k.run) for k in found.answers} == {
        "a": ("works", "one"),
        "b": ("crashed", "two"),
        "c": ("works", "two"),
    }


def test_a_probe_of_another_image_does_not_hold_and_is_told(tmp_path: Path) -> None:
    save(tmp_path, R9700, [answer("sdpa.bf16.d128")], run="one", asked=NOON)
    newer = (*R9700[:2], ("image", "sha256:" + "b" * 64))
    found = load(tmp_path, newer)
    assert found.probe is None
    assert found.why_not == "not probed: the probe of 2026-11-24 on this card was with another image"
    assert load(tmp_path, (("gfx", "gfx1100"), *R9700[1:])).why_not == "not probed"


def test_keys_differ_in_whatever_differs_and_are_names_of_files() -> None:
    variants = [R9700, R9700[:2], (*R9700[:2], ("image", "b")), (("gfx", "../.."), ("card", "/etc/é\n"), ("image", ""))]
    names = [key(subject) for subject in variants]
    assert len(set(names)) == len(names)
    assert all(name == os.path.basename(name) and name.isascii() and not name.startswith(".") for name in names)


def whole() -> dict[str, Any]:
    kept = Kept(answer=answer("sdpa.bf16.d128"), run="r", asked=NOON)
    made: dict[str, Any] = json.loads(Probe(subject=dict(R9700), answers=(kept,)).model_dump_json())
    return made


def damaged(**changes: Any) -> bytes:
    return json.dumps(whole() | changes).encode()


def damaged_answer(**changes: Any) -> bytes:
    made = whole()
    made["answers"][0]["answer"] |= changes
    return json.dumps(made).encode()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "Invalid JSON"),
        (b"\xff\xfe\x00", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON"),
        (b" " * (MAX_BYTES + 1), "over 1 MiB"),
        (damaged(version=2), "version"),
        (damaged(extra=1), "extra"),
        (damaged(subject={"gfx": 1201}), "subject.gfx"),
        (damaged(subject={"gfx": "gfx1201"}), "another card or image"),
        (damaged(answers=[whole()["answers"][0]] * 513), "answers"),
        (damaged_answer(verdict="splendid"), "verdict"),
        (damaged_answer(question="a b\x1b[2J"), "question"),
        (damaged_answer(seconds="1"), "seconds"),
        (damaged_answer(seconds=-1), "seconds"),
        (damaged_answer(detail="x" * 10_000), "detail"),
        (damaged_answer(parts=[{"name": "f", "verdict": "works", "milliseconds": float("nan")}]), "milliseconds"),
        (damaged_answer(parts=[{"name": "f", "verdict": "works"}] * 9), "parts"),
    ],
)
def test_a_file_that_is_not_ours_is_not_used_and_the_reason_is_told(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / f"{key(R9700)}.json").write_bytes(data)
    found = load(tmp_path, R9700)
    assert found.probe is None and "cannot be used" in found.why_not and says in found.why_not
    attention = chosen(found)["attention"]
    assert attention.value == "sdpa" and "radeon-stack run probe" in attention.why
    save(tmp_path, R9700, [answer("a")], run="one", asked=NOON)
    assert load(tmp_path, R9700).probe is not None


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{key(R9700)}.json")
    assert "no regular file" in load(tmp_path, R9700).why_not


@given(st.binary(max_size=400) | st.recursive(st.none() | st.text() | st.floats(), st.lists).map(repr).map(str.encode))
def test_no_file_is_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("probes")
    (folder / f"{key(R9700)}.json").write_bytes(data)
    assert load(folder, R9700).probe is None


# What is chosen

SDPA = answer("sdpa.bf16.d128", 0.81, 2.6)
FLASH = answer("flash_attn.bf16.d128", 0.7, 70.0)
EAGER = answer("eager.bf16.d128", 5.0, 9.0)


@pytest.mark.parametrize(
    ("answers", "value", "says"),
    [
        ([SDPA, FLASH, EAGER], "sdpa", "sdpa works, forward 0.81 ms, backward 2.6 ms (sdpa.bf16.d128)"),
        (
            [SDPA, answer("flash_attn.bf16.d128", verdict="crashed")],
            "sdpa",
            "flash_attn.bf16.d128 crashed (backward: SIG",
        ),
        ([SDPA, answer("flash_attn.bf16.d128", 0.4, 1.2)], "flash_attention_2", "flash_attention_2 works, forward 0.4"),
        ([SDPA, answer("flash_attn.bf16.d128", 0.8, 2.5)], "sdpa", "flash_attention_2 works, forward 0.8"),
        (
            [SDPA, answer("flash_attn.bf16.d128", 0.1, 0.1), answer("flash_attn.fp16.d256", verdict="wrong")],
            "sdpa",
            "wrong",
        ),
        ([answer("sdpa.bf16.d128", verdict="crashed"), FLASH, EAGER], "eager", "sdpa: sdpa.bf16.d128 crashed"),
        ([answer("sdpa.bf16.d128", verdict="timed out"), FLASH], "flash_attention_2", "timed out"),
        ([answer("sdpa.bf16.d128", verdict="wrong")], "", "sdpa.bf16.d128 wrong"),
        ([EAGER], "sdpa", "were not asked"),
    ],
)
def test_the_fastest_attention_that_works_is_taken(answers: list[Answer], value: str, says: str) -> None:
    attention = chosen(probe(*answers))["attention"]
    assert attention.value == value and says in attention.why


def test_the_reason_is_the_measurement_with_its_date_and_kernels() -> None:
    crashed = answer("flash_attn.bf16.d128", verdict="crashed")
    found = chosen(
        probe(SDPA, crashed, answer("sdpa_flash.bf16.d64"), answer("sdpa_efficient.bf16.d64", verdict="failed"))
    )
    assert found["attention"].why == (
        "probe of 2026-11-24 on this card and image: sdpa works, forward 0.81 ms, backward 2.6 ms (sdpa.bf16.d128); "
        "flash_attention_2: flash_attn.bf16.d128 crashed (backward: SIGSEGV); its flash kernel works"
    )
    none = chosen(probe(SDPA, answer("sdpa_flash.bf16.d64", verdict="failed")))
    assert none["attention"].why.endswith("none of its fused kernels works: memory grows with the square of the length")


def test_on_a_cpu_times_decide_nothing_and_there_is_no_blas_to_choose() -> None:
    found = chosen(probe(SDPA, answer("eager.bf16.d128", 0.1, 0.1)), CPU)
    assert found["attention"].value == "sdpa" and "blas" not in found


def test_without_a_probe_everything_is_as_it_always_was() -> None:
    found = chosen(Found(None, "not probed"), GFX1100)
    assert {name: choice.value for name, choice in found.items()} == {
        "attention": "sdpa",
        "experts": "grouped_mm",
        "blas": "default",
    }
    assert all(choice.why == "not probed: radeon-stack run probe" and not choice.env for choice in found.values())


def test_grouped_mm_that_is_known_to_crash_is_not_the_default_until_it_was_seen_to_work() -> None:
    assert chosen(Found(None, "not probed"))["experts"].value == "eager"
    assert "RS-KI-006" in chosen(Found(None, "not probed"))["experts"].why
    fast, slow = answer("experts.grouped_mm", 1, 2), answer("experts.eager", 10, 20)
    assert chosen(probe(fast, slow))["experts"].value == "grouped_mm"
    assert chosen(probe(answer("experts.grouped_mm", verdict="crashed"), slow))["experts"].value == "eager"


def blas_of(setup: Setup, lt: Answer, plain: Answer) -> Choice:
    return chosen(probe(lt, plain), setup)["blas"]


def test_hipblaslt_is_turned_off_where_it_fails_or_is_slow_and_never_on_on_gfx12() -> None:
    slow, fast, crashed = (
        answer("lora_lt.r8", 9, 9),
        answer("lora_lt.r8", 0.1, 0.1),
        answer("lora_lt.r8", verdict="crashed"),
    )
    plain = answer("lora_blas.r8", 1, 1)
    off = blas_of(GFX1201, crashed, plain)
    assert off.value == "rocblas" and off.env["ROCBLAS_USE_HIPBLASLT"] == "0" == off.env["TORCH_BLAS_PREFER_HIPBLASLT"]
    assert "hipBLASLt: lora_lt.r8 crashed (backward: SIGSEGV)" in off.why
    assert blas_of(GFX1100, slow, plain).env["TORCH_BLAS_PREFER_HIPBLASLT"] == "0"
    assert blas_of(GFX1100, fast, plain).env == {"TORCH_BLAS_PREFER_HIPBLASLT": "1"}
    quick = blas_of(GFX1201, fast, plain)
    assert (quick.value, quick.env) == ("default", {}) and "a pass does not clear it" in quick.why
    assert blas_of(GFX1201, fast, answer("lora_blas.r8", verdict="wrong")).env == {}
    assert blas_of(GFX1100, Answer(question="lora_lt.r8", verdict="missing"), plain).env == {}


@st.composite
def any_answers(draw: st.DrawFn) -> list[Answer]:
    prefixes = [*ATTENTION.values(), *EXPERTS.values(), "lora_lt.", "lora_blas."]
    names = [p + s if p.endswith(".") else p for p in prefixes for s in ("bf16.d128", "fp16.d64")]
    times = st.floats(0, 1e6)
    taken = draw(st.lists(st.sampled_from(names), unique=True))
    return [answer(name, draw(times), draw(times), draw(st.sampled_from(VERDICTS))) for name in taken]


@given(any_answers(), st.sampled_from([CPU, GFX1100, GFX1201]))
def test_what_did_not_work_is_never_chosen(answers: list[Answer], setup: Setup) -> None:
    found = chosen(probe(*answers), setup)
    bad = {a.question for a in answers if a.verdict != "works"}
    for name, candidates in (("attention", ATTENTION), ("experts", EXPERTS)):
        value = found[name].value
        if value:
            assert not [question for question in bad if question.startswith(candidates[value])]
    if "blas" in found:
        used = {"hipblaslt": "lora_lt.", "rocblas": "lora_blas."}.get(found["blas"].value, "-")
        assert not [question for question in bad if question.startswith(used)]


# How a choice comes into a run


def test_auto_is_replaced_before_the_run_and_what_was_asked_for_is_not() -> None:
    recipe = resolve(read("train-llama"), "demo")
    found = probe(SDPA, answer("flash_attn.bf16.d128", 0.4, 1.2))
    made, taken = decided(recipe, found, GFX1201)
    assert made.tree()["config"]["model_options"] == {"attention": "flash_attention_2"}
    assert made.origin["config.model_options.attention"].startswith("chosen: probe of 2026-11-24")
    assert [choice.name for choice in taken] == ["attention", "blas"]
    own, kept = decided(resolve(read("train-llama"), "demo", ["model_options.attention=eager"]), found, GFX1201)
    assert own.tree()["config"]["model_options"] == {"attention": "eager"}
    assert kept[0] == Choice("attention", "eager", "asked for (--set model_options.attention)")
    probing = resolve(read("probe"), "demo")
    assert decided(probing, found, GFX1201) == (probing, ())


def test_a_card_on_which_no_attention_works_is_told_with_the_way_out() -> None:
    with pytest.raises(MachineError, match=r"config\.model_options\.attention: nothing works.*--set model_options\."):
        decided(resolve(read("train-llama"), "demo"), probe(answer("sdpa.bf16.d128", verdict="wrong")), GFX1201)


def test_explain_has_each_choice_with_its_measurement_and_its_variables(tmp_path: Path) -> None:
    off = blas_of(GFX1201, answer("lora_lt.r8", verdict="crashed"), answer("lora_blas.r8"))
    here = replace(circumstances(), choices=(Choice("attention", "sdpa", "probe of 2026-11-24: it works"), off))
    made = plan(
        resolve(read("train-llama"), "demo", ["env.DISABLE_ADDMM_HIP_LT='0'"]),
        replace(here, subject=R9700),
        run_id="20260101-000000-train-llama-abcd",
        run_dir=tmp_path / "run",
        cache=tmp_path / "cache",
    )
    said = "\n".join(lines(made))
    assert "    attention=sdpa: probe of 2026-11-24: it works\n    blas=rocblas: probe of 2026-11-24" in said
    assert "TORCH_BLAS_PREFER_HIPBLASLT=0: blas=rocblas was chosen" in said
    assert dict(made.env)["DISABLE_ADDMM_HIP_LT"] == "0"  # the recipe's own goes before
    assert "card=AMD Radeon AI PRO R9700" in said


def test_a_known_fault_is_not_outvoted_by_a_probe_that_did_not_meet_it(tmp_path: Path) -> None:
    known = Mitigation("RS-KI-001", {"TORCH_BLAS_PREFER_HIPBLASLT": "0"}, "it reads past small matrices")
    on = Choice("blas", "hipblaslt", "probe of 2026-11-24: faster", {"TORCH_BLAS_PREFER_HIPBLASLT": "1"})
    made = plan(
        resolve(read("train-llama"), "demo"),
        circumstances(mitigations=(known,), choices=(on,)),
        run_id="20260101-000000-train-llama-abcd",
        run_dir=tmp_path / "run",
        cache=tmp_path / "cache",
    )
    assert dict(made.env)["TORCH_BLAS_PREFER_HIPBLASLT"] == "0"
    assert made.reasons["env.TORCH_BLAS_PREFER_HIPBLASLT"].startswith("RS-KI-001")


def test_a_run_on_a_radeon_is_explained_by_its_probe_and_not_by_another_images(
    cli: Cli, home: Path, tmp_path: Path
) -> None:
    tree = build(STAGES["r9700"], tmp_path)
    model = model_in(tmp_path / "m", "config.json", "tokenizer.json", "model.safetensors")
    words = ("explain", "train-llama", "--model", model, "--engine", "local", "--sysroot", tree)
    first = cli(*words, "--json")
    if "lacks" in first.err:
        pytest.skip("this Python lacks the packages of the extra 'work': make setup")
    subject = tuple((name, value) for name, value in first.json["fields"]["subject"]["value"])
    assert subject[0] == ("gfx", "gfx1201")
    crashed = answer("flash_attn.bf16.d128", verdict="crashed")
    other = tuple((name, "2.0" if name == "torch" else value) for name, value in subject)
    save(home / "probes", other, [SDPA, crashed], run="r", asked=NOON)
    stale = "attention=sdpa: not probed: the probe of 2026-11-24 on this card was with another torch, Triton or ROCm"
    assert stale in cli(*words).out
    slow, quick = answer("lora_lt.r8", verdict="crashed"), answer("lora_blas.r8")
    save(home / "probes", subject, [SDPA, crashed, slow, quick], run="r", asked=NOON)
    said = cli(*words).out
    assert "attention=sdpa: probe of 2026-11-24 on this card and these packages: sdpa works, forward 0.81 ms" in said
    assert "flash_attn.bf16.d128 crashed (backward: SIGSEGV)" in said
    assert "blas=rocblas: probe of 2026-11-24" in said and "ROCBLAS_USE_HIPBLASLT=0: RS-KI-001" in said


# How a probe's end is recorded


def ended(home: Path, *, recipe: str = "capabilities") -> Run:
    run = RunStore(home).new("probe")
    run.artifacts.mkdir(parents=True)
    record = replace(demo_plan(home), subject=R9700).as_record()
    run.plan.write_text(json.dumps(record))
    run.config.write_text(json.dumps({"recipe": {"workload": recipe}}))
    write = ev.EventWriter(run.events)
    write(ev.Answered(answer=SDPA))
    write(ev.Answered(answer=answer("flash_attn.bf16.d128", verdict="crashed")))
    run.write_status(Status(state=State.DONE, recipe="probe", engine="local", started=1.0, ended=2.0, exit_code=0))
    return run


def test_answers_are_kept_by_the_host_for_the_subject_of_the_plan(tmp_path: Path) -> None:
    run = ended(tmp_path)
    keep_answers(run)
    found = load(tmp_path / "probes", R9700).probe
    assert found is not None and {kept.run for kept in found.answers} == {run.id}


def test_another_workload_cannot_slip_answers_in(tmp_path: Path) -> None:
    keep_answers(ended(tmp_path, recipe="finetune"))
    assert not (tmp_path / "probes").exists()


def test_answers_that_cannot_be_kept_are_told(tmp_path: Path) -> None:
    run = ended(tmp_path)
    (tmp_path / "probes").write_text("in the way")
    with pytest.raises(MachineError, match="cannot write there"):
        keep_answers(run)


def test_the_report_and_the_lines_have_every_answer_made_harmless(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    run = ended(tmp_path)
    nasty = Answer(question="x", verdict="failed", detail="<script>\x1b[2J\n" + "y" * 500)
    ev.EventWriter(run.events)(ev.Answered(answer=nasty))
    page = render(run)
    assert "3 questions: 1 works, 1 crashed, 1 failed." in page and "forward 0.81 ms, backward 2.6 ms" in page
    assert "<script>" not in page
    with LineView(sys.stdout) as view:
        view(ev.Answered(answer=nasty))
    (line,) = capsys.readouterr().out.splitlines()
    assert "\x1b" not in line and len(line) <= 200


def test_counts_are_in_the_order_of_what_one_wants_to_know() -> None:
    answers = [answer("a", verdict="missing"), answer("b", verdict="crashed"), answer("c")]
    assert list(counts(answers).items()) == [("works", 1), ("crashed", 1), ("missing", 1)]


def test_on_gfx12_a_soak_is_asked_for_and_then_cited() -> None:
    products = [answer(f"{name}.r{rank}") for name in ("lora_lt", "lora_blas") for rank in (8, 16)]
    without = chosen(probe(*products), GFX1201)["blas"]
    assert "radeon-stack run soak-lora" in without.why
    soaked = chosen(probe(*products, answer("soak.lora.full", verdict="crashed")), GFX1201)["blas"]
    assert "soak full: crashed (backward: SIGSEGV)" in soaked.why and "run soak-lora" not in soaked.why
    assert "soak" not in chosen(probe(*products), GFX1100)["blas"].why
