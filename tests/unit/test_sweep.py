"""A sweep is several runs, of which one that fails costs no other, and one report that compares them."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.catalog.load import read, resolve
from radeon_stack.catalog.sweep import MOST, flags_of, parse_axis, points
from radeon_stack.errors import Exit, UsageError
from radeon_stack.launch.launcher import Draft
from radeon_stack.launch.local import LocalEngine
from radeon_stack.launch.supervise import call_off
from radeon_stack.launch.sweeping import (
    Silent,
    Watcher,
    attach_sweep,
    carrier_for,
    keep,
    settle_sweep,
    stop_sweep,
    write_begun,
    write_sweep_records,
)
from radeon_stack.runs import events as ev
from radeon_stack.runs.outcome import Outcome
from radeon_stack.runs.sources import find_source
from radeon_stack.runs.store import Run, RunStore, State
from radeon_stack.runs.sweep import Member, Sweep, judge_sweep, label, members_of, read_sweep
from radeon_stack.runs.sweep_report import render_sweep
from radeon_stack.runs.sweep_table import Row, best_of, ranked, rows_of, table_lines, verdict
from radeon_stack.runs.sweep_view import sweep_view
from tests.conftest import Cli, wait_for
from tests.unit.test_launch import demo_plan
from tests.unit.test_report import Balance
from tests.unit.test_supervise import GONE, launched_by

# It trains a step, waits until the test lets it go or it is asked to stop, and says what it came to.
WORKLOAD = """
import json, pathlib, signal, sys, time
run, loss = pathlib.Path(sys.argv[1]), float(sys.argv[2])
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
def tell(kind, **more):
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, **more}) + chr(10))
tell("attempt", pid=1)
tell("progress", stage="train", done=1, total=2)
tell("metric", step=1, values={"loss": loss + 1})
while not stopped and not (run / "go").exists():
    time.sleep(0.01)
if stopped:
    tell("stopped", stage="training", step=1)
elif (run / "fail").exists():
    tell("error", what="it went wrong", exit_code=6)
    sys.exit(6)
else:
    tell("metric", step=2, values={"loss": loss})
    tell("result", values={"final_loss": loss, "train_seconds": 1.5, "correct_after": 2, "samples": 5})
