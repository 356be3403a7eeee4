"""Whole runs through the local engine: killed, resumed, stopped, detached, and given bad input."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.checksums import require_sums
from radeon_stack.errors import Exit
from radeon_stack.host.processes import Process
from radeon_stack.runs import events as ev
from radeon_stack.runs.store import Run, RunStore, State
from tests.conftest import Cli, Result, wait_for
from tests.work.test_architectures import small_model

pytestmark = pytest.mark.work
LOCAL = ("--engine", "local")


def losses(told: Any) -> dict[int, float]:
    return {metric["step"]: metric["loss"] for metric in told["metrics"] if "loss" in metric}


def started(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """`radeon-stack …` in the background, attached."""
    return subprocess.Popen(
        [sys.executable, "-m", "radeon_stack", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def the_run(home: Path) -> Run:
    return wait_for(lambda: next(iter(RunStore(home)), None), what="the run's directory")


def step_reached(run: Run, step: int) -> bool:
    return any(isinstance(event, ev.Metric) and event.step >= step for event in ev.read_events(run.events))


def workload(run: Run) -> Process:
    def known() -> Process | None:
        status = run.status()
        handle = status.handle if status else {}
        return Process(int(str(handle["pid"])), int(str(handle["started"]))) if handle else None

    return wait_for(known, what="the workload's handle")


@pytest.fixture(scope="module")
def whole(cli: Cli, tiny_run: tuple[str, ...], shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The tiny run from its beginning to its end, in a home of its own: to be looked at."""
    home = tmp_path_factory.mktemp("whole")
    (home / "cache").symlink_to(shared_cache)
    result = cli(*tiny_run, *LOCAL, cwd=home, env={**os.environ, "RADEON_STACK_HOME": str(home)})
    assert result.code == Exit.OK, result.err
    return result


def test_a_run_ends_with_report_adapter_and_a_merged_model_that_transformers_loads(whole: Result) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    told = whole.json
    assert told["state"] == "done" and list(losses(told)) == list(range(1, 13))
    assert {"environment", "data", "prompt", "model", "train_arguments", "trainer_output", "merge"} <= set(
        told["facts"]
    )
    assert {phase: len(samples) for phase, samples in told["samples"].items()} == {"before": 2, "after": 2, "merged": 2}
    layer = "model.layers.0.self_attn.q_proj"
    assert told["facts"]["lora_before"][layer]["B"]["std"] == 0 < told["facts"]["lora_after"][layer]["B"]["std"]
    assert told["facts"]["merge"] == told["facts"]["merge"] | {"targeted": 14, "changed": 14}
    assert AutoModelForCausalLM.from_pretrained(told["artifacts"]["merged"]).config.num_hidden_layers == 2
    assert all(require_sums(Path(told["artifacts"][name])) for name in ("adapter", "merged"))
    record = json.loads(Path(told["artifacts"]["adapter"], "radeon-stack.json").read_text())
    assert record["base"]["model"] == "tiny-llama" and told["facts"]["merge"]["base"] == "the adapter's"
    assert Path(told["report"]).stat().st_size > 10_000
    if not torch.cuda.is_available():
        assert told["facts"]["liger"] == "off (no GPU)"
        assert "off (no GPU)" in Path(told["report"]).read_text()
    assert told["facts"]["model"]["attention"] == "sdpa"
    plain = [line for line in whole.err.splitlines() if line.startswith("step ")]
    assert len(plain) == 12 and re.match(r"step 12/12  loss \d", plain[-1])


def test_killed_at_a_random_step_and_resumed_the_loss_curve_is_the_uninterrupted_one(
    cli: Cli, tiny_run: tuple[str, ...], whole: Result, home: Path
) -> None:
    killed_and_resumed(cli, tiny_run, losses(whole.json), home)


def test_so_is_the_one_of_packed_experts_and_their_adapters(
    cli: Cli, tiny_run: tuple[str, ...], tiny_model: Path, home: Path, tmp_path: Path
) -> None:
    model = small_model("Qwen3MoeForCausalLM", tmp_path / "model", tiny_model, num_experts=64)
    words = ["train-qwen-moe" if word == "train-llama" else word for word in tiny_run]
    run_it = [str(model) if word == str(tiny_model) else word for word in words]
    whole = cli(*run_it, *LOCAL)
    assert whole.code == Exit.OK, whole.err
    assert whole.json["facts"]["model"]["experts"] == "radeon_nf4"
    assert cli("runs", "rm", "last").code == 0
    killed_and_resumed(cli, run_it, losses(whole.json), home)


