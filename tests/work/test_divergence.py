"""A loss that breaks ends the run with a diagnosis, and what was sound before it can be continued."""

from __future__ import annotations

import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.errors import Exit, WorkloadError
from radeon_stack.runs import events as ev
from radeon_stack.workloads.finetune.checkpoints import last_checkpoint
from tests.conftest import Cli, wait_for
from tests.work.test_evaluation import LOCAL, config, trainer
from tests.work.test_runs import started, step_reached, the_run, workload
from tests.work.test_training import job_in

pytestmark = pytest.mark.work


def broken_at(step: int, trained: Any, value: float) -> None:
    """Have every loss from that step on be multiplied by the value."""
    sound = trained.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = sound(*args, **kwargs)
        return loss * value if trained.state.global_step + 1 >= step else loss

    trained.compute_loss = compute_loss


def calm(**train: Any) -> Any:
    return config(learning_rate=1e-3, eval_every=1000, checkpoint_every=5, **train)


def test_nan_ends_training_at_its_step_with_the_checkpoint_before_it(tiny_model: Path, tmp_path: Path) -> None:
    from radeon_stack.workloads.finetune import training

    job, told = job_in(tmp_path)
    trained = trainer(job, tiny_model, calm())
    broken_at(10, trained, math.nan)  # a step whose checkpoint would be due
    with pytest.raises(WorkloadError) as caught:
        training.train(job, trained, None)
    assert caught.value.what.startswith("the loss is nan at step 10; before it ")
    assert "--resume RUN (from step 5) with --set train.learning_rate=0.0002" in caught.value.remedy
    saved = last_checkpoint(job.artifacts)
    assert saved is not None and saved.step == 5
    metrics = [event for event in told if isinstance(event, ev.Metric)]
    assert math.isnan(metrics[-1].values["loss"]) and metrics[-1].step == 10
    fact = next(event.value for event in told if isinstance(event, ev.Fact) and event.name == "unsound_loss")
    assert isinstance(fact, dict) and fact["step"] == 10 and fact["checkpoint"] == 5


def test_no_checkpoint_of_a_diverging_loss_takes_the_place_of_a_sound_one(tiny_model: Path, tmp_path: Path) -> None:
    from radeon_stack.workloads.finetune import training

    job, _ = job_in(tmp_path)
    trained = trainer(job, tiny_model, calm())
    broken_at(18, trained, 12.0)
    with pytest.raises(WorkloadError, match="the loss diverges: 10 steps in a row above"):
        training.train(job, trained, None)
    assert trained.state.global_step == 27
    saved = last_checkpoint(job.artifacts)
    assert saved is not None and saved.step == 15


def test_a_lower_rate_holds_after_a_resume_and_the_same_one_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    from radeon_stack.workloads.finetune import training

    def rates(folder: Path, rate: float, resume: bool) -> dict[int, float]:
        job, told = job_in(folder)
        settings = calm(steps=20 if resume else 10, scheduler="linear")
        settings = settings.model_copy(update={"train": settings.train.model_copy(update={"learning_rate": rate})})
        trained = trainer(job, tiny_model, settings)
        training.train(job, trained, last_checkpoint(job.artifacts) if resume else None)
        return {e.step: e.values["learning_rate"] for e in told if isinstance(e, ev.Metric) and "loss" in e.values}

    rates(tmp_path / "a", 1e-3, False)
    same = rates(tmp_path / "a", 1e-3, True)
    rates(tmp_path / "b", 1e-3, False)
    lower = rates(tmp_path / "b", 2e-4, True)
    assert same.keys() == lower.keys() == set(range(11, 21))
    for step, rate in lower.items():
        assert rate == pytest.approx(same[step] / 5), step


def test_a_weight_that_is_no_number_is_exit_6_at_the_first_step(
    cli: Cli, tiny_run: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    damaged = shutil.copytree(tiny_model, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = math.nan
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    result = cli(*tiny_run, *LOCAL, "--model", damaged, "--set", "samples.count=0")
    assert result.code == Exit.WORKLOAD, result.err
    assert "train: the loss is nan at step 1; before anything was learnt; " in result.error
    assert "it is not the learning rate, but a weight, a row or a kernel" in result.error
    assert result.json["facts"]["unsound_loss"]["step"] == 1
    assert Path(result.json["report"]).stat().st_size > 5_000


def test_a_killed_run_goes_on_at_a_lower_rate_and_nothing_else_may_change(
    cli: Cli, tiny_run: tuple[str, ...], home: Path
) -> None:
    attached = started([*tiny_run, *LOCAL, "--set", "export.merge=false", "--set", "train.scheduler=constant"])
    run = the_run(home)
    process = workload(run)
    wait_for(lambda: step_reached(run, 4), what="step 4")
    os.kill(process.pid, signal.SIGKILL)
    attached.communicate(timeout=60)
    refused = cli("run", "--resume", "last", "--set", "train.steps=99")
    assert refused.code == Exit.USAGE
    assert "--set train.steps: cannot change while a run is continued; these can: train.learning_rate" in refused.error
    resumed = cli("run", "--resume", "last", "--json", "--set", "train.learning_rate=1e-6")
    assert resumed.code == Exit.OK, resumed.err
    rates = {metric["step"]: metric["learning_rate"] for metric in resumed.json["metrics"]}
    assert (rates[3], rates[12]) == (5e-4, 1e-6)
    # It is the run's rate from now on.
    assert run.read_json(run.config)["recipe"]["config"]["train"]["learning_rate"] == 1e-6  # type: ignore[index,call-overload]
