"""A loss that is not sound any more is told at once, and a merely noisy one never."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.contracts.finetune import FinetuneConfig, Lora, Quantization, Train
from radeon_stack.workloads.finetune.health import Figures, Watch, bound, diagnosis, figures_in, remedy


def seen(losses: list[float], watch: Watch | None = None, norms: list[float] | None = None) -> tuple[str, Watch]:
    """What the first unsound step says, and the watch at it."""
    watch = watch or Watch()
    for step, loss in enumerate(losses, 1):
        if what := watch.see(Figures(step, loss, norms[step - 1] if norms else 1.0, 5e-5)):
            return what, watch
    return "", watch


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_at_that_step(value: float) -> None:
    what, watch = seen([2.0, 1.9, value, 1.8])
    assert what == f"the loss is {value}" and watch.steps[-1].step == 3
    assert [one.loss for one in watch.sound] == [2.0, 1.9]


def test_a_gradient_norm_that_is_no_number_ends_too_but_for_fp16_whose_scaler_skips_the_step() -> None:
    norms = [1.0, math.inf, *[1.0] * 40]
    assert seen([2.0] * 42, norms=norms)[0] == "the gradient norm is inf"
    assert seen([2.0] * 42, Watch(scaled=True), norms)[0] == ""
    what, watch = seen([2.0] * 42, Watch(scaled=True), [1.0, *[math.inf] * 41])
    assert what == "the gradient norm is inf, 20 steps in a row" and watch.steps[-1].step == 21


def test_ten_steps_in_a_row_above_the_start_are_divergence_and_nine_are_not() -> None:
    calm = [2.0, 2.2, *[1.8] * 18]
    assert seen([*calm, *[3.3] * 9, 1.8, *[3.3] * 9])[0] == ""
    what, watch = seen([*calm, *[3.3] * 10])
    assert what == "the loss diverges: 10 steps in a row above 3.2, the last at 3.3"
    assert [one.step for one in watch.sound][-1] == 20


def test_a_run_that_diverges_within_its_first_steps_is_found_too() -> None:
    what, watch = seen([2.0, 2.1, *[8.0] * 20])
    assert what.startswith("the loss diverges: 10 steps in a row above 6.2") and watch.steps[-1].step == 12
    assert [one.step for one in watch.sound] == [1, 2]


def test_the_bound_is_the_lower_of_the_two_and_needs_ten_steps_for_the_first() -> None:
    assert bound([1.0, 1.5]) == 5.0
    assert bound([1.0, 1.5, *[1.2] * 8]) == 2.5
    assert bound([1.0, 1.5, *[9.0] * 8]) == 5.0


def test_losses_of_very_different_rows_are_not_taken_for_divergence() -> None:
    dice = random.Random(7)
    for _ in range(200):
        losses = [max(0.01, dice.gauss(1.5, 0.8)) for _ in range(500)]
        assert seen(losses)[0] == ""


def test_what_was_learnt_by_heart_may_rise_again() -> None:
    assert seen([5.1, 4.8, *[5.0 / 2**n for n in range(10)], *[0.03] * 50, *[0.9] * 50])[0] == ""


def test_divergence_is_not_judged_when_that_is_switched_off_but_nan_is() -> None:
    assert seen([2.0] * 20 + [50.0] * 30, Watch(divergence=False))[0] == ""
    assert seen([2.0] * 20 + [math.nan], Watch(divergence=False))[0] == "the loss is nan"


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60), st.booleans())
def test_any_losses_are_judged_and_diagnosed(losses: list[float], scaled: bool) -> None:
    what, watch = seen(losses, Watch(scaled=scaled))
    if what:
        assert f"at step {watch.steps[-1].step}" in diagnosis(what, watch)
        assert remedy(config(), watch, checkpoint=None, amd=True)
    else:
        assert all(math.isfinite(loss) for loss in losses)


def config(precision: str = "bf16", **train: object) -> FinetuneConfig:
    return FinetuneConfig(model="m", train=Train.model_validate({"precision": precision, **train}), lora=Lora(rank=16))


def test_the_diagnosis_has_step_last_losses_norm_and_rate() -> None:
    what, watch = seen([2.0, 1.5, 1.25, 1.0, math.nan], norms=[1.0, 1.0, 1.0, 1.5, 812.0])
    assert diagnosis(what, watch) == (
        "the loss is nan at step 5; before it 1.5, 1.25, 1 (to step 4); "
        "gradient norm 812, 1 was usual; learning rate 5e-05"
    )


def test_the_remedy_names_a_lower_rate_and_the_checkpoint_to_go_on_from() -> None:
    _, watch = seen([2.0, 1.5, math.nan])
    assert remedy(config(), watch, checkpoint=2, amd=False) == (
        "lower the rate: --resume RUN (from step 2) with --set train.learning_rate=1e-05"
    )
    assert "a new run with --set train.learning_rate=1e-05" in remedy(config(), watch, checkpoint=None, amd=False)


def test_the_remedy_speaks_of_fp16_and_of_a_missing_warm_up_where_they_are_at_fault() -> None:
    _, watch = seen([2.0, math.inf])
    told = remedy(config("fp16", warmup=0.0), watch, checkpoint=None, amd=False)
    assert "--set train.precision=bf16" in told and "--set train.warmup=0.1" in told


def test_nan_from_the_first_step_is_not_blamed_on_the_rate() -> None:
    what, watch = seen([math.nan])
    assert "before anything was learnt" in diagnosis(what, watch)
    told = remedy(config(), watch, checkpoint=None, amd=False)
    assert "learning_rate" not in told and "radeon-stack run probe" in told


def test_known_issues_are_named_on_amd_gpus_alone_and_only_those_that_fit() -> None:
    _, watch = seen([2.0, math.nan])
    told = remedy(config(), watch, checkpoint=None, amd=True)
    assert "RS-KI-001" in told and "RS-KI-016" in told and "RS-KI-008" not in told and "doctor -v" in told
    other = FinetuneConfig(model="m", quantization=Quantization(kind="none"), train=Train(precision="fp32"))
    assert "known of AMD GPUs: RS-KI-008" in remedy(other, watch, checkpoint=None, amd=True)
    assert "RS-KI" not in remedy(config(), watch, checkpoint=None, amd=False)


def test_the_trainers_history_is_read_for_steps_alone() -> None:
    history = [{"step": 1, "loss": 3.0, "grad_norm": 1.0}, {"step": 1, "eval_loss": 2.5}]
    assert figures_in(history) == [Figures(1, 3.0, 1.0, None)]