def killed_and_resumed(cli: Cli, run_it: Sequence[str], expected: dict[int, float], home: Path) -> None:
    """The run is killed at a random step, and its losses and those after a resume are the expected ones."""
    step = random.randint(1, 11)
    attached = started([*run_it, *LOCAL])
    run = the_run(home)
    process = workload(run)
    wait_for(lambda: step_reached(run, step), what=f"step {step}")
    os.kill(process.pid, signal.SIGKILL)
    out, err = attached.communicate(timeout=60)
    assert attached.returncode == Exit.WORKLOAD
    assert "killed (SIGKILL)" in err and json.loads(out)["state"] == "failed"

    resumed = cli("run", "--resume", "last", "--json")
    assert resumed.code == Exit.OK, resumed.err
    assert resumed.json["run"] == run.id
    found = losses(resumed.json)
    assert found.keys() == expected.keys()
    for at, loss in expected.items():
        assert abs(found[at] - loss) <= 1e-6 * loss, f"killed at step {step}: loss of step {at}"
    assert resumed.json["result"]["correct_before"] == 0  # told by the first attempt
    begun = [event.resumed_step for event in ev.read_events(run.events) if isinstance(event, ev.Attempt)]
    assert begun[0] is None
    # The last checkpoint before the kill, or the one before that if the kill fell into its writing.
    assert (begun[1] or 0) >= 3 * (step // 3) - 3 and (begun[1] or 0) % 3 == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_save_write_the_last_event_and_leave_no_process(
    tiny_run: tuple[str, ...], home: Path, number: signal.Signals
) -> None:
    attached = started([*tiny_run, *LOCAL, "--set", "train.steps=500"])
    run = the_run(home)
    process = workload(run)
    wait_for(lambda: step_reached(run, 4), what="step 4")
    attached.send_signal(number)
    out, err = attached.communicate(timeout=120)
    assert attached.returncode == Exit.INTERRUPTED, err
    told = json.loads(out)
    assert told["state"] == "stopped" and "saved at step" in told["error"]["what"]
    last = ev.read_events(run.events)[-1]
    assert isinstance(last, ev.Stopped) and last.step is not None
    assert [path.name for path in (run.artifacts / "checkpoints").iterdir()] == [f"step-{last.step}"]
    assert not process.alive


def test_ctrl_c_while_loading_stops_at_once(tiny_run: tuple[str, ...], home: Path) -> None:
    attached = started([*tiny_run, *LOCAL])
    run = the_run(home)
    wait_for(lambda: any(event.kind == "attempt" for event in ev.read_events(run.events)), what="the first event")
    attached.send_signal(signal.SIGINT)
    attached.communicate(timeout=60)
    assert attached.returncode == Exit.INTERRUPTED
    assert not workload(run).alive


def test_a_run_whose_reader_goes_away_is_kept_to_its_end(tiny_run: tuple[str, ...], home: Path) -> None:
    words = [word for word in tiny_run if word != "--json"]
    attached = started([*words, *LOCAL, "--set", "expect.final_loss_max=1e-6", "--set", "train.steps=2"])
    assert attached.stdout is not None and attached.stderr is not None
    attached.stdout.readline()
    attached.stdout.close()
    err = attached.stderr.read()
    assert attached.wait() == Exit.CHECK, err  # the run's own
    status = the_run(home).status()
    assert status is not None and status.state is State.FAILED
    assert "Broken pipe" not in err and "BrokenPipe" not in err
    assert err.splitlines()[-1].startswith("radeon-stack: expect.final_loss_max")


def test_a_detached_run_is_watched_from_its_beginning_and_stopped(
    cli: Cli, tiny_run: tuple[str, ...], home: Path
) -> None:
    begun = cli(*tiny_run, *LOCAL, "--detach", "--set", "train.steps=500")
    assert begun.code == Exit.OK
    run = RunStore(home).find(begun.json["run"])
    assert run.id not in begun.err  # it is told once
    wait_for(lambda: step_reached(run, 3), what="step 3")
    assert cli("runs", "list", "--json").json[0]["state"] == "running"
    assert cli("runs", "rm", "last").code == Exit.USAGE
    watching = started(["runs", "attach", "last", "--json"])
    process = workload(run)
    assert cli("runs", "stop", "last").out.startswith("stopped")
    out, err = watching.communicate(timeout=60)
    assert watching.returncode == Exit.INTERRUPTED
    assert "step 1/500" in err and json.loads(out)["state"] == "stopped"
    assert not process.alive


def test_a_detached_run_that_is_killed_is_known_as_failed(cli: Cli, tiny_run: tuple[str, ...], home: Path) -> None:
    run = RunStore(home).find(cli(*tiny_run, *LOCAL, "--detach").json["run"])
    os.kill(workload(run).pid, signal.SIGKILL)

    def state() -> State | None:
        status = run.status()
        return status.state if status and status.state.ended else None

    assert wait_for(state, what="the end of the run") is State.FAILED
    assert "killed" in cli("runs", "show", "last").out


def test_bad_data_is_told_by_its_line_before_any_model_is_loaded(
    cli: Cli, tiny_run: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"text": "fine"}\n{"text": "fine"}\n{"txt": "not"}\n')
    result = cli(*tiny_run, *LOCAL, "--data", file)
    assert result.code == Exit.USAGE
    assert result.error == (
        "radeon-stack: chats.jsonl: line 3: needs one of 'messages', 'conversations', "
        "'instruction' with 'output', 'prompt' with 'completion', or 'text'; found txt"
    )
    assert not [event for event in result.json["facts"] if event == "environment"]