"""
LOSSES = (0.5, 0.25, 0.75)
KEY = "train.learning_rate"


@pytest.fixture
def drafted(home: Path, tmp_path: Path) -> tuple[Run, list[Draft]]:
    """Three members that wait for their `go`, written down and not begun."""
    store = RunStore(home)
    sweep = store.new("train-llama")
    effective = resolve(read("train-llama"), "demo")
    drafts = []
    for number, loss in enumerate(LOSSES, 1):
        run = sweep.member(number)
        command = (sys.executable, "-c", WORKLOAD, str(run.path), str(loss))
        plan = replace(demo_plan(tmp_path, image=None), command=command, run_dir=str(run.path), run_id=run.id)
        drafts.append(Draft(effective, plan, run))
    members = tuple(Member(run=d.run.id, values={KEY: 10.0**-at}) for at, d in enumerate(drafts, 1))
    write_sweep_records(sweep, Sweep(keys=(KEY,), members=members), drafts, store)
    return sweep, drafts


@pytest.fixture
def sweep(drafted: tuple[Run, list[Draft]]) -> Run:
    return drafted[0]


def let_go(sweep: Run, *numbers: int) -> None:
    for number in numbers:
        (sweep.member(number).path / "go").touch()


def states(sweep: Run) -> list[str]:
    return [row.state for row in rows_of(sweep)]


def begun(run: Run) -> bool:
    return any(isinstance(event, ev.Attempt) for event in ev.read_events(run.events))


class Told(Silent):
    """Who watches, and does something when a member tells a step or has ended."""

    def __init__(
        self, on_step: Callable[[int], None] = lambda at: None, on_end: Callable[[int], None] = lambda at: None
    ) -> None:
        self.events: list[tuple[int, str]] = []
        self.ends: list[tuple[int, State]] = []
        self.said: list[str] = []
        self._on_step, self._on_end = on_step, on_end

    def __call__(self, at: int, event: ev.Event) -> None:
        self.events.append((at, event.kind))
        if isinstance(event, ev.Metric) and event.step == 1:
            self._on_step(at)

    def ended(self, at: int, outcome: Outcome) -> None:
        self.ends.append((at, outcome.state))
        self._on_end(at)

    def say(self, text: str) -> None:
        self.said.append(text)


# What is asked for

TOML = st.recursive(
    st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=12),
    lambda inner: st.lists(inner, min_size=1, max_size=3),
    max_leaves=6,
)


@given(st.lists(TOML, min_size=2, max_size=6, unique_by=repr))
def test_values_written_as_toml_are_read_back(values: list[Any]) -> None:
    told = ",".join(json.dumps(value, ensure_ascii=False) for value in values)
    try:
        axis = parse_axis(f"{KEY}={told}")
    except UsageError as error:
        assert "twice" in str(error) and any(a == b for i, a in enumerate(values) for b in values[:i])
    else:
        assert (axis.key, list(axis.values)) == (KEY, values)


@given(st.text(max_size=60))
def test_no_list_of_values_is_more_than_a_usage_error(text: str) -> None:
    with suppress(UsageError):
        assert len(parse_axis(f"a.b={text}").values) > 1


def test_bare_words_keep_their_quotes_and_brackets_and_arrays_their_commas() -> None:
    assert parse_axis("model=it's/a,b[1],c").values == ("it's/a", "b[1]", "c")
    assert parse_axis('lora.target_modules=["q", "v,"], [\'k\']').values == (["q", "v,"], ["k"])
    assert parse_axis('a = "x, y" , 2').values == ("x, y", 2)


def test_several_keys_make_a_grid_whose_last_key_changes_fastest() -> None:
    found = points(("config.train.learning_rate=1,2", "lora.rank=8,16"))
    assert [tuple(point.values()) for point in found] == [(1, 8), (1, 16), (2, 8), (2, 16)]
    assert flags_of(found[0]) == {
        "--sweep train.learning_rate": {"config": {"train": {"learning_rate": 1}}},
        "--sweep lora.rank": {"config": {"lora": {"rank": 8}}},
    }
    assert flags_of(points(("expect.final_loss_max=1,2",))[0]) == {
        "--sweep expect.final_loss_max": {"expect": {"final_loss_max": 1}}
    }


@pytest.mark.parametrize(
    ("sweeps", "sets", "says"),
    [
        (["train.steps"], [], "no list of values"),
        (["=1,2"], [], "no list of values"),
        (["train..steps=1,2"], [], "no list of values"),
        (["train.steps=1"], [], "one value alone"),
        (["train.steps=1,,2"], [], "a value is empty"),
        (["train.steps=1,2,"], [], "a value is empty"),
        (["train.steps=1,2,1.0"], [], "has 1.0 twice"),
        (["train.steps=[1,2"], [], "] is missing"),
        (["train.steps='1,2"], [], "' is missing"),
        (["train.steps=1,2", "config.train.steps=3,4"], [], "given twice"),
        (["train.steps=1,2"], ["train.steps=3"], "given by --set too"),
        (["train.steps=1,2"], ["config.train={ steps = 3 }"], "given by --set too"),
        (["a=" + ",".join(map(str, range(MOST + 1)))], [], f"{MOST} at most"),
    ],
)
def test_a_list_that_is_none_is_refused_by_name(sweeps: list[str], sets: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)) as raised:
        points(sweeps, sets)
    assert raised.value.where.startswith("--sweep")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--sweep", f"{KEY}=1e-4,fast"),
            f"{KEY}: found 'fast' (string); allowed: a number (member 2 of 2: {KEY}=",
        ),
        (("--sweep", "train.lerning_rate=1,2"), "did you mean 'learning_rate'?"),
        (("--model", "/tmp", "--sweep", "model=/a,/b"), "--sweep model: is given by --model too"),
        (("--sweep", f"{KEY}=1,2", "--estimate"), "neither --estimate nor --compare"),
        (("--sweep", f"{KEY}=1,2", "--sysroot", "/tmp"), "add --dry-run"),
    ],
)
def test_a_sweep_with_a_mistake_in_any_member_begins_none(
    cli: Cli, home: Path, arguments: Sequence[str], says: str
) -> None:
    done = cli("run", "train-llama", "--preset", "demo", "--engine", "local", *arguments)
    assert (done.code, done.out) == (Exit.USAGE, "") and says in done.error
    assert not (home / "runs").exists()


def test_a_recipe_that_never_ends_has_no_sweep(cli: Cli, tmp_path: Path) -> None:
    done = cli("run", "serve", "--from", tmp_path, "--engine", "local", "--sweep", "threads=1,2")
    assert done.code == Exit.USAGE and "goes on until it is stopped" in done.error


def test_a_dry_run_tells_each_members_commands_and_writes_nothing(cli: Cli, home: Path) -> None:
    asked = ("run", "train-llama", "--preset", "demo", "--engine", "local", "--sweep", f"{KEY}=1e-4,1e-3", "--dry-run")
    told = cli(*asked, "--json").json
    assert told["keys"] == [KEY] and [one["values"] for one in told["members"]] == [{KEY: 1e-4}, {KEY: 1e-3}]
    assert [one["run"][-2:] for one in told["members"]] == ["-1", "-2"]
    assert all(one["run"] in " ".join(one["command"]) for one in told["members"])
    lines = cli(*asked).out.splitlines()
    assert [line.split(": ")[1] for line in lines if line.startswith("#")] == [
        "learning_rate=0.0001",
        "learning_rate=0.001",
    ]
    assert not (home / "runs").exists()


# The record


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"keys": [], "members": []}',
        '{"keys": ["a"], "members": [{"run": "ID-1", "values": {}}]}',
        '{"keys": ["a"], "members": [{"run": "../../home", "values": {"a": 1}}]}',
        '{"keys": ["a"], "members": [{"run": "ID-2", "values": {"a": 1}}]}',
    ],
)
def test_a_record_that_is_damaged_or_names_runs_of_others_is_refused(sweep: Run, text: str) -> None:
    sweep.sweep.write_text(text.replace("ID", sweep.id))
    with pytest.raises(UsageError, match="damaged") as raised:
        read_sweep(sweep)
    assert raised.value.where == str(sweep.path)


def test_a_sweep_with_a_damaged_record_is_listed_and_removed_and_else_one_error(cli: Cli, sweep: Run) -> None:
    for run in (sweep, *members_of(sweep)):
        launched_by(run, GONE)
    sweep.sweep.write_text("{")
    listed = cli("runs", "list")
    assert listed.code == Exit.OK and "damaged" in listed.out
    for command in ("show", "report", "compare", "stop", "attach", "logs"):
        done = cli("runs", command, "last")
        assert done.code == Exit.USAGE and "damaged" in done.error, command
    assert cli("runs", "rm", sweep.id, sweep.member(2).id).code == Exit.OK
    assert not sweep.path.exists() and sweep.member(1).path.exists()


def test_last_and_the_beginning_of_an_id_name_the_sweep_and_its_end_a_member(home: Path, sweep: Run) -> None:
    store = RunStore(home)
    assert store.find("last") == store.find(sweep.id[:20]) == store.find(sweep.id) == sweep
    assert store.find(f"{sweep.id[-4:]}-2") == store.find(sweep.member(2).id) == sweep.member(2)
    assert store.sweep_of(sweep.member(2)) == sweep and store.sweep_of(sweep) is None


def test_members_are_told_apart_by_the_last_part_of_a_key_unless_two_are_alike_in_it() -> None:
    assert label({KEY: 1e-4, "lora.target_modules": ["q"]}) == 'learning_rate=0.0001 target_modules=["q"]'
    assert label({"a.steps": 1, "b.steps": 2}) == "a.steps=1 b.steps=2"


# Carried out


def test_members_go_one_after_the_other_and_all_done_is_done(sweep: Run) -> None:
    together: list[list[str]] = []

    def step(at: int) -> None:
        together.append(states(sweep))
        let_go(sweep, at + 1)

    watcher = Told(on_step=step)
    outcome = keep(sweep, watcher)
    assert (outcome.state, outcome.exit_code) == (State.DONE, Exit.OK)
    assert together == [
        ["running", "waiting", "waiting"],
        ["done", "running", "waiting"],
        ["done", "done", "running"],
    ]
    assert watcher.ends == [(at, State.DONE) for at in range(3)]
    assert settle_sweep(sweep) == outcome
    assert sweep.report.exists() and all(run.report.exists() for run in members_of(sweep))
    assert verdict(rows_of(sweep)) == "3 members: 3 done. Best: learning_rate=0.01, final loss 0.25."


def test_one_that_fails_costs_no_other_and_gives_the_exit_code(sweep: Run) -> None:
    (sweep.member(1).path / "fail").touch()
    let_go(sweep, 1, 2, 3)
    outcome = keep(sweep, Silent())
    assert states(sweep) == ["failed", "done", "done"]
    assert (outcome.state, outcome.exit_code) == (State.FAILED, Exit.WORKLOAD)
    assert sweep.member(1).id in outcome.what and "it went wrong" in outcome.what
    assert f"--resume {sweep.id}" in outcome.remedy
    assert "it went wrong" in sweep.report.read_text()


def test_nor_does_one_that_cannot_even_start(sweep: Run) -> None:
    first = sweep.member(1)
    plan = json.loads(first.plan.read_text())
    first.plan.write_text(json.dumps(plan).replace(json.dumps(sys.executable), '"/no/such/python"'))
    sweep.member(2).plan.write_text("{")
    let_go(sweep, 3)
    watcher = Told()
    outcome = keep(sweep, watcher)
    assert states(sweep) == ["failed", "failed", "done"]
    assert outcome.exit_code == Exit.MACHINE and "/no/such/python" in outcome.what
    assert [text.endswith("the others go on") for text in watcher.said] == [True, True]
    assert "plan.json is missing or damaged" in rows_of(sweep)[1].what


def test_ctrl_c_stops_the_one_that_goes_on_cleanly_and_begins_no_other(sweep: Run) -> None:
    let_go(sweep, 1)
    watcher = Told(on_step=lambda at: os.kill(os.getpid(), signal.SIGINT) if at == 1 else None)
    outcome = keep(sweep, watcher)
    assert states(sweep) == ["done", "stopped", "stopped"]
    assert (outcome.state, outcome.exit_code) == (State.STOPPED, Exit.INTERRUPTED)
    assert "saved at step 1" in rows_of(sweep)[1].what and not begun(sweep.member(3))
    assert watcher.ends == [(0, State.DONE), (1, State.STOPPED), (2, State.STOPPED)]
    assert table_lines(rows_of(sweep), read_sweep(sweep))[-1] == "  3: stopped before it had begun"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_between_two_members_is_not_lost(sweep: Run) -> None:
    let_go(sweep, 1, 2, 3)
    outcome = keep(sweep, Told(on_end=lambda at: os.kill(os.getpid(), signal.SIGINT)))
    assert states(sweep) == ["done", "stopped", "stopped"] and outcome.exit_code == Exit.INTERRUPTED
    assert not begun(sweep.member(2))


def test_one_that_cannot_be_shown_is_carried_out_all_the_same(sweep: Run) -> None:
    def gone(at: int) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    let_go(sweep, 1, 2, 3)
    assert keep(sweep, Told(on_step=gone, on_end=gone)).state is State.DONE


# By a process of its own


def kept(sweep: Run) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "radeon_stack", "runs", "supervise", sweep.id])


def test_a_sweep_that_is_stopped_from_elsewhere_stops_the_one_and_begins_no_other(cli: Cli, sweep: Run) -> None:
    keeper = kept(sweep)
    wait_for(lambda: begun(sweep.member(1)), what="the first member")
    assert settle_sweep(sweep).state is State.RUNNING
    assert cli("runs", "rm", sweep.id).code == Exit.USAGE
    stopped = cli("runs", "stop", "last")
    assert stopped.code == Exit.OK and stopped.out.startswith(f"stopped  {sweep.id}")
    assert keeper.wait(30) == Exit.INTERRUPTED
    assert states(sweep) == ["stopped"] * 3 and not begun(sweep.member(2))
    assert cli("runs", "stop", "last").error == f"radeon-stack: {sweep.id} is not running"


def test_a_member_that_is_stopped_by_its_own_name_lets_the_others_have_their_turn(cli: Cli, sweep: Run) -> None:
    keeper = kept(sweep)
    wait_for(lambda: begun(sweep.member(1)), what="the first member")
    assert cli("runs", "stop", sweep.member(1).id).code == Exit.OK
    let_go(sweep, 2, 3)
    assert keeper.wait(30) == Exit.INTERRUPTED
    assert states(sweep) == ["stopped", "done", "done"] and settle_sweep(sweep).state is State.STOPPED


def test_who_attaches_sees_every_member_from_its_first_event(sweep: Run) -> None:
    keeper = kept(sweep)
    watcher = Told(on_step=lambda at: let_go(sweep, at + 1))
    assert attach_sweep(sweep, watcher).state is State.DONE
    assert keeper.wait(30) == Exit.OK
    assert [kind for at, kind in watcher.events if at == 2] == ["attempt", "progress", "metric", "metric", "result"]
    assert watcher.ends == [(at, State.DONE) for at in range(3)]


def test_a_sweep_whose_keeper_was_killed_loses_what_had_not_begun_and_can_be_settled(sweep: Run) -> None:
    keeper = kept(sweep)
    wait_for(lambda: begun(sweep.member(1)), what="the first member")
    keeper.kill()
    keeper.wait(30)
    assert settle_sweep(sweep).state is State.RUNNING  # its workload goes on
    let_go(sweep, 1)
    wait_for(lambda: settle_sweep(sweep).state is not State.RUNNING, what="the end")
    assert states(sweep) == ["done", "lost", "lost"]
    assert settle_sweep(sweep).state is State.FAILED and "2 of 3 members not done" in settle_sweep(sweep).what


def test_a_sweep_whose_members_were_continued_one_by_one_is_done(sweep: Run) -> None:
    (sweep.member(2).path / "fail").touch()
    let_go(sweep, 1, 2, 3)
    assert keep(sweep, Silent()).state is State.FAILED
    status = sweep.member(1).status()
    assert status is not None
    sweep.member(2).write_status(status)
    assert settle_sweep(sweep).state is State.DONE
    told = sweep.status()
    assert told is not None and (told.state, told.exit_code, told.what) == (State.DONE, 0, "")


def test_one_that_was_never_begun_is_left_with_all_its_members_called_off(
    drafted: tuple[Run, list[Draft]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, drafts = drafted
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Exception, match="the sweep did not start"):
        carrier_for(drafts).leave(sweep, drafts)
    assert states(sweep) == ["lost"] * 3 and settle_sweep(sweep).state is State.LOST


class AllAtOnce:
    """A carrier that starts every member and keeps none, as a cluster does: here by the local engine."""

    def carry_out(self, sweep: Run, drafts: Sequence[Draft], watcher: Watcher) -> Outcome:
        self.leave(sweep, drafts)
        return attach_sweep(sweep, watcher)

    def leave(self, sweep: Run, drafts: Sequence[Draft]) -> None:
        write_begun(sweep, {one.run.id: LocalEngine().start(one.plan) for one in drafts})


def test_members_that_an_engine_begins_all_at_once_need_no_keeper(drafted: tuple[Run, list[Draft]]) -> None:
    sweep, drafts = drafted
    seen: list[set[str]] = []

    def step(at: int) -> None:
        seen.append(set(states(sweep)))
        if len(seen) == len(drafts):
            let_go(sweep, 1, 2, 3)

    watcher = Told(on_step=step)
    assert AllAtOnce().carry_out(sweep, drafts, watcher).state is State.DONE
    assert seen == [{"running"}] * 3 and sorted(watcher.ends) == [(at, State.DONE) for at in range(3)]
    assert settle_sweep(sweep).state is State.DONE and sweep.report.exists()


def test_and_they_are_stopped_together_but_for_those_called_off_before_they_were_on_record(
    drafted: tuple[Run, list[Draft]],
) -> None:
    sweep, drafts = drafted
    call_off(sweep.member(3))
    AllAtOnce().leave(sweep, drafts)
    wait_for(lambda: begun(sweep.member(1)) and begun(sweep.member(2)), what="two members")
    assert settle_sweep(sweep).state is State.RUNNING
    outcome = stop_sweep(sweep, seconds=20)
    assert (outcome.state, outcome.exit_code) == (State.STOPPED, Exit.INTERRUPTED)
    assert states(sweep) == ["stopped"] * 3 and "before it had begun" in rows_of(sweep)[2].what


# What is made of it


def test_the_sweep_is_one_row_of_the_list_and_goes_with_its_members(cli: Cli, sweep: Run) -> None:
    let_go(sweep, 1, 2, 3)
    keep(sweep, Silent())
    rows = cli("runs", "list", "--json").json
    assert [row["run"] for row in rows] == [sweep.id] and len(rows[0]["members"]) == 3
    assert rows[0]["note"] == "sweep of 3: 3 done; best learning_rate=0.01: final loss 0.25"
    assert len(cli("runs", "list", "--all", "--json").json) == 4
    shown = cli("runs", "show", "last", "--json").json
    assert shown["comparison"]["best"] == sweep.member(2).id and shown["members"][1]["values"] == {KEY: 0.01}
    compared = cli("runs", "compare", sweep.id).out.splitlines()
    assert compared[0].split()[:3] == [KEY, "steps", "final"] and compared[2].split()[:2] == ["★", "2"]
    assert cli("runs", "compare", sweep.id, "last").code == Exit.USAGE
    assert cli("runs", "logs", "last").out.splitlines() == [f"== {run.id}" for run in members_of(sweep)]
    assert len(cli("runs", "rm", "last", "--dry-run").out.splitlines()) == 4 and sweep.path.exists()
    assert cli("runs", "rm", "last").code == Exit.OK and not list(RunStore(sweep.path.parent.parent))


def test_what_wants_one_run_alone_asks_for_a_member(cli: Cli, sweep: Run) -> None:
    for arguments in (("explain", "--resume", "last"), ("chat", "--to", "last", "--once", "Who?")):
        done = cli(*arguments)
        assert done.code == Exit.USAGE and f"name one of its members: {sweep.id}-1" in done.error


def test_from_takes_the_best_member_that_has_what_is_wanted_and_says_which(home: Path, sweep: Run) -> None:
    let_go(sweep, 1, 2, 3)
    keep(sweep, Silent())
    said: list[str] = []
    for number in (1, 3):  # the best, which is the second, was not merged
        (sweep.member(number).artifacts / "merged").mkdir()
        (sweep.member(number).artifacts / "merged" / "SHA256SUMS").touch()
    for wanted in ("last", sweep.id, str(sweep.path)):
        assert find_source(RunStore(home), wanted, ["merged"], said.append)["source"] == str(sweep.member(1).path)
    assert said == 3 * [
        f"from {sweep.member(1).id}, the best member of the sweep that has made it: learning_rate=0.1, final loss 0.5"
    ]
    assert find_source(RunStore(home), sweep.member(3).id, ["merged"])["source"] == str(sweep.member(3).path)
    with pytest.raises(UsageError, match=f"{sweep.id} has made no artifacts/gguf"):
        find_source(RunStore(home), sweep.id, ["gguf"])


def row(number: int, state: str = "done", **more: Any) -> Row:
    return Row(run=f"id-{number}", values={KEY: number}, state=state, **more)


def test_best_is_by_evaluation_where_there_is_one_and_never_by_what_is_no_number_or_not_done() -> None:
    rows = [
        row(1, loss=0.1, eval_loss=0.9),
        row(2, loss=0.5, eval_loss=0.8),
        row(3, loss=0.0, eval_loss=math.nan),
        row(4, "failed", loss=0.01, eval_loss=0.01),
        row(5, "waiting"),
    ]
    assert best_of(rows) is rows[1]
    assert [one.run for one in ranked(rows)] == ["id-2", "id-1", "id-4"]
    assert best_of([row(1, loss=math.nan), row(2, loss=2.0), row(3, loss=1.0)]) == row(3, loss=1.0)
    assert best_of([row(1, "running", loss=1.0)]) is None and best_of([]) is None


@pytest.mark.parametrize(
    ("ends", "interrupted", "state", "code"),
    [
        ([(State.DONE, 0), (State.DONE, 0)], False, State.DONE, 0),
        ([(State.DONE, 0), (State.FAILED, 7), (State.FAILED, 6)], False, State.FAILED, 7),
        ([(State.STOPPED, 130), (State.DONE, 0)], False, State.STOPPED, 130),
        ([(State.STOPPED, 130), (State.FAILED, 6)], False, State.FAILED, 130),
        ([(State.FAILED, 6), (State.STOPPED, 130)], True, State.STOPPED, 130),
        ([(State.DONE, 0), (State.DONE, 0)], True, State.DONE, 0),
    ],
)
def test_a_sweep_is_judged_by_the_first_member_that_is_not_done(
    ends: list[tuple[State, int]], interrupted: bool, state: State, code: int
) -> None:
    members = [
        (Member(run=f"id-{at}", values={"a": at}), Outcome(state, code)) for at, (state, code) in enumerate(ends, 1)
    ]
    outcome = judge_sweep(Run(Path("id")), members, interrupted=interrupted)
    assert (outcome.state, outcome.exit_code) == (state, code)


class Linked(Balance):
    """Allows links to the members' own reports, and no other."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            assert name != "href" or re.fullmatch(r"\.\./[a-z0-9-]+-[0-9]+/report\.html", str(value))
        super().handle_starttag(tag, [(name, value) for name, value in attrs if name != "href"])


