"""Rows are held back the same way everywhere, and evaluations decide when to stop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.contracts.finetune import Data, FinetuneConfig, Train
from radeon_stack.errors import UsageError
from radeon_stack.runs import charts, report
from radeon_stack.runs import events as ev
from radeon_stack.workloads.finetune.evaluation import (
    Evaluation,
    evaluations_in,
    is_better,
    out_of_patience,
    read_record,
    require_evaluation,
    split,
    write_record,
)


@given(st.integers(2, 300), st.floats(0.001, 0.5), st.integers(0, (1 << 32) - 1))
def test_every_row_is_on_one_side_and_neither_side_is_empty(count: int, share: float, seed: int) -> None:
    learnt, held_back = split(range(count), share, seed)
    assert sorted([*learnt, *held_back]) == list(range(count))
    assert learnt == sorted(learnt) and held_back == sorted(held_back)
    assert len(held_back) == max(1, round(share * count)) and learnt


def test_the_same_seed_holds_the_same_rows_back_on_every_machine() -> None:
    assert split(range(20), 0.2, 42)[1] == [0, 2, 18, 19]
    assert split(range(20), 0.2, 43)[1] != [0, 2, 18, 19]
    assert split(range(20), 0.0, 42) == (list(range(20)), [])


def test_a_share_that_leaves_nothing_to_learn_is_refused() -> None:
    with pytest.raises(UsageError, match=r"config.data.eval_share: 0.5 of 1 rows leaves nothing to learn"):
        split(["one"], 0.5, 0)


def test_early_stopping_without_rows_to_evaluate_on_is_refused() -> None:
    with pytest.raises(UsageError, match=r"config.train.early_stopping: early stopping needs evaluations; hold some"):
        require_evaluation(FinetuneConfig(model="m", train=Train(early_stopping=2)))
    require_evaluation(FinetuneConfig(model="m", train=Train(early_stopping=2), data=Data(eval_share=0.1)))


def test_patience_ends_when_so_many_evaluations_were_no_better() -> None:
    told = [Evaluation(step, loss) for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.0))]
    best = Evaluation(20, 2.0)
    assert not out_of_patience(told[:3], best, 2)
    assert out_of_patience(told, best, 2)
    assert not out_of_patience(told, best, 0)
    # A resumed run evaluates a step again: that is no second evaluation.
    assert not out_of_patience([*told[:3], told[2]], best, 2)


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    assert not is_better(Evaluation(1, math.nan), None)
    assert out_of_patience([Evaluation(1, math.nan), Evaluation(2, math.nan)], None, 2)
    assert is_better(Evaluation(2, 1.0), Evaluation(1, 1.1)) and not is_better(Evaluation(2, 1.0), Evaluation(1, 1.0))


def test_the_trainers_history_is_read_for_evaluations_alone() -> None:
    history: list[dict[str, float]] = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "eval_loss": 2.5, "eval_runtime": 1.0},
        {"train_runtime": 9},
    ]
    assert evaluations_in(history) == [Evaluation(2, 2.5)]


def test_a_kept_adapters_record_is_read_back_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    write_record(tmp_path, Evaluation(5, 1.25))
    assert read_record(tmp_path) == Evaluation(5, 1.25)
    (tmp_path / "evaluation.json").write_text('["step"]')
    assert read_record(tmp_path) is None


def test_an_evaluation_joins_its_steps_figures() -> None:
    events = [
        ev.Metric(step=2, values={"loss": 3.0, "grad_norm": 1.0}),
        ev.Metric(step=2, values={"eval_loss": 4.0}),
        ev.Metric(step=2, values={"loss": 2.0, "grad_norm": 1.5}),
    ]
    assert ev.metrics_by_step(events) == {2: {"loss": 2.0, "grad_norm": 1.5, "eval_loss": 4.0}}


def test_the_evaluation_loss_is_drawn_into_the_losss_chart_and_no_other() -> None:
    metrics = {step: {"loss": 3.0 / step, "grad_norm": 1.0} for step in range(1, 9)}
    metrics[4]["eval_loss"], metrics[8]["eval_loss"] = 2.0, 1.0
    loss, norm = report.curves(metrics)
    assert "evaluation, step 8: 1" in loss.svg and 'class="line second"' in loss.svg
    assert "second" not in norm.svg


def test_a_chart_is_as_wide_as_both_lines() -> None:
    alone = charts.line_chart("Loss", [(1.0, 1.0), (2.0, 2.0)])
    both = charts.line_chart("Loss", [(1.0, 1.0), (2.0, 2.0)], also=("e", [(3.0, 9.0)]))
    assert ">3</text>" not in alone and ">3</text>" in both and ">10</text>" in both
    assert charts.line_chart("Loss", [(1.0, 1.0)], also=("e", [(2.0, math.nan)])).count("line second") == 0


def test_the_verdict_says_which_step_was_saved() -> None:
    result = {"best_step": 40, "best_eval_loss": 1.25, "saved_step": 40, "stopped_early": True}
    assert report.verdict(result, None) == (
        "Evaluated best at step 40: loss 1.25; training ended early, with no better one since. "
        "The adapter saved is that of step 40."
    )
