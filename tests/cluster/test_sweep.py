"""A grid of values as one job array of a real Slurm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from radeon_stack.errors import Exit
from radeon_stack.host import slurm
from radeon_stack.runs.store import Run, RunStore
from radeon_stack.runs.sweep import members_of
from tests.cluster import training
from tests.cluster.test_training import PATIENCE, chats, on_nodes  # noqa: F401 - fixtures
from tests.conftest import Cli, wait_for
from tests.work.test_runs import started, step_reached

pytestmark = pytest.mark.work
RATES = ("1e-4", "1e-3", "3e-3", "1e-2")
Arguments = Callable[..., list[str]]


def swept(words: list[str]) -> list[str]:
    """The run's words with its learning rate as what is varied."""
    at = words.index("train.learning_rate=0.003")
    return [*words[: at - 1], *words[at + 1 :], "--sweep", f"train.learning_rate={','.join(RATES)}"]


def test_four_values_are_one_array_and_end_in_one_report_that_compares_them(
    cli: Cli,
    on_nodes: Arguments,  # noqa: F811
    home: Path,
) -> None:
    done = cli(*swept(on_nodes(1, 1, steps=12)), timeout=PATIENCE)
    assert done.code == Exit.OK, done.err
    told = done.json
    sweep = RunStore(home).find(told["run"])
    jobs = [training.job_of(run) for run in members_of(sweep)]
    assert [job.partition("_")[2] for job in jobs] == ["0", "1", "2", "3"]
    assert len({job.partition("_")[0] for job in jobs}) == 1, "one array"
    assert [member["values"] for member in told["members"]] == [{"train.learning_rate": float(r)} for r in RATES]
    assert [member["state"] for member in told["members"]] == ["done"] * 4
    losses = [member["metrics"][-1]["loss"] for member in told["members"]]
    assert len(set(losses)) == 4
    page = sweep.report.read_text()
    for run, rate in zip(members_of(sweep), RATES, strict=True):
        assert run.id in page and str(float(rate)) in page
    assert cli("runs", "list", "--json").json[0]["run"] == sweep.id
    assert cli("runs", "show", "last", "--json").json["comparison"] == told["comparison"]


def test_a_sweep_that_is_stopped_saves_what_goes_on_and_begins_no_more(
    cli: Cli,
    on_nodes: Arguments,  # noqa: F811
    home: Path,
) -> None:
    attached = started(swept(on_nodes(2, 1)))  # both nodes each: one after the other
    sweep = wait_for(lambda: next((run for run in RunStore(home) if run.is_sweep), None), what="the sweep")
    first = members_of(sweep)[0]
    wait_for(lambda: step_reached(first, 10), what="step 10", seconds=PATIENCE)
    stopped = cli("runs", "stop", sweep.id)
    assert stopped.code == Exit.OK, stopped.err
    assert not any(going(run) for run in members_of(sweep))
    out, err = attached.communicate(timeout=PATIENCE)
    assert attached.returncode == Exit.INTERRUPTED, err
    assert [member["state"] for member in json.loads(out)["members"]] == ["stopped"] * 4
    assert not any(going(run) for run in members_of(sweep))
    assert "saved at step" in json.loads(out)["members"][0]["error"]["what"]


def going(run: Run) -> bool:
    found = slurm.job(training.job_of(run))
    return (found is not None and found.going) or bool(training.processes_of(run))
