"""A model is trained on two nodes of a real Slurm, and what happens to clusters happens to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.errors import Exit
from radeon_stack.runs import events as ev
from radeon_stack.runs.store import Run, RunStore, State
from tests.cluster import training
from tests.cluster.conftest import Tool
from tests.cluster.training import BETWEEN, STEPS, asked, attempts, curve, job, job_of, processes_of, taught_in_order
from tests.conftest import Cli, Result, wait_for
from tests.work.test_ranks import adapter_of, held_to
from tests.work.test_runs import losses, started, step_reached, the_run

pytestmark = pytest.mark.work
Arguments = Callable[..., list[str]]
PATIENCE = 300


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats of many lengths: a mean over processes in place of one over tokens would show."""
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    with file.open("w") as stream:
        for n in range(60):
            question = f"What is {n} times {n + 3}?" + " please" * (n % 7)
            answer = f"{n * (n + 3)}." + " Yes." * (n % 4)
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": chat}) + "\n")
    return file


@pytest.fixture(scope="module")
def on_nodes(tiny_model: Path, chats: Path) -> Arguments:
    return lambda nodes, passes=1, *sets, **more: training.arguments(tiny_model, chats, nodes, passes, *sets, **more)


@pytest.fixture(scope="module")
def whole(
    cli: Cli, on_nodes: Arguments, cluster_tool: Tool, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, float]:
    """The losses of a run on two nodes to which nothing happens."""
    home = tmp_path_factory.mktemp("whole")
    (home / "cache").symlink_to(shared_cache)
    done = cli(*on_nodes(2), env={**os.environ, "RADEON_STACK_HOME": str(home)})
    assert done.code == Exit.OK, done.err
    found = curve(next(iter(RunStore(home))))
    assert list(found) == list(range(1, STEPS + 1)) and found[STEPS] < found[1]
    return found


@pytest.fixture
def going(on_nodes: Arguments, cli: Cli, home: Path) -> Callable[..., Run]:
    """A detached run that has trained for a while."""

    def begun(nodes: int = 2, *sets: str, until: int = BETWEEN) -> Run:
        told = cli(*on_nodes(nodes, 3 - nodes, *sets), "--detach")
        assert told.code == Exit.OK, told.err
        run = RunStore(home).find(told.json["run"])
        wait_for(lambda: step_reached(run, until), what=f"step {until}", seconds=PATIENCE)
        return run

    return begun


@contextmanager
def without(cluster_tool: Tool, daemon: str) -> Iterator[None]:
    """That daemon has been killed, and is back after."""
    assert cluster_tool("kill", "--daemon", daemon).returncode == 0
    try:
        yield
    finally:
        up = cluster_tool("up", "--daemon", daemon)
        assert up.returncode == 0, up.stderr


@pytest.fixture
def looked_at(on_nodes: Arguments, cli: Cli) -> None:
    """What the nodes are is known: none has to be free for that."""
    assert cli(*on_nodes(2), "--dry-run").code == Exit.OK


def ended(cli: Cli, run: Run, code: int = Exit.OK) -> Any:
    """What the run came to, watched from another shell."""
    done = cli("runs", "attach", run.id, "--json", timeout=PATIENCE)
    assert done.code == code, done.err + run.log.read_text()[-3000:]
    wait_for(lambda: not processes_of(run), what="that nothing of it is left", seconds=30)
    return done.json


def test_two_nodes_learn_what_one_does_with_the_same_global_batch(cli: Cli, on_nodes: Arguments, home: Path) -> None:
    one = cli(*on_nodes(1, 2, steps=6))
    assert one.code == Exit.OK, one.err
    two = cli(*on_nodes(2, 1, steps=6))
    assert two.code == Exit.OK, two.err
    held_to(two.json, one.json, steps=6)
    shared = cli(*on_nodes(2, 1, "train.parallel=sharded", steps=6))
    assert shared.code == Exit.OK, shared.err
    assert losses(shared.json) == losses(two.json) and adapter_of(shared.json) == adapter_of(two.json)
    assert shared.json["facts"]["shares"]["processes"] == 2
    for run in list(RunStore(home))[1:]:
        assert len(attempts(run)) == 1
        assert sum(isinstance(event, ev.Result) for event in ev.read_events(run.events)) == 1


def test_its_processes_are_on_different_nodes(going: Callable[..., Run], cli: Cli) -> None:
    run = going(until=3)
    found = {training.node_of(pid) for pid, words in processes_of(run).items() if "torch.distributed" in words}
    assert found == {"n1", "n2"}
    assert "RUNNING on n[1-2]" in cli("runs", "show", run.id).out
    assert cli("runs", "stop", run.id).code == Exit.OK
    assert not processes_of(run)