def test_the_report_stands_at_any_moment_and_trusts_nothing_that_it_shows(sweep: Run) -> None:
    evil = "</td></svg><script>alert(1)</script>\x1b[2J"
    members = tuple(Member(run=one.run, values={evil: [evil]}) for one in read_sweep(sweep).members)
    sweep.sweep.write_text(Sweep(keys=(evil,), members=members).model_dump_json())
    first, second = sweep.member(1), sweep.member(2)
    first.config.write_text(json.dumps({"recipe": {"config": {evil: evil}}, "origin": {f"config.{evil}": f"--{evil}"}}))
    write = ev.EventWriter(first.events)
    write(ev.Metric(step=1, values={"loss": 1e9, "eval_loss": math.nan}))
    write(ev.Metric(step=2, values={"loss": math.inf}))
    write(ev.Metric(step=3, values={"loss": 1.0}))
    write(ev.Result(values={"final_loss": evil, "correct_after": evil, "train_seconds": evil}))
    status = second.status()
    assert status is not None
    second.write_status(status.model_copy(update={"state": State.FAILED, "what": evil, "where": evil, "remedy": evil}))
    page = render_sweep(sweep)
    Linked().feed(page)
    assert "<script" not in page and "default-src 'none'" in page and "waiting" in page
    assert "Loss, logarithmic" in page
    lines = "\n".join(table_lines(rows_of(sweep), read_sweep(sweep)))
    assert "\x1b" not in lines and len(lines.splitlines()) == 5


