"""A cluster begins a run again while a node that it has given up still computes: the older attempt leaves it alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from radeon_stack.errors import Exit
from radeon_stack.runs import events as ev
from tests.conftest import wait_for
from tests.work.test_runs import step_reached, the_run

pytestmark = pytest.mark.work


def test_an_older_attempt_ends_without_a_word_and_saves_nothing_more(tiny_run: tuple[str, ...], home: Path) -> None:
    words = [*tiny_run, "--engine", "local", "--set", "train.steps=2000", "--set", "train.checkpoint_every=5"]
    old = subprocess.Popen(
        [sys.executable, "-m", "radeon_stack", *words],
        env=os.environ | {"RADEON_STACK_ATTEMPT": "7.0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run = the_run(home)
    notes = run.path / "slurm"
    notes.mkdir()
    (notes / "attempt").write_text("7.0\n")
    wait_for(lambda: step_reached(run, 12), what="step 12")
    (notes / "attempt").write_text("7.1\n")
    assert old.wait(timeout=60) == Exit.WORKLOAD
    told = ev.read_events(run.events)
    assert not any(isinstance(event, ev.Stopped | ev.Error | ev.Result) for event in told)
    assert "another has begun" in run.log.read_text()
    steps = [event.step for event in told if isinstance(event, ev.Metric)]
    saved = max(int(path.name.removeprefix("step-")) for path in (run.artifacts / "checkpoints").glob("step-*"))
    assert saved <= steps[-1] and saved % 5 == 0, "it saved because it ended"