def test_when_its_time_is_up_it_saves_queues_again_and_goes_on(
    going: Callable[..., Run], cli: Cli, whole: dict[int, float]
) -> None:
    run = going()
    with training.held(run):
        asked("scontrol", "update", f"JobId={job_of(run)}", "TimeLimit=3")  # so much is kept for saving: it is over
    wait_for(lambda: job(run).restarts == 1, what="that it is queued again", seconds=PATIENCE)
    asked("scontrol", "update", f"JobId={job_of(run)}", "TimeLimit=20")
    ended(cli, run)
    first, second = attempts(run)
    assert first.resumed_step is None and second.resumed_step is not None
    assert second.resumed_step >= BETWEEN and second.resumed_step % 10, "it saved when asked, not only every tenth step"
    assert len(taught_in_order(run)) == STEPS, "no step was done twice"
    assert curve(run) == pytest.approx(whole, rel=1e-4)
    assert "its time was up: it is queued again" in run.log.read_text()


def test_others_come_first_and_it_goes_on_after_them(
    going: Callable[..., Run], cli: Cli, whole: dict[int, float]
) -> None:
    run = going()
    asked("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    ended(cli, run)
    assert job(run).restarts == 1 and len(attempts(run)) == 2
    assert len(taught_in_order(run)) == STEPS
    assert curve(run) == pytest.approx(whole, rel=1e-4)


def test_scancel_leaves_time_to_save_and_it_can_be_resumed(
    going: Callable[..., Run], cli: Cli, whole: dict[int, float]
) -> None:
    run = going()
    asked("scancel", job_of(run))
    told = ended(cli, run, Exit.INTERRUPTED)
    assert told["state"] == "stopped" and "saved at step" in told["error"]["what"]
    assert cli("run", "--resume", run.id, "--json").code == Exit.OK
    assert len(taught_in_order(run)) == STEPS
    assert curve(run) == pytest.approx(whole, rel=1e-4)
    assert job_of(run) == job(run).id


def test_a_run_is_stopped_by_the_same_command_as_everywhere(going: Callable[..., Run], cli: Cli) -> None:
    run = going(until=5)
    stopped = cli("runs", "stop", run.id)
    assert stopped.code == Exit.OK and "saved at step" in stopped.out, stopped.err
    assert not processes_of(run) and job(run).state == "FAILED"
    saved = [path.name for path in (run.artifacts / "checkpoints").iterdir()]
    assert len(saved) == 1 and saved[0].startswith("step-")


def test_a_node_whose_daemon_is_killed_is_given_up_and_the_run_goes_on(
    going: Callable[..., Run], cli: Cli, cluster_tool: Tool, whole: dict[int, float]
) -> None:
    run = going()
    with without(cluster_tool, "n2"):
        with training.held(run):  # until the controller has noticed, and ends what is on the other node
            pass
        wait_for(lambda: job(run).restarts == 1, what="that the job is queued again", seconds=PATIENCE)
    ended(cli, run)
    assert len(attempts(run)) == 2
    assert curve(run) == pytest.approx(whole, rel=1e-4)


def test_a_node_that_dies_with_all_that_is_on_it_is_noticed_and_the_run_goes_on(
    going: Callable[..., Run], cli: Cli, cluster_tool: Tool, whole: dict[int, float]
) -> None:
    run = going()
    head = asked("scontrol", "show", "job", job_of(run)).partition("BatchHost=")[2].split()[0]
    other = "n2" if head == "n1" else "n1"
    with without(cluster_tool, other):
        for pid in processes_of(run):
            if training.node_of(pid) == other:
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: job(run).restarts == 1, what="that the job is queued again", seconds=PATIENCE)
    ended(cli, run)
    resumed = attempts(run)[-1].resumed_step
    assert resumed is not None and resumed >= BETWEEN // 10 * 10, "nothing that was saved is lost"
    assert curve(run) == pytest.approx(whole, rel=1e-4)


def test_a_run_whose_only_node_is_given_up_goes_on_at_another(
    going: Callable[..., Run], cli: Cli, cluster_tool: Tool
) -> None:
    """The script that is on the given-up node sees that, and notes no end of the run (tests/work/test_attempts.py)."""
    run = going(1, "train.steps=1500", until=5)
    first = processes_of(run)
    node = training.node_of(next(iter(first)))
    with without(cluster_tool, node):
        wait_for(lambda: len(attempts(run)) == 2, what="the second attempt", seconds=PATIENCE)
        wait_for(lambda: not first.keys() & processes_of(run).keys(), what="the end of the first", seconds=60)
        assert cli("runs", "show", run.id, "--json").json["state"] == "running"
    assert cli("runs", "stop", run.id).code == Exit.OK
    steps = taught_in_order(run)
    assert sum(after <= before for before, after in pairwise(steps)) <= 1, "the two took turns"


