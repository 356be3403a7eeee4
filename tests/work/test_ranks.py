"""Several processes train one model, for real: torchrun and gloo on the CPU, through the local engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.errors import Exit
from radeon_stack.host.processes import Process
from radeon_stack.runs import events as ev
from radeon_stack.runs.store import Run
from tests.conftest import ROOT, Cli, wait_for
from tests.work.models import folder_of
from tests.work.test_runs import losses, started, step_reached, the_run, workload

pytestmark = pytest.mark.work
LOCAL = ("--engine", "local")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Chats of many lengths: a mean over processes in place of one over tokens would show."""
    file = tmp_path / "chats.jsonl"
    with file.open("w") as stream:
        for n in range(60):
            question, answer = (
                f"What is {n} times {n + 3}?" + " please" * (n % 7),
                f"{n * (n + 3)}." + " Yes." * (n % 4),
            )
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": chat}) + "\n")
    return file


@pytest.fixture
def several(tiny_model: Path, chats: Path) -> Any:
    """Arguments of a short run on the tiny model with so many processes and passes a step."""

    def arguments(processes: int, passes: int, *sets: str, steps: int = 6) -> list[str]:
        values = [
            *(f"train.processes={processes}", f"train.gradient_accumulation={passes}", f"train.steps={steps}"),
            *("train.checkpoint_every=3", "train.learning_rate=0.003", "data.max_length=64", "samples.count=1"),
            *("samples.max_new_tokens=4", "export.merge=false", "expect.right_after_min=0.0", *sets),
        ]
        options = [part for value in values for part in ("--set", value)]
        preset = ("--preset", "demo", "--model", str(tiny_model), "--data", str(chats), "--json")
        return ["run", "train-llama", *preset, *LOCAL, *options]

    return arguments


def ranks(run: Run) -> dict[int, Process]:
    """The training processes by their rank, once all are there."""

    def known() -> dict[int, Process] | None:
        launcher = workload(run).pid
        listed = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True, check=False).stdout
        found = {}
        for pid in map(int, listed.split()):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            number = next((int(entry[5:]) for entry in environ if entry.startswith(b"RANK=")), None)
            process = Process.of(pid)
            if number is not None and process is not None:
                found[number] = process
        return found if len(found) == 2 else None

    found: dict[int, Process] = wait_for(known, what="two ranks")
    return found


def held_to(told: Any, wanted: Any, *, steps: int) -> None:
    """The same losses, and the same norms of the gradients."""
    expected, found = losses(wanted), losses(told)
    assert list(found) == list(expected) == list(range(1, steps + 1))
    for step, loss in expected.items():
        assert abs(found[step] - loss) <= 1e-4 * loss, f"loss of step {step}"
    norms = [{m["step"]: m["grad_norm"] for m in run["metrics"] if "grad_norm" in m} for run in (wanted, told)]
    assert norms[0].keys() == norms[1].keys() == expected.keys()
    for step, norm in norms[0].items():
        assert abs(norms[1][step] - norm) <= 2e-2 * norm, f"gradients of step {step}"  # told in bf16


def evaluations(told: Any) -> dict[int, float]:
    return {metric["step"]: metric["eval_loss"] for metric in told["metrics"] if "eval_loss" in metric}


