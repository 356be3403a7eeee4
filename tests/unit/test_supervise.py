"""A run is kept to its end and recorded, whatever becomes of those who watch it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from pydantic import JsonValue

from radeon_stack import atomic
from radeon_stack.errors import Exit, MachineError
from radeon_stack.host.processes import Process
from radeon_stack.launch import supervise
from radeon_stack.launch.engine import Handle
from radeon_stack.launch.local import LocalEngine
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.supervise import call_off, carry_out, settle, stop
from radeon_stack.runs import events as ev
from radeon_stack.runs.store import Run, RunStore, State, Status
from tests.conftest import Cli, wait_for
from tests.unit.test_launch import demo_plan

# It tells one event, waits until the test lets it go or it is asked to stop, and says what it came to.
WORKLOAD = """
import os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1])
(run / "workload").write_text(str(os.getpid()))
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
tell = lambda text: (run / "events.jsonl").open("a").write(text + chr(10))
tell('{"kind": "metric", "step": 1, "values": {"loss": 1.0}}')
while not stopped and not (run / "go").exists():
    time.sleep(0.01)
tell('{"kind": "stopped", "stage": "training", "step": 1}' if stopped else '{"kind": "result", "values": {}}')
"""


@pytest.fixture
def run(home: Path) -> Run:
    made = RunStore(home).new("train-llama")
    made.artifacts.mkdir(parents=True)
    made.write_status(Status(state=State.STARTING, recipe="train-llama", engine="local", started=1.0))
    return made


@pytest.fixture
def plan(run: Run, tmp_path: Path) -> LaunchPlan:
    command = (sys.executable, "-c", WORKLOAD, str(run.path))
    return replace(demo_plan(tmp_path, image=None), command=command, run_dir=str(run.path))


def silent(text: str) -> None:
    pass


def state(run: Run) -> State | None:
    status = run.status()
    return status.state if status else None


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), UnicodeEncodeError("ascii", "✗", 0, 1, "no")])
def test_a_run_whose_progress_cannot_be_shown_goes_on_and_is_recorded(
    run: Run, plan: LaunchPlan, error: Exception
) -> None:
    shown: list[ev.Event] = []
    said: list[str] = []

    def watch(event: ev.Event) -> None:
        shown.append(event)
        (run.path / "go").touch()
        raise error

    outcome = carry_out(run, plan, watch, said.append)
    assert outcome.state is state(run) is State.DONE
    assert len(shown) == 1  # it is told nothing more
    assert [text.split(" (")[0] for text in said] == (
        [] if isinstance(error, OSError) else ["cannot show the run's progress any more"]
    )


def signalling(*numbers: signal.Signals) -> Callable[[ev.Event], None]:
    def watch(event: ev.Event) -> None:
        if isinstance(event, ev.Metric):
            for number in numbers:
                os.kill(os.getpid(), number)

    return watch


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGHUP,), (signal.SIGHUP, signal.SIGHUP)])
def test_a_closed_terminal_stops_the_workload_as_sigterm_does_and_lets_it_save(
    run: Run, plan: LaunchPlan, numbers: tuple[signal.Signals, ...]
) -> None:
    outcome = carry_out(run, plan, signalling(*numbers), silent)
    assert (outcome.state, outcome.exit_code) == (State.STOPPED, Exit.INTERRUPTED)
    assert "saved at step 1" in outcome.what


def test_the_workload_stops_though_nobody_can_be_told_so(run: Run, plan: LaunchPlan) -> None:
    def say(text: str) -> None:
        raise OSError(5, "Input/output error")

    assert carry_out(run, plan, signalling(signal.SIGINT), say).state is state(run) is State.STOPPED


def test_under_nohup_a_closed_terminal_is_nothing(run: Run, plan: LaunchPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    hang_up = signalling(signal.SIGHUP)

    def watch(event: ev.Event) -> None:
        hang_up(event)
        (run.path / "go").touch()

    try:
        assert carry_out(run, plan, watch, silent).state is State.DONE
    finally:
        signal.signal(signal.SIGHUP, old)


def full(path: Path, text: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_an_end_that_a_full_disk_does_not_take_is_told_with_the_way_out_and_recorded_later(
    run: Run, plan: LaunchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(event: ev.Event) -> None:
        monkeypatch.setattr(atomic, "write_text", full)
        (run.path / "go").touch()

    outcome = carry_out(run, plan, watch, silent)
    assert (outcome.state, outcome.exit_code) == (State.DONE, Exit.OK)
    assert "the disk is full" in outcome.what and "free some room" in outcome.remedy
    assert outcome.where == str(run.path) and state(run) is State.RUNNING
    monkeypatch.undo()
    keeper_gone(run)
    assert settle(run).state is state(run) is State.DONE


def keeper_gone(run: Run) -> None:
    status = run.status()
    assert status is not None
    run.write_status(status.model_copy(update={"keeper": None}))


def test_a_workload_whose_handle_cannot_be_recorded_is_not_left_running(
    run: Run, plan: LaunchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Handle] = []
    start = LocalEngine.start

    def starting(self: LocalEngine, plan: LaunchPlan) -> Handle:
        started.append(start(self, plan))
        monkeypatch.setattr(atomic, "write_text", full)
        return started[0]

    monkeypatch.setattr(LocalEngine, "start", starting)
    with pytest.raises(MachineError, match=r"cannot write there.*free some room"):
        carry_out(run, plan, lambda event: None, silent)
    assert not LocalEngine().alive(started[0])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_on_a_full_disk_runs_are_listed_shown_and_removed(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)], check=True)
    try:
        monkeypatch.setenv("RADEON_STACK_HOME", str(tmp_path))
        run = RunStore(tmp_path).new("train-llama")
        run.artifacts.mkdir(parents=True)
        gone: dict[str, JsonValue] = {"pid": 4_000_000, "started": 1}
        run.write_status(Status(state=State.RUNNING, recipe="train-llama", engine="local", handle=gone, started=1.0))
        with suppress(OSError):
            (run.artifacts / "adapter").write_bytes(bytes(1 << 20))
        listed, shown, report = cli("runs", "list"), cli("runs", "show", "last"), cli("runs", "report", "last")
        assert (listed.code, shown.code) == (Exit.OK, Exit.OK)
        assert "the disk is full" in listed.out and "free some room" in shown.out
        assert report.code == Exit.MACHINE
        assert report.error.endswith("/report.html: No space left on device; free some room")
        assert cli("runs", "rm", "last").code == Exit.OK and not run.path.exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# Stopped before there is a workload to be told so

GONE = {"pid": 4_000_000, "started": 1}


def launched_by(run: Run, launcher: dict[str, int]) -> None:
    status = run.status()
    assert status is not None
    run.write_status(status.model_copy(update={"launcher": launcher}))


def has_started(run: Run) -> bool:
    return (run.path / "workload").exists()


def test_a_run_that_is_stopped_before_its_keeper_begins_never_starts(cli: Cli, run: Run, plan: LaunchPlan) -> None:
    run.plan.write_text(json.dumps(plan.as_record()))
    launched_by(run, asdict(Process.current()))
    outcome = stop(run, seconds=10)
    assert outcome.state is state(run) is State.STOPPED and outcome.what == "stopped before it had begun"
    assert cli("runs", "supervise", run.id, timeout=60).code == Exit.INTERRUPTED
    assert state(run) is State.STOPPED and not has_started(run)


def test_a_launch_that_is_looked_at_in_its_first_moment_goes_on(cli: Cli, run: Run, plan: LaunchPlan) -> None:
    run.plan.write_text(json.dumps(plan.as_record()))
    (run.path / "go").touch()
    launched_by(run, asdict(Process.current()))
    assert cli("runs", "list", "--json").json[0]["state"] == "running" and state(run) is State.STARTING
    assert cli("runs", "supervise", run.id, timeout=60).code == Exit.OK
    assert state(run) is State.DONE


def test_a_launch_whose_launcher_and_keeper_were_killed_is_lost_and_stays_so(run: Run, plan: LaunchPlan) -> None:
    launched_by(run, GONE)
    assert settle(run).state is state(run) is State.LOST
    assert carry_out(run, plan, lambda event: None, silent).state is state(run) is State.LOST
    assert not has_started(run)


def test_who_calls_a_run_off_while_its_keeper_begins_finds_the_keeper(run: Run) -> None:
    found: list[bool] = []
    calling_off = threading.Thread(target=lambda: found.append(call_off(run)))
    with run.changing():
        calling_off.start()
        time.sleep(0.2)
        status = run.status()
        assert status is not None
        run.write_status(status.model_copy(update={"keeper": asdict(Process.current())}))
    calling_off.join(10)
    assert found == [False] and state(run) is State.STARTING


def test_a_run_that_is_stopped_while_it_waits_for_its_gpu_never_starts(
    run: Run, plan: LaunchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def waiting(*_: object) -> Iterator[None]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield

    monkeypatch.setattr(supervise, "leased", waiting)
    outcome = carry_out(run, plan, lambda event: None, silent)
    assert (outcome.state, outcome.exit_code) == (State.STOPPED, Exit.INTERRUPTED)
    assert state(run) is State.STOPPED and not has_started(run)


# A keeper whose engine starts the workload only when the test lets it.
SLOW_KEEPER = """
import json, pathlib, sys, time
from radeon_stack.launch.local import LocalEngine
from radeon_stack.launch.launcher import read_plan
from radeon_stack.launch.supervise import carry_out
from radeon_stack.runs.store import Run
run = Run(pathlib.Path(sys.argv[1]))
start = LocalEngine.start
def slowly(self, plan):
    (run.path / "starting").touch()
    while not (run.path / "engine answers").exists():
        time.sleep(0.01)
    return start(self, plan)