def test_the_controller_is_restarted_and_nobody_notices(
    on_nodes: Arguments, home: Path, cluster_tool: Tool, whole: dict[int, float]
) -> None:
    attached = started(on_nodes(2))
    run = the_run(home)
    wait_for(lambda: step_reached(run, BETWEEN), what="the middle", seconds=PATIENCE)
    with without(cluster_tool, "slurmctld"):
        wait_for(lambda: step_reached(run, BETWEEN + 20), what="that it trains on", seconds=PATIENCE)
    out, err = attached.communicate(timeout=PATIENCE)
    assert attached.returncode == Exit.OK, err
    assert json.loads(out)["state"] == "done" and len(attempts(run)) == 1
    assert curve(run) == pytest.approx(whole, rel=1e-4)


def test_who_submitted_it_is_killed_and_it_goes_on_for_whoever_looks(
    on_nodes: Arguments, cli: Cli, home: Path, whole: dict[int, float]
) -> None:
    attached = started(on_nodes(2))
    run = the_run(home)
    wait_for(lambda: step_reached(run, 3), what="step 3", seconds=PATIENCE)
    attached.kill()
    attached.communicate()
    assert cli("runs", "list", "--json").json[0]["state"] == "running"
    told = ended(cli, run)
    assert told["state"] == "done" and curve(run) == pytest.approx(whole, rel=1e-4)
    assert run.report.exists()


def test_ctrl_c_at_an_attached_run_stops_it_and_saves(on_nodes: Arguments, home: Path) -> None:
    attached = started(on_nodes(2))
    run = the_run(home)
    wait_for(lambda: step_reached(run, 5), what="step 5", seconds=PATIENCE)
    attached.send_signal(signal.SIGINT)
    out, err = attached.communicate(timeout=PATIENCE)
    assert attached.returncode == Exit.INTERRUPTED, err
    assert "saved at step" in json.loads(out)["error"]["what"]
    assert not processes_of(run)


def test_a_job_that_never_began_is_called_off(
    looked_at: None, taken: None, on_nodes: Arguments, cli: Cli, home: Path
) -> None:
    told = cli(*on_nodes(2), "--detach")
    assert told.code == Exit.OK, told.err
    run = RunStore(home).find(told.json["run"])
    assert "waits in the queue" in cli("runs", "show", run.id).out
    stopped = cli("runs", "stop", run.id)
    assert stopped.code == Exit.OK and "stopped before it had begun" in stopped.out


def test_what_a_workload_says_of_its_failure_is_told_as_everywhere(
    on_nodes: Arguments, cli: Cli, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": "none"}\n')
    words = on_nodes(2)
    words[words.index("--data") + 1] = str(bad)
    told = cli(*words)
    assert told.code == Exit.USAGE and "bad.jsonl: line 1" in told.error
    assert told.json["state"] == "failed"


def test_a_run_waits_for_another_that_has_to_end_well(going: Callable[..., Run], on_nodes: Arguments, cli: Cli) -> None:
    first = going(until=3)
    told = cli(*on_nodes(2, steps=3), "--detach", "--after", first.id)
    assert told.code == Exit.OK, told.err
    shown = cli("runs", "show", told.json["run"])
    assert "Dependency" in shown.out, shown.out
    ended(cli, first)
    assert cli("runs", "attach", told.json["run"], "--json", timeout=PATIENCE).code == Exit.OK


def test_its_log_and_bars_come_from_the_folder_that_all_share(going: Callable[..., Run], cli: Cli) -> None:
    run = going()
    followed: Result = cli("runs", "logs", "--follow", run.id, timeout=PATIENCE)
    assert followed.code == 0 and "train_runtime" in followed.out
    assert "state" in cli("runs", "show", run.id, "--json").json
    assert RunStore(run.path.parent.parent).find(run.id).status().state is State.DONE  # type: ignore[union-attr]


def test_a_full_shared_disk_is_told_and_what_was_saved_is_kept(
    on_nodes: Arguments, cli: Cli, tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    asked("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", small)
    try:
        monkeypatch.setenv("RADEON_STACK_HOME", str(small))
        (small / "cache").symlink_to(shared_cache)
        told = cli(*on_nodes(2), "--detach")
        assert told.code == Exit.OK, told.err
        run = RunStore(small).find(told.json["run"])
        wait_for(lambda: step_reached(run, 12), what="step 12", seconds=PATIENCE)
        free = shutil.disk_usage(small).free
        (small / "filler").write_bytes(bytes(max(free - 65536, 0)))
        done = cli("runs", "attach", run.id, "--json", timeout=PATIENCE)
        assert done.code == Exit.WORKLOAD and "the disk is full" in done.err, done.err
        (small / "filler").unlink()
        assert cli("run", "--resume", run.id, "--json").code == Exit.OK
        assert list(curve(run)) == list(range(1, STEPS + 1))
    finally:
        asked("umount", "--lazy", small)