def adapter_of(told: Any) -> bytes:
    return (Path(told["artifacts"]["adapter"]) / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("processes", "more_sets"),
    [
        (2, ["train.gradient_checkpointing=true", "data.eval_share=0.2", "train.eval_every=3"]),
        (3, ["train.gradient_checkpointing=false", "data.group_by_length=true"]),
    ],
)
def test_the_losses_are_those_of_one_process_with_the_same_global_batch_and_only_the_first_tells_and_saves(
    cli: Cli, several: Any, home: Path, processes: int, more_sets: list[str]
) -> None:
    one = cli(*several(1, processes, *more_sets))
    assert one.code == Exit.OK, one.err
    assert cli("runs", "rm", "last").code == 0
    more = cli(*several(processes, 1, *more_sets, "export.merge=true", "expect.right_merged_min=0.0"))
    assert more.code == Exit.OK, more.err
    held_to(more.json, one.json, steps=6)
    assert losses(one.json)[6] < losses(one.json)[1]
    told_and_saved_once(the_run(home), more.json)
    if processes > 2:
        return
    shared = cli(*several(processes, 1, "train.parallel=sharded", *more_sets))
    assert shared.code == Exit.OK, shared.err
    held_to(shared.json, one.json, steps=6)
    assert losses(shared.json) == losses(more.json) and adapter_of(shared.json) == adapter_of(more.json)
    evaluated = [evaluations(run.json) for run in (one, more, shared)]
    assert list(evaluated[0]) == [3, 6] and evaluated[1] == evaluated[2] == pytest.approx(evaluated[0], rel=1e-4)
    told = shared.json["facts"]["shares"]
    assert 0.5 <= told["share_bytes"] / told["layers_bytes"] < 0.51
    left = more.json["facts"]["model"]["memory_bytes"] - shared.json["facts"]["model"]["memory_bytes"]
    assert left == told["layers_bytes"] - told["share_bytes"]


def told_and_saved_once(run: Run, result: Any) -> None:
    """What a run of six steps tells, samples and saves, and nothing of it twice."""
    told = ev.read_events(run.events)
    assert sum(isinstance(event, ev.Attempt) for event in told) == 1
    assert [event.phase for event in told if isinstance(event, ev.Sample)] == ["before", "after", "merged"]
    metrics = [event for event in told if isinstance(event, ev.Metric)]
    assert [metric.step for metric in metrics if "loss" in metric.values] == list(range(1, 7))
    assert [metric.step for metric in metrics if "loss" not in metric.values] == list(evaluations(result))
    assert sum(isinstance(event, ev.Result) for event in told) == 1
    assert result["facts"]["merge"]["changed"] == 14
    assert {path.name for path in run.artifacts.iterdir()} == {"adapter", "merged", "checkpoints"}
    assert [path.name for path in (run.artifacts / "checkpoints").iterdir()] == ["step-6"]


def test_a_stop_reaches_all_and_they_save_the_same_step(several: Any, home: Path) -> None:
    attached = started(several(2, 1, steps=500))
    run = the_run(home)
    both = ranks(run)
    wait_for(lambda: step_reached(run, 4), what="step 4")
    attached.send_signal(signal.SIGINT)
    out, err = attached.communicate(timeout=120)
    assert attached.returncode == Exit.INTERRUPTED, err
    assert json.loads(out)["state"] == "stopped"
    words = [event for event in ev.read_events(run.events) if isinstance(event, ev.Stopped)]
    assert len(words) == 1 and words[0].step is not None
    saved = run.artifacts / "checkpoints" / f"step-{words[0].step}"
    assert {"rng_state_0.pth", "rng_state_1.pth", "adapter_model.safetensors"} <= {p.name for p in saved.iterdir()}
    assert not any(process.alive for process in both.values())


def test_a_stop_of_one_process_alone_is_agreed_upon_by_all(several: Any, home: Path) -> None:
    """As when a cluster's warning reaches only some."""
    attached = started(several(2, 1, steps=500))
    run = the_run(home)
    both = ranks(run)
    wait_for(lambda: step_reached(run, 4), what="step 4")
    os.kill(both[1].pid, signal.SIGTERM)
    out, err = attached.communicate(timeout=120)
    assert attached.returncode == Exit.INTERRUPTED, err
    assert "saved at step" in json.loads(out)["error"]["what"]


