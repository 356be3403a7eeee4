"""Questions about a card: however one ends, it is told, and the next one is answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from radeon_stack.contracts.capabilities import Answer
from radeon_stack.errors import Exit, UsageError
from radeon_stack.host.processes import Process
from radeon_stack.runs.events import Answered, read_events
from radeon_stack.runs.store import RunStore
from radeon_stack.workloads.capabilities.about import unanswerable
from radeon_stack.workloads.capabilities.asking import answers
from radeon_stack.workloads.capabilities.questions import all_questions, chosen
from radeon_stack.workloads.capabilities.steps import Question
from tests.conftest import ROOT, Cli, wait_for

pytestmark = pytest.mark.work
LOCAL = ("--engine", "local")


def odd(name: str, **arguments: str) -> Question:
    return Question(name, f"tests.work.odd_questions:{name}", arguments, imports=())


def asked(*questions: Question, seconds: int = 60) -> dict[str, Answer]:
    return {answer.question: answer for answer in answers(questions, seconds=seconds, seed=0)}


def gone(pid: int) -> bool:
    process = Process.of(pid)
    return process is None or not process.alive


@pytest.mark.parametrize(
    ("name", "verdict", "says"),
    [
        ("fine", "works", ""),
        ("segfault", "crashed", "backward: SIGSEGV"),
        ("wrong", "wrong", "forward: off by 0.5, 0.01 is right"),
        ("not_finite", "wrong", "forward: not finite where it should be"),
        ("refused", "failed", "forward: RuntimeError: No available kernel. Aborting execution."),
        ("nothing", "missing", "a second GPU"),
        ("gpu_fault", "crashed", "forward: SIGABRT: Memory access fault by GPU node-1"),
        ("quits", "crashed", "forward: exit code 3"),
        ("noisy", "works", ""),
        ("talkative", "works", ""),
    ],
)
def test_however_a_question_ends_its_answer_says_how(name: str, verdict: str, says: str) -> None:
    answer = asked(odd(name))[name]
    assert answer.verdict == verdict
    assert answer.detail.startswith(says) and bool(answer.detail) == bool(says)


def test_a_crash_in_the_backward_keeps_what_the_forward_measured_and_the_next_question_is_asked() -> None:
    found = asked(odd("segfault"), odd("fine"))
    forward, backward = found["segfault"].parts
    assert (forward.name, forward.verdict, forward.milliseconds) == ("forward", "works", 0.5)
    assert (backward.name, backward.verdict) == ("backward", "crashed")
    assert found["fine"].verdict == "works" and found["fine"].milliseconds() == {"forward": 0.5, "backward": 1.5}


def test_what_hangs_is_ended_in_time_with_all_that_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    answer = asked(odd("hang", pids=str(pids)), odd("fine"), seconds=3)
    assert (answer["hang"].verdict, answer["hang"].detail) == ("timed out", "copy: no answer in 3 s")
    assert answer["fine"].verdict == "works"
    for pid in map(int, pids.read_text().split()):
        wait_for(partial(gone, pid), what=f"the end of {pid}", seconds=10)


def test_an_answer_that_was_wrong_in_one_step_still_has_the_others() -> None:
    parts = asked(odd("wrong"))["wrong"].parts
    assert [part.verdict for part in parts] == ["wrong", "works"]


@pytest.mark.parametrize(("fault", "verdict"), [("gpu_fault", "crashed"), ("illegal_access", "failed")])
def test_after_a_gpu_fault_nothing_more_is_asked(fault: str, verdict: str) -> None:
    found = asked(odd("fine"), odd(fault), odd("segfault"), odd("wrong"), odd("noisy"))
    assert [answer.verdict for answer in found.values()] == ["works", verdict, *["not asked"] * 3]
    assert "reboot" in found["noisy"].detail


def test_a_package_that_cannot_be_imported_is_an_answer() -> None:
    broken = Question("broken", "tests.work.odd_questions:fine", imports=("no_such_package_here",))
    assert asked(broken)["broken"].detail.startswith("import: ModuleNotFoundError")
    assert asked(Question("gone", "tests.work.odd_questions:gone", imports=()))["gone"].verdict == "failed"


def test_nobody_who_stops_listening_leaves_children_behind() -> None:
    mine = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before = set(mine.read_text().split())  # other tests' own, a tracker of multiprocessing's say
    listening = answers([odd("fine"), odd("segfault"), odd("wrong")], seconds=60, seed=0, ahead=3)
    next(listening)
    assert set(mine.read_text().split()) - before
    listening.close()  # type: ignore[attr-defined]
    assert not set(mine.read_text().split()) - before


def test_every_question_has_a_name_of_its_own_that_an_answer_may_have() -> None:
    names = [question.name for question in all_questions()]
    assert len(names) == len(set(names)) > 50
    for name in names:
        Answer(question=name, verdict="works")


def test_questions_are_chosen_by_names_and_patterns_in_their_own_order() -> None:
    found = [question.name for question in chosen(["all_reduce", "sdpa.bf16.*"])]
    assert found == ["sdpa.bf16.d64", "sdpa.bf16.d128", "sdpa.bf16.d256", "all_reduce"]
    with pytest.raises(UsageError, match=r"no question 'sdpa\.bf16\.d65'; did you mean 'sdpa\.bf16\.d64'"):
        chosen(["sdpa.bf16.d65"])


def test_copies_between_cards_that_have_hung_hosts_are_asked_by_name_only() -> None:
    copies = chosen(["peer_copies"])[0]
    r9700s = {"gpus": 2, "gfx": "gfx1201", "hip": "7.1"}
    refused = unanswerable(copies, r9700s, named=False)
    assert refused is not None and refused.verdict == "not asked" and "RS-KI-004" in refused.detail
    assert unanswerable(copies, r9700s, named=True) is None
    assert unanswerable(copies, {**r9700s, "gfx": "gfx942"}, named=False) is None


def test_one_wrong_row_among_thousands_shows_and_so_does_nan() -> None:
    import torch

    from radeon_stack.workloads.capabilities.measure import tolerance, worst_row

    right = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).double()
    rounded = right.to(torch.bfloat16)
    assert worst_row(rounded, right) < tolerance(torch.bfloat16) / 4
    swapped = rounded.clone()
    swapped[17] = rounded[18]
    assert worst_row(swapped, right) > tolerance(torch.bfloat16)
    rounded[17, 3] = torch.nan
    assert not worst_row(rounded, right) <= tolerance(torch.bfloat16)


def test_the_8_bit_formats_are_as_their_definitions_say() -> None:
    import torch

    from radeon_stack.workloads.capabilities.fp8 import FORMATS, decoded, nearest

    largest = {"e4m3fn": 448, "e5m2": 57344, "e4m3fnuz": 240, "e5m2fnuz": 57344}
    for name in FORMATS:
        values = decoded(name)
        finite = values[values.isfinite()]
        assert float(finite.max()) == largest[name]
        # 1.0625 lies between 1 and 1.125: to the even code. A cast that cuts would give 1 for 1.1, too.
        if name.startswith("e4m3"):
            assert nearest(torch.tensor([1.0625, 1.1, 1.1875]), values).tolist() == [1.0, 1.125, 1.25]


def test_a_wrong_kernel_is_found_out_by_the_real_question(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from radeon_stack.workloads.capabilities.answering import carried_out
    from radeon_stack.workloads.capabilities.attention import attention

    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, is_causal: real(q, k, v, is_causal=False)
    )
    told = [carried_out(step) for step in attention(0, "sdpa", "bf16", 64)]
    assert [part["verdict"] for part in told] == ["wrong", "wrong"]


def test_the_probe_answers_keeps_its_answers_and_a_run_cites_them(cli: Cli, home: Path, tmp_path: Path) -> None:
    before = cli("explain", "train-llama", "--preset", "demo", *LOCAL)
    assert "attention=sdpa: not probed: radeon-stack run probe" in before.out
    done = cli("run", "probe", "--preset", "demo", *LOCAL, "--json", cwd=tmp_path)
    assert done.code == Exit.OK, done.err
    told = done.json
    verdicts = {answer["question"]: answer["verdict"] for answer in told["answers"]}
    missing = {name for name, verdict in verdicts.items() if verdict == "missing"}
    assert missing == {"sdpa_flash.bf16.d64", "triton.add", "lora_lt.r8"}
    assert {verdict for name, verdict in verdicts.items() if name not in missing} == {"works"}
    assert told["result"]["works"] == len(verdicts) - 3 and told["result"]["asked"] == len(verdicts)
    attention = next(answer for answer in told["answers"] if answer["question"] == "sdpa.bf16.d64")
    assert [part["name"] for part in attention["parts"]] == ["forward", "backward"]
    assert all(part["error"] < part["tolerance"] for part in attention["parts"])
    assert any(line.startswith("all_reduce ") and " works " in line for line in done.err.splitlines())

    (kept,) = (home / "probes").iterdir()
    assert {one["run"] for one in json.loads(kept.read_text())["answers"]} == {told["run"]}
    report = Path(told["report"]).read_text()
    assert "What works on this card" in report and "<code>lora_blas.r8</code>" in report
    after = cli("explain", "train-llama", "--preset", "demo", *LOCAL).out
    assert "attention=sdpa: probe of " in after and "on this card and these packages: sdpa works, forward " in after


def test_a_question_that_there_is_not_is_a_mistake_in_the_recipe(cli: Cli) -> None:
    result = cli("run", "probe", "--preset", "demo", *LOCAL, "--set", 'questions=["sdpaa.bf16.d64"]')
    assert result.code == Exit.USAGE
    assert "config.questions: no question 'sdpaa.bf16.d64'; did you mean 'sdpa.bf16.d64'" in result.error


def test_a_probe_that_is_stopped_keeps_what_was_answered_and_leaves_no_process(cli: Cli, home: Path) -> None:
    begun = cli("run", "probe", *LOCAL, "--detach", "--set", "resources.gpus.min=0", "--set", "resources.gpus.max=0")
    assert begun.code == Exit.OK, begun.err
    run = RunStore(home).find(begun.out.strip().splitlines()[-1])

    def first() -> bool:
        return any(isinstance(e, Answered) and e.answer.verdict == "works" for e in read_events(run.events))

    wait_for(first, what="an answer")
    assert cli("runs", "stop", "last").out.startswith("stopped")
    (kept,) = (home / "probes").iterdir()
    assert json.loads(kept.read_text())["answers"]
    asking = subprocess.run(["pgrep", "-f", f"capabilities --run {run.path}"], capture_output=True, check=False)
    assert not asking.stdout


def test_it_runs_with_nothing_but_what_an_image_has_of_us(tmp_path: Path) -> None:
    from radeon_stack.images.render import package_files

    for name, data in package_files().items():
        (tmp_path / "radeon_stack" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "radeon_stack" / name).write_bytes(data)
    module = [sys.executable, "-m", "radeon_stack.workloads.capabilities", "--print", "--questions", "fp8.e5m2"]
    done = subprocess.run(module, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == Exit.OK and "fp8.e5m2" in done.stdout, done.stderr


def test_by_hand_it_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    module = [sys.executable, "-m", "radeon_stack.workloads.capabilities", "--print"]
    out = tmp_path / "probe.json"
    done = subprocess.run(
        [*module, "--questions", "fp8.e5m2,grouped_mm", "--out", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == Exit.OK, done.stderr
    assert done.stdout.splitlines()[-1].startswith("2 works in ")
    record = json.loads(out.read_text())
    assert [answer["question"] for answer in record["answers"]] == ["grouped_mm", "fp8.e5m2"]
    assert record["environment"]["device"] == "cpu"


def test_the_attention_that_is_asked_for_is_trained_with(cli: Cli, tiny_run: tuple[str, ...]) -> None:
    """Where nobody asks it is sdpa: tests/work/test_runs.py."""
    short = [*tiny_run, *LOCAL, "--set", "train.steps=2", "--set", "samples.count=0", "--set", "export.merge=false"]
    asked_for = cli(*short, "--set", "model_options.attention=eager")
    assert asked_for.code == Exit.OK and asked_for.json["facts"]["model"]["attention"] == "eager"


def test_a_soak_is_asked_by_name_only_trains_and_is_kept_for_the_card(cli: Cli, home: Path) -> None:
    told = cli("run", "soak-lora", "--preset", "demo", "--json", *LOCAL).json
    (answer,) = told["answers"]
    assert (answer["question"], answer["verdict"]) == ("soak.lora.quick", "works")
    assert [part["name"] for part in answer["parts"]] == ["load", "train"]
    assert "12 steps of rank 16, loss" in answer["parts"][1]["detail"]
    (kept,) = (home / "probes").glob("*.json")
    assert [one["answer"]["question"] for one in json.loads(kept.read_text())["answers"]] == ["soak.lora.quick"]
    questions = chosen("all")
    long = [q for q in questions if q.long]
    without = [unanswerable(q, {"hip": None, "gpus": 1, "gfx": "gfx1201"}, False) for q in long]
    assert len(long) == 3 and {answer.verdict for answer in without if answer} == {"not asked"}


def test_a_soak_whose_loss_is_not_finite_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from radeon_stack.workloads.capabilities import soak
    from radeon_stack.workloads.capabilities.answering import carried_out

    monkeypatch.setattr(soak, "_losses", lambda model, seed: iter([5.0, float("nan")]))
    load, train = soak.lora(0, rank=16, minutes=0, share=50)
    assert carried_out(load)["verdict"] == "works"
    assert carried_out(train)["detail"] == "RuntimeError: the loss of step 2 is nan"


def test_a_soak_that_learns_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from radeon_stack.workloads.capabilities import soak
    from radeon_stack.workloads.capabilities.answering import carried_out

    monkeypatch.setattr(soak, "_losses", lambda model, seed: iter([5.0 + step / 100 for step in range(40)]))
    load, train = soak.lora(0, rank=16, minutes=0, share=50)
    carried_out(load)
    assert carried_out(train)["verdict"] == "wrong"