def test_a_sweep_of_as_many_members_as_there_may_be_is_still_told_apart(sweep: Run) -> None:
    from radeon_stack.runs.charts import COLOURS, DASHES, Curve, colour, curves_chart

    assert len({colour(at) for at in range(COLOURS * DASHES)}) == COLOURS * DASHES
    chart = curves_chart("Loss", [Curve(str(at), [(1, at), (2, at + 1)], strong=at == 3) for at in range(MOST)])
    assert chart.count("<path") == MOST and chart.rindex("strong") > chart.rindex("of-many c7 d3")
    assert "nothing was measured" in curves_chart("Loss", [Curve("a", [])])


# Shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "12")
    return Terminal()


def last_frame(terminal: Terminal, count: int) -> list[str]:
    """The bars as they stand at the end."""
    told = re.sub(r"\x1b\[\??[0-9]*[A-Za-z]", "", terminal.getvalue())  # where the cursor goes
    return [line.rstrip() for line in told.splitlines() if "━" in line][-count:]


def test_each_member_has_a_bar_with_its_values_steps_and_loss(terminal: Terminal) -> None:
    with sweep_view(terminal, ["rate=1", "rate=[2]", "rate=3", "rate=4"]) as view:
        view(0, ev.Progress(stage="train", done=24, total=60))
        view(0, ev.Metric(step=24, values={"loss": 0.5, "learning_rate": 1e-4}))
        view(1, ev.Progress(stage="ask [before]\x1b[2J", done=1, total=5))
        view.ended(2, Outcome(State.FAILED, 6, "out of memory\x1b[2J"))
        view.ended(3, Outcome(State.DONE, 0))  # in an earlier attempt
    one, two, three, four = last_frame(terminal, 4)
    assert one.startswith("rate=1 ") and "24/60" in one and "loss 0.5  lr 0.0001" in one
    assert two.startswith("rate=[2]") and two.endswith("ask [before]�[2J 1/5")
    assert three.endswith("failed: out of memory�[2J")
    assert "1/1" in four and four.endswith("done")


def test_of_more_members_than_lines_those_that_have_not_ended_are_seen(terminal: Terminal) -> None:
    with sweep_view(terminal, [f"rate={at}" for at in range(40)]) as view:
        for at in range(20):
            view.ended(at, Outcome(State.DONE, 0))
        view(20, ev.Metric(step=1, values={"loss": 0.5}))
    shown = [line.split()[0] for line in last_frame(terminal, 10)]
    assert shown == [f"rate={at}" for at in range(20, 30)]


def test_elsewhere_each_line_says_whose_it_is() -> None:
    stream = io.StringIO()
    with sweep_view(stream, ["rate=1", "rate=2"]) as view:
        view(1, ev.Progress(stage="train", done=0, total=60))
        view(1, ev.Metric(step=1, values={"loss": 0.5}))
        view.ended(1, Outcome(State.STOPPED, 130, "stopped while training"))
    assert stream.getvalue().splitlines() == [
        "[2/2 rate=2] step 1/60  loss 0.5",
        "[2/2 rate=2] stopped while training",
    ]
