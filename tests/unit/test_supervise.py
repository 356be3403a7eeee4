"""A run is kept to its end and recorded, whatever becomes of those who watch it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import JsonValue

from radeon_stack import atomic
from radeon_stack.errors import Exit, MachineError
from radeon_stack.launch.engine import Handle
from radeon_stack.launch.local import LocalEngine
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.supervise import carry_out, settle
from radeon_stack.runs import events as ev
from radeon_stack.runs.store import Run, RunStore, State, Status
from tests.conftest import Cli
from tests.unit.test_launch import demo_plan

# It tells one event, waits until the test lets it go or it is asked to stop, and says what it came to.
WORKLOAD = """
import os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1])
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