def kill_one(several: Any, home: Path, victim: int, *sets: str) -> Run:
    """A run of twelve steps of which one process is killed after the fourth; checked to have ended as it should."""
    attached = started(several(2, 1, *sets, steps=12))
    run = the_run(home)
    both = ranks(run)
    wait_for(lambda: step_reached(run, 4), what="step 4")
    os.kill(both[victim].pid, signal.SIGKILL)
    out, err = attached.communicate(timeout=120)
    assert attached.returncode == Exit.WORKLOAD, err
    assert "one of the run's processes was killed (SIGKILL)" in err and json.loads(out)["state"] == "failed"
    assert not any(process.alive for process in both.values())
    return run


@pytest.mark.parametrize(
    ("victim", "how", "shared"),
    [(0, "data.packing=true", ()), (1, "data.group_by_length=true", ("train.parallel=sharded",))],
    ids=["the first, in packs", "another, by length, over shares of the base"],
)
def test_a_process_killed_ends_the_run_and_resumed_its_losses_are_those_of_one_that_went_through(
    cli: Cli, several: Any, home: Path, chats: Path, victim: int, how: str, shared: tuple[str, ...]
) -> None:
    # So few that the run is in a later epoch when it is resumed, which has an order of its own.
    chats.write_text("".join(chats.read_text().splitlines(keepends=True)[: 20 if "packing" in how else 8]))
    whole = cli(*several(1, 2, how, steps=12))
    assert whole.code == Exit.OK, whole.err
    assert cli("runs", "rm", "last").code == 0
    run = kill_one(several, home, victim, how, *shared)
    assert (run.artifacts / "checkpoints" / "step-3").is_dir()
    resumed = cli("run", "--resume", "last", "--json")
    assert resumed.code == Exit.OK, resumed.err
    held_to(resumed.json, whole.json, steps=12)
    begun = [event.resumed_step for event in ev.read_events(run.events) if isinstance(event, ev.Attempt)]
    assert begun == [None, 3]


def test_the_launcher_killed_takes_its_processes_with_it(several: Any, home: Path) -> None:
    attached = started(several(2, 1, steps=500))
    run = the_run(home)
    both = ranks(run)
    wait_for(lambda: step_reached(run, 2), what="step 2")
    os.kill(workload(run).pid, signal.SIGKILL)
    attached.communicate(timeout=60)
    assert attached.returncode == Exit.WORKLOAD
    wait_for(lambda: not any(process.alive for process in both.values()), seconds=20, what="their end")


def test_what_all_processes_refuse_is_told_once(cli: Cli, several: Any, home: Path, chats: Path) -> None:
    with chats.open("a") as stream:
        stream.write('{"txt": "not"}\n')
    result = cli(*several(2, 1))
    assert result.code == Exit.USAGE
    assert "chats.jsonl: line 61" in result.error
    words = [event.kind for event in ev.read_events(the_run(home).events) if isinstance(event, ev.Attempt | ev.Error)]
    assert words == ["attempt", "error"]


def test_over_shares_of_any_base_the_gradients_are_the_same_to_the_bit(tmp_path: Path) -> None:
    """NF4 with its experts, scales quantised or not, FP8 and 16 bit; activations kept, and computed again both ways."""
    folder_of("qwen3_moe", tmp_path / "model", num_hidden_layers=3, num_experts=4)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "-m", "tests.work.sharded_processes", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=300, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for number in (0, 1):
        for name, told in json.loads((tmp_path / f"told-{number}.json").read_text()).items():
            assert told["same"] == {"kept": True, "computed again": True, "ours": True}, name
            shares = told["shares"]
            assert 0.49 < shares["share_bytes"] / shares["layers_bytes"] < 0.51, name
            assert told["whole"] - told["held"] == shares["layers_bytes"] - shares["share_bytes"], name


FAILS = """
import os, sys
from radeon_stack.errors import CheckError
from radeon_stack.workloads import job
from radeon_stack.workloads.finetune import ranks

def work(of):
    ranks.join(of.rank)
    of.progress("train", 0, 1)
    if of.rank.number == 1:
        raise MemoryError("2.00 GiB on this card")
    ranks.meet()
    return {}

sys.exit(job.carry_out(sys.argv[1:], work, job.Sizes("config.train.batch_size", "lower it")))
"""


