"""Sweeps of a real training: each member learns with its own value, and what was broken off is continued."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from radeon_stack.errors import Exit
from radeon_stack.runs import events as ev
from radeon_stack.runs.store import RunStore
from radeon_stack.runs.sweep import members_of
from tests.conftest import Cli, wait_for
from tests.work.test_runs import LOCAL, losses, started, step_reached

pytestmark = pytest.mark.work
RATES = ("--sweep", "train.learning_rate=1e-4,1e-2")


def test_a_sweep_tells_which_value_learns_best_and_the_next_recipe_takes_that_one(
    cli: Cli, tiny_run: tuple[str, ...], home: Path
) -> None:
    done = cli(*tiny_run, *LOCAL, *RATES, "--set", "train.steps=4")
    assert done.code == Exit.OK, done.err
    told = done.json
    first, second = told["members"]
    assert [member["values"]["train.learning_rate"] for member in told["members"]] == [1e-4, 1e-2]
    slow, fast = (member["metrics"][-1]["learning_rate"] for member in told["members"])
    assert fast == pytest.approx(100 * slow)
    assert losses(first)[1] == losses(second)[1] and losses(first)[4] > losses(second)[4]
    assert told["comparison"]["best"] == second["run"] and told["comparison"]["by"] == "final loss"
    page = Path(told["report"]).read_text()
    assert all(f"../{member['run']}/report.html" in page for member in told["members"])
    assert all(Path(member["report"]).exists() for member in told["members"])
    lines = [line for line in done.err.splitlines() if line.startswith("[2/2 learning_rate=0.01] step ")]
    assert len(lines) == 4
    checked = cli("run", "export-check", "--from", "last", *LOCAL, "--dry-run", "--json")
    command = checked.json["command"]
    assert Path(command[command.index("--source") + 1]).name == second["run"]
    assert f"from {second['run']}, the best member" in checked.err


def test_a_sweep_that_is_broken_off_is_continued_from_where_each_member_stands(
    cli: Cli, tiny_run: tuple[str, ...], home: Path
) -> None:
    attached = started([*tiny_run, *LOCAL, *RATES])
    sweep = wait_for(lambda: next((run for run in RunStore(home) if run.is_sweep), None), what="the sweep")
    one, two = members_of(sweep)
    wait_for(lambda: step_reached(one, 4), what="step 4")
    attached.send_signal(signal.SIGINT)
    out, err = attached.communicate(timeout=120)
    assert attached.returncode == Exit.INTERRUPTED, err
    assert [row["state"] for row in json.loads(out)["comparison"]["rows"]] == ["stopped", "stopped"]
    refused = cli("run", "--resume", "last", "--set", "train.learning_rate=1")
    assert refused.code == Exit.USAGE and "is what the sweep varies" in refused.error
    resumed = cli("run", "--resume", "last", "--json")
    assert resumed.code == Exit.OK, resumed.err
    assert [list(losses(member)) for member in resumed.json["members"]] == [list(range(1, 13))] * 2
    begun = [
        [event.resumed_step for event in ev.read_events(run.events) if isinstance(event, ev.Attempt)]
        for run in (one, two)
    ]
    assert begun[0][0] is None and (begun[0][1] or 0) >= 4 and begun[1] == [None]
    assert cli("run", "--resume", "last").error.endswith("is done; there is nothing to continue")


def test_a_detached_sweep_is_watched_and_ends_by_itself(cli: Cli, tiny_run: tuple[str, ...], home: Path) -> None:
    begun = cli(*tiny_run, *LOCAL, *RATES, "--set", "train.steps=2", "--detach")
    assert begun.code == Exit.OK, begun.err
    sweep = RunStore(home).find(begun.json["run"])
    assert [run.id for run in members_of(sweep)] == begun.json["members"]
    status = sweep.status()
    assert status is not None and status.keeper is not None and status.keeper["pid"] != os.getpid()
    watched = cli("runs", "attach", "last", "--json")
    assert watched.code == Exit.OK, watched.err
    assert watched.json["state"] == "done" and "[1/2 learning_rate=0.0001] step 1/2" in watched.err
