"""A run is kept to its end and recorded, whatever becomes of those who watch it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from radeon_stack.errors import Exit
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.supervise import carry_out
from radeon_stack.runs import events as ev
from radeon_stack.runs.store import Run, RunStore, State, Status
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