def test_the_one_that_fails_tells_why_and_those_that_wait_for_it_do_not(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "fails.py").write_text(FAILS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*torchrun, "--nproc-per-node", "2", "--", str(tmp_path / "fails.py"), "--run", str(tmp_path)]
    done = subprocess.run([*command, "--cache", str(tmp_path)], capture_output=True, timeout=120, check=False)
    assert done.returncode != 0
    words = [event for event in ev.read_events(tmp_path / "events.jsonl") if isinstance(event, ev.Error | ev.Result)]
    assert len(words) == 1 and isinstance(words[0], ev.Error)
    assert "out of memory" in words[0].what and words[0].remedy == "lower it"


REFUSES = """
import os, sys, time
from pathlib import Path
from radeon_stack.errors import UsageError
from radeon_stack.workloads import job

def work(of):
    if of.rank.first:
        os._exit(1)
    raise UsageError("no chat", where="line 61", remedy="mend it")

told, launch = Path(sys.argv[2], "events.jsonl"), int(os.environ["LAUNCH"])
while os.environ["RANK"] == "0" and (told.read_text() if told.exists() else "").count("no chat") < launch:
    time.sleep(0.01)
sys.exit(job.carry_out(sys.argv[1:], work))
"""


def test_the_first_that_comes_when_another_has_ended_begins_no_second_attempt_that_would_hide_why(
    tmp_path: Path,
) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "refuses.py").write_text(REFUSES)
    for launch in (1, 2):  # the same holds of an attempt after another
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command = [*torchrun, "--nproc-per-node", "2", "--", str(tmp_path / "refuses.py"), "--run", str(tmp_path)]
        done = subprocess.run(
            [*command, "--cache", str(tmp_path)], capture_output=True, timeout=120, check=False,
            env={**os.environ, "LAUNCH": str(launch)},
        )  # fmt: skip
        assert done.returncode != 0
        words = [event.kind for event in ev.read_events(tmp_path / "events.jsonl")]
        assert words == ["attempt", "error"] * launch


LOSES = """
import os, signal, sys, time
from radeon_stack.workloads import job

def work(_):
    if os.environ["RANK"] == "1":
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("Connection closed by peer")

sys.exit(job.carry_out(sys.argv[1:], work, job.Sizes()))
"""


def test_the_one_that_was_killed_is_the_cause_however_quick_the_others_are_to_end(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "loses.py").write_text(LOSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*torchrun, "--nproc-per-node", "2", "--", str(tmp_path / "loses.py"), "--run", str(tmp_path)]
    done = subprocess.run(
        [*command, "--cache", str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert "failed (exitcode: -9) local_rank: 1" in done.stderr


def test_layers_are_spread_when_asked_over_the_cards_that_are_seen(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The argument that reaches transformers; that it trains over several cards is not shown here."""
    import torch

    from radeon_stack.contracts.finetune import Quantization
    from radeon_stack.workloads.finetune import base
    from tests.work.test_training import job_in

    asked: list[Any] = []

    def load(folder: Path, **options: Any) -> Any:
        asked.append(options["device_map"])
        return torch.nn.Module()

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    monkeypatch.setattr(base, "ready", lambda model, quantization: model)
    job, _ = job_in(tmp_path)
    base.load_for_training(job, tiny_model, Quantization(), torch.bfloat16, parallel="layers")
    base.load_for_training(job, tiny_model, Quantization(), torch.bfloat16)
    assert asked == ["balanced", {"": torch.device("cpu")}]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "2"}, (0, 1)),
        ({"RANK": "-1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, (0, 1)),
        ({"RANK": "one", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, (0, 1)),
    ],
)
def test_a_rank_is_what_torchrun_says_or_alone(environ: dict[str, str], expected: tuple[int, int]) -> None:
    from radeon_stack.workloads.ranks import rank

    found = rank(environ)
    assert (found.number, found.count) == expected and found.first == (found.number == 0)