LocalEngine.start = slowly
carry_out(run, read_plan(run), lambda event: None, lambda text: None)
"""


@pytest.fixture
def slow_keeper(run: Run, plan: LaunchPlan) -> Iterator[subprocess.Popen[bytes]]:
    run.plan.write_text(json.dumps(plan.as_record()))
    with subprocess.Popen([sys.executable, "-c", SLOW_KEEPER, str(run.path)]) as keeper:
        wait_for((run.path / "starting").exists, seconds=30, what="the engine's start")
        yield keeper
        for name in ("engine answers", "go"):
            (run.path / name).touch()


def test_a_run_that_is_stopped_while_its_engine_starts_it_is_stopped_once_it_is_there(
    run: Run, slow_keeper: subprocess.Popen[bytes]
) -> None:
    threading.Timer(0.5, (run.path / "engine answers").touch).start()
    assert stop(run, seconds=30).state is state(run) is State.STOPPED
    assert slow_keeper.wait(20) == 0
    status = run.status()
    assert status is not None and not LocalEngine().alive(status.handle)


@pytest.mark.parametrize("force", [False, True])
def test_stopping_ends_in_its_time_though_the_engine_does_not_answer_and_the_keeper_stops_it_later(
    run: Run, slow_keeper: subprocess.Popen[bytes], force: bool
) -> None:
    before = time.monotonic()
    outcome = stop(run, seconds=1, force=force)
    assert time.monotonic() - before < 5
    assert outcome.state is State.RUNNING and "still starting" in outcome.what
    (run.path / "engine answers").touch()
    assert slow_keeper.wait(20) == 0 and state(run) is State.STOPPED


def test_a_stop_that_could_not_wait_for_the_engine_says_so(
    cli: Cli, run: Run, slow_keeper: subprocess.Popen[bytes]
) -> None:
    told = cli("runs", "stop", run.id, "--seconds", "1", timeout=30)
    assert told.code == Exit.MACHINE and "still starting" in told.error


def test_stopping_when_the_keeper_was_killed_while_its_engine_started_it_ends_at_once(
    run: Run, slow_keeper: subprocess.Popen[bytes]
) -> None:
    slow_keeper.kill()
    slow_keeper.wait()
    assert stop(run, seconds=10).state is state(run) is State.LOST