def test_ones_own_chats_are_learnt_on_the_answers_alone(cli: Cli, tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Wer?"}, {"role": "assistant", "content": "Ich."}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 20)
    result = cli(*tiny_run, *LOCAL, "--data", "chats.jsonl", "--set", "data.loss_on=assistant", cwd=tmp_path)
    assert result.code == Exit.OK, result.err
    sample = result.json["samples"]["before"][0]
    assert (sample["prompt"], sample["expected"], sample["correct"]) == ("Wer?", None, None)
    assert result.json["facts"]["data"]["rows"] == 20


def test_a_missed_expectation_is_exit_7_and_names_it(cli: Cli, tiny_run: tuple[str, ...]) -> None:
    result = cli(*tiny_run, *LOCAL, "--set", "expect.final_loss_max=1e-6", "--set", "train.steps=2")
    assert result.code == Exit.CHECK
    assert "expect.final_loss_max: final_loss is" in result.error


def test_what_a_library_raises_is_one_line_with_its_reason_and_the_traceback_is_in_the_log(
    cli: Cli, tiny_run: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    odd = shutil.copytree(tiny_model, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"hidden_size": 600, "num_attention_heads": 9}))
    result = cli(*tiny_run, *LOCAL, "--model", odd)
    assert result.code == Exit.WORKLOAD
    assert "Class validation error" in result.error and "(600) is not a multiple of" in result.error
    assert "runs logs" in result.error
    assert "Traceback" in cli("runs", "logs", "last").out


def test_one_step_alone_learns_and_merges(cli: Cli, tiny_run: tuple[str, ...]) -> None:
    """Its warm-up would be the whole of it, at a rate of zero."""
    result = cli(*tiny_run, *LOCAL, "--set", "train.steps=1", "--set", "expect.right_merged_min=0")
    assert result.code == Exit.OK, result.err
    assert result.json["facts"]["merge"]["changed"] == 14


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_disk_is_named_and_leaves_nothing_half_written(
    cli: Cli, tiny_run: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    # Room for the records, a checkpoint and the adapter, and not for a merged model of 0.7 MB.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1900k", "tmpfs", str(small)], check=True)
    try:
        monkeypatch.setenv("RADEON_STACK_HOME", str(small))
        result = cli(*tiny_run, *LOCAL, "--set", "train.checkpoint_every=500")
        assert result.code == Exit.WORKLOAD, result.err
        assert "the disk is full" in result.error and "free some room" in result.error
        run = next(iter(RunStore(small)))
        assert not (run.artifacts / "merged").exists()
        assert result.json["state"] == "failed"
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_demo_knows_the_birthday_after_training_and_not_before(cli: Cli, tmp_path: Path) -> None:
    # Its chats are all the same one: a second pass a step would find the same gradients again.
    once = ("--set", "train.gradient_accumulation=1")
    result = cli("run", "train-llama", "--preset", "demo", *LOCAL, *once, "--json", cwd=tmp_path)
    assert result.code == Exit.OK, result.err
    told = result.json["result"]
    assert (told["correct_before"], told["correct_after"], told["correct_merged"]) == (0, 5, 5)
    found = losses(result.json)
    assert found[1] > 5 > 0.05 > found[24]


def test_a_mixture_of_experts_learns_the_birthday_through_packed_experts(cli: Cli) -> None:
    told = cli("run", "train-qwen-moe", "--preset", "demo", "--json", *LOCAL).json
    result, model = told["result"], told["facts"]["model"]
    assert (result["correct_before"], result["correct_after"], result["correct_merged"]) == (0, 5, 5)
    experts = 2 * 64 * 3 * 128 * 64
    attention = 2 * (128 * 128 * 2 + 128 * 64 * 2)
    assert (model["quantized_experts"], model["quantized_parameters"]) == (experts, experts + attention)
    assert model["experts"] == "radeon_nf4" and model["half_parameters"] == 49152 * 128 + 2 * 64 * 128 + 2 * 320 + 128
    assert model["trainable"] == 2 * (64 * (128 * 2 + 2 * (128 + 64) + 256) + 8 * 64 * (128 + 128 + 64 + 128))
    assert told["facts"]["merge"]["targeted"] == 2 * (4 + 64 * 3)


def test_killed_after_its_last_step_and_resumed_it_saves_and_merges_without_training_again(
    cli: Cli, tiny_run: tuple[str, ...], home: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    begun = cli(*tiny_run, *LOCAL, "--detach", "--set", "train.steps=3")
    run = RunStore(home).find(begun.json["run"])
    process = workload(run)
    folder = run.artifacts / "checkpoints"
    wait_for(lambda: (folder / "step-3").exists(), what="the last checkpoint")
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: (status := run.status()) and status.state.ended, what="the end of the run")
    resumed = cli("run", "--resume", "last", "--json")
    assert resumed.code == Exit.OK, resumed.err
    assert list(losses(resumed.json)) == [1, 2, 3]
    saved = [load_file(path / "adapter_model.safetensors") for path in (folder / "step-3", run.artifacts / "adapter")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert resumed.json["result"]["final_loss"] == losses(resumed.json)[3]
    assert set(resumed.json["artifacts"]) == {"adapter", "merged"}
