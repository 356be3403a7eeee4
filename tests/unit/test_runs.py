"""The record of a run is readable at any moment, whatever was written to it and however the run ended."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack import atomic
from radeon_stack.errors import Exit, UsageError
from radeon_stack.runs import events as ev
from radeon_stack.runs.outcome import Outcome, judge
from radeon_stack.runs.store import Run, RunStore, State, Status, home
from radeon_stack.runs.summary import lines, summary
from radeon_stack.runs.view import batches_text, model_text


def made(store: RunStore, recipe: str = "train-llama") -> Run:
    run = store.new(recipe)
    run.artifacts.mkdir(parents=True)
    return run


def test_written_events_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    written: list[ev.Event] = [
        ev.Attempt(pid=1, resumed_step=4),
        ev.Metric(step=1, values={"loss": 0.5, "grad_norm": math.inf}),
        ev.Sample(phase="before", index=0, prompt="p", response="r\n\x1b[2J", expected="x", correct=False),
        ev.Fact(name="data", value={"rows": [1, 2], "none": None}),
        ev.Result(values={"steps": 3}),
    ]
    write = ev.EventWriter(path)
    for event in written:
        write(event)
    assert ev.read_events(path) == written


def test_a_nan_loss_is_read_back_as_nan(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    ev.EventWriter(path)(ev.Metric(step=1, values={"loss": math.nan}))
    assert math.isnan(ev.metrics_by_step(ev.read_events(path))[1]["loss"])


def test_a_line_torn_by_a_kill_is_skipped_and_the_next_attempts_events_are_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    ev.EventWriter(path)(ev.Attempt(pid=1))
    with path.open("ab") as stream:
        stream.write(b'{"kind": "metric", "ste')
    ev.EventWriter(path)(ev.Attempt(pid=2))
    assert [event.pid for event in ev.read_events(path) if isinstance(event, ev.Attempt)] == [1, 2]


def test_a_reader_in_the_middle_of_a_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    line = ev.Attempt(pid=7).model_dump_json().encode() + b"\n"
    reader = ev.EventReader(path)
    assert list(reader.poll()) == []
    path.write_bytes(line[:10])
    assert list(reader.poll()) == []
    with path.open("ab") as stream:
        stream.write(line[10:])
    assert [event.kind for event in reader.poll()] == ["attempt"]


@given(st.binary(max_size=300))
def test_no_bytes_make_the_reader_fail(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    path.write_bytes(content + b"\n" + ev.Attempt(pid=1).model_dump_json().encode())
    assert ev.read_events(path)[-1].kind == "attempt"


def test_an_endless_line_is_not_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with path.open("wb") as stream:
        for _ in range(64):
            stream.write(b"x" * (1 << 20))
        stream.write(b"\n" + ev.Attempt(pid=1).model_dump_json().encode() + b"\n")
    reader = ev.EventReader(path)
    tracemalloc.start()
    assert [event.kind for event in reader.finish()] == ["attempt"]
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert reader.skipped == 1


def test_of_a_repeated_step_the_later_attempts_figures_count() -> None:
    events: list[ev.Event] = [ev.Metric(step=s, values={"loss": loss}) for s, loss in [(1, 5.0), (2, 4.0), (2, 3.0)]]
    assert ev.metrics_by_step(events) == {1: {"loss": 5.0}, 2: {"loss": 3.0}}


ID = "20260101-000000-train-llama-aaaa"
LOST = Outcome(State.LOST, Exit.WORKLOAD, "gone")
RESULT = ev.Result(values={"right_after": 0.8, "final_loss": 0.5})


@pytest.mark.parametrize(
    ("code", "events", "expect", "state", "exit_code"),
    [
        (0, [RESULT], {}, State.DONE, Exit.OK),
        (None, [RESULT], {}, State.DONE, Exit.OK),
        (0, [RESULT], {"right_after_min": 1.0}, State.FAILED, Exit.CHECK),
        (0, [RESULT], {"right_after_min": 0.8, "final_loss_max": 0.6}, State.DONE, Exit.OK),
        (0, [RESULT], {"final_loss_max": 0.4}, State.FAILED, Exit.CHECK),
        (0, [ev.Result(values={"final_loss": math.nan})], {"final_loss_max": 0.4}, State.FAILED, Exit.CHECK),
        (0, [RESULT], {"right_merged_min": 1.0}, State.DONE, Exit.OK),
        (130, [ev.Stopped(stage="training", step=3)], {}, State.STOPPED, Exit.INTERRUPTED),
        (143, [], {}, State.STOPPED, Exit.INTERRUPTED),
        (2, [ev.Error(what="w", exit_code=2)], {}, State.FAILED, Exit.USAGE),
        (6, [ev.Error(what="w", remedy="radeon-stack runs logs RUN", exit_code=6)], {}, State.FAILED, Exit.WORKLOAD),
        (6, [ev.Error(what="w", remedy="radeon-stack run --resume RUN", exit_code=6)], {}, State.FAILED, Exit.WORKLOAD),
        (1, [ev.Error(what="w", exit_code=99)], {}, State.FAILED, Exit.WORKLOAD),
        (137, [], {}, State.FAILED, Exit.WORKLOAD),
        (-9, [ev.Metric(step=1, values={})], {}, State.FAILED, Exit.WORKLOAD),
        (0, [], {}, State.FAILED, Exit.WORKLOAD),
        (None, [], {}, State.LOST, Exit.WORKLOAD),
        (-9, [RESULT, ev.Attempt(pid=1)], {}, State.FAILED, Exit.WORKLOAD),
    ],
)
def test_a_run_is_judged_by_its_exit_code_and_its_last_word(
    code: int | None, events: list[ev.Event], expect: dict[str, float], state: State, exit_code: int
) -> None:
    outcome = judge(code, events, expect, run=ID)
    assert (outcome.state, outcome.exit_code) == (state, exit_code)
    assert bool(outcome.what) == (state is not State.DONE)
    if "radeon-stack" in outcome.remedy:  # the run is another one's last before long
        assert ID in outcome.remedy


def test_the_home_folder_is_the_variable_else_the_xdg_data_folder() -> None:
    assert home({"RADEON_STACK_HOME": "/a/b"}) == Path("/a/b")
    assert home({"XDG_DATA_HOME": "/x"}) == Path("/x/radeon-stack")
    assert home({}) == Path.home() / ".local" / "share" / "radeon-stack"


def test_a_run_is_found_by_last_by_id_and_by_either_end_of_it(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for name in ("20260101-000000-train-llama-aaaa", "20260102-000000-train-llama-bbbb"):
        (store.folder / name).mkdir(parents=True)
    assert store.find("last").id.endswith("bbbb")
    assert store.find("20260101").id.endswith("aaaa")
    assert store.find("aaaa").id.endswith("aaaa")
    with pytest.raises(UsageError, match="fits 2 runs"):
        store.find("2026")
    with pytest.raises(UsageError, match="did you mean '20260101-000000-train-llama-aaaa'"):
        store.find("20260101-000000-train-llama-aaab")


def test_an_empty_name_is_no_runs_and_what_deletes_wants_more_of_one(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    (store.folder / "20260101-000000-train-llama-aaaa").mkdir(parents=True)
    with pytest.raises(UsageError, match="RUN: the name is empty; give an id, or last"):
        store.find("")
    with pytest.raises(UsageError, match="'202' is too little of an id; give 4 characters of it or more"):
        store.find("202", least=4)
    assert store.find("202") == store.find("aaaa", least=4) == store.find("last", least=4)


def test_a_folder_that_is_no_run_is_never_taken_for_one(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    (store.folder / "..evil").mkdir(parents=True)
    with pytest.raises(UsageError, match="no runs"):
        store.find("..evil")


def test_an_empty_and_a_damaged_run_directory_are_still_summed_up(tmp_path: Path) -> None:
    run = made(RunStore(tmp_path))
    assert summary(run, LOST)["state"] == "lost"
    (run.path / "status.json").write_text("{")
    run.plan.write_text("[]")
    run.events.write_text("nonsense\n")
    assert summary(run, LOST)["metrics"] == []
    assert lines(run, LOST)[0].startswith("lost")


def test_a_long_name_does_not_break_the_summarys_column(tmp_path: Path) -> None:
    run = made(RunStore(tmp_path))
    for name in ("adapter", "tensorboard"):
        ev.EventWriter(run.events)(ev.Artifact(name=name, path=f"artifacts/{name}"))
    assert len({line.index(str(tmp_path)) for line in lines(run, LOST)[1:]}) == 1
    ev.EventWriter(run.events)(ev.Artifact(name="x" * 500, path="x"))
    assert lines(run, LOST)[1].index(str(tmp_path)) < 30


def test_a_status_record_is_replaced_whole(tmp_path: Path) -> None:
    run = made(RunStore(tmp_path))
    status = Status(state=State.RUNNING, recipe="r", engine="local", started=1.0)
    run.write_status(status)
    run.write_status(status.model_copy(update={"state": State.DONE}))
    found = run.status()
    assert found is not None and found.state is State.DONE
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == []


def test_a_failed_write_leaves_the_old_record_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    atomic.write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_appears_under_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic.whole_directory(target) as partial:
        (partial / "weights").write_text("w")
        assert not target.exists()
    assert (target / "weights").read_text() == "w"


def test_a_failed_directory_leaves_what_was_there_before(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic.whole_directory(target) as partial:
        (partial / "old").write_text("o")
    with pytest.raises(RuntimeError), atomic.whole_directory(target) as partial:
        (partial / "new").write_text("n")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_new_directory_replaces_the_old_one_without_mixing(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("old", "new"):
        with atomic.whole_directory(target) as partial:
            (partial / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_attempt_left_half_done_is_cleared_first(tmp_path: Path) -> None:
    target = tmp_path / "model"
    left = tmp_path / "model.partial"
    left.mkdir()
    (left / "stale").write_text("s")
    with atomic.whole_directory(target) as partial:
        (partial / "fresh").write_text("f")
    assert [path.name for path in target.iterdir()] == ["fresh"]


def test_the_summary_is_plain_json(tmp_path: Path) -> None:
    run = made(RunStore(tmp_path))
    write = ev.EventWriter(run.events)
    write(ev.Sample(phase="after", index=0, prompt="p", response="r", expected=None, correct=None))
    write(ev.Artifact(name="adapter", path="artifacts/adapter", bytes=3))
    told = json.loads(json.dumps(summary(run, LOST)))
    assert told["samples"]["after"][0]["response"] == "r"
    assert told["artifacts"] == {"adapter": str(run.path / "artifacts" / "adapter")}


def test_before_the_first_step_it_is_told_what_is_in_4_bit_in_16_and_trained() -> None:
    told = {
        "class": "Qwen3MoeForCausalLM",
        "parameters": 30_585_600_000,
        "quantized_parameters": 29_896_736_768,
        "quantized_experts": 28_991_029_248,
        "half_parameters": 635_385_856,
        "trainable": 53_477_376,
    }
    assert model_text(ev.Fact(name="model", value=told)) == (
        "model Qwen3MoeForCausalLM: 30.6 B parameters, 29.9 B in 4 bit, 29 B of them experts', 635 M in 16 bit, "
        "53.5 M trained"
    )


def test_and_how_much_of_the_batches_is_padding() -> None:
    def told(**value: float) -> str:
        return batches_text(ev.Fact(name="batches", value=value))

    assert told(rows=1000, packs=44, padding=0.0212, padding_unpacked=0.37) == (
        "batches 1,000 rows in 44 packs: 2.1 % padding, 37 % if unpacked"
    )
    assert told(rows=10, padding=0.05, padding_ungrouped=0.3) == "batches 10 rows: 5 % padding, 30 % if ungrouped"
    assert told(rows=10, padding=0.0) == "batches 10 rows: 0 % padding"
    for rows, padding in ((10, math.nan), (10, 10**400), (-1, 0.5), (10**5000, 0.5)):
        assert told(rows=rows, padding=padding) == ""
    assert batches_text(ev.Fact(name="batches", value={"rows": "\x1b[2J", "padding": 0.1})) == ""
    assert batches_text(ev.Fact(name="model", value={"rows": 1, "padding": 0.1})) == ""


@pytest.mark.parametrize("value", [5, None, {}, {"class": "\x1b[2J", "parameters": "many"}, {"trainable": -1}])
def test_a_model_that_is_told_otherwise_is_not_told(value: Any) -> None:
    assert model_text(ev.Fact(name="model", value=value)) == ""
    assert model_text(ev.Fact(name="data", value={"parameters": 5})) == ""
