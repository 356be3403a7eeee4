"""Rows that are held back: evaluated on, never learnt, and heeded."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.errors import Exit
from radeon_stack.runs import events as ev
from radeon_stack.workloads.finetune.checkpoints import last_checkpoint
from radeon_stack.workloads.job import StopRequested
from tests.conftest import Cli
from tests.work.test_training import job_in, nf4

pytestmark = pytest.mark.work
LOCAL = ("--engine", "local")


def config(**train: Any) -> Any:
    from radeon_stack.contracts.finetune import Data, FinetuneConfig, Lora, Train

    # Far too high a rate, and what is held back is unlike what is learnt: each evaluation is worse than the one before.
    defaults: dict[str, Any] = {
        "steps": 40,
        "batch_size": 2,
        "gradient_accumulation": 1,
        "learning_rate": 0.3,
        "warmup": 0.0,
    }
    defaults |= {"eval_every": 4, "checkpoint_every": 8, "scheduler": "constant", "gradient_checkpointing": False}
    return FinetuneConfig(
        model="m", lora=Lora(rank=4), train=Train(**(defaults | train)), data=Data(eval_share=0.25, max_length=32)
    )


def trainer(job: Any, tiny_model: Path, settings: Any) -> Any:
    from transformers import AutoTokenizer, set_seed

    from radeon_stack.workloads.finetune import training
    from radeon_stack.workloads.finetune.encoding import encode_rows
    from radeon_stack.workloads.finetune.forms import Row

    set_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [f"The number {n} is followed by {n + 1}." for n in range(12)], ["Wer weiss, was danach kommt"] * 4
    learnt, held_back = (
        encode_rows(job, tokenizer, [Row(text=text) for text in these], max_length=32, loss_on="all") for these in texts
    )
    model = nf4(tiny_model, job)
    model.model.norm.weight.data *= 8  # what it says, it says firmly: it has more to lose
    return training.trainer_for(job, settings, model, tokenizer, learnt, held_back)


def adapter_of(model: Any) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("checkpoint_every", [4, 8], ids=["with the evaluation", "before it"])
def test_training_ends_when_nothing_is_better_and_the_best_adapter_is_taken(
    tiny_model: Path, tmp_path: Path, checkpoint_every: int
) -> None:
    import torch
    from safetensors.torch import load_file

    from radeon_stack.workloads.finetune import training
    from radeon_stack.workloads.finetune.checkpoints import best_folder

    job, told = job_in(tmp_path)
    settings = config(early_stopping=2, checkpoint_every=checkpoint_every)
    trained = trainer(job, tiny_model, settings)
    training.train(job, trained, None, 2)
    last = adapter_of(trained.model)
    result = training.take_best(job, trained, 2)
    losses = {e.step: e.values["eval_loss"] for e in told if isinstance(e, ev.Metric) and "eval_loss" in e.values}
    best = min(losses, key=lambda step: losses[step])
    assert trained.state.global_step == best + 2 * 4 < 40
    assert result == {
        "eval_loss": list(losses.values())[-1],
        "best_step": best,
        "best_eval_loss": losses[best],
        "saved_step": best,
        "stopped_early": True,
    }
    taken = adapter_of(trained.model)
    kept = load_file(best_folder(job.artifacts) / "adapter_model.safetensors")
    for name, weight in taken.items():
        assert torch.equal(weight.float(), kept[name.replace(".default", "")].float()), name
    assert any(not torch.equal(weight, last[name]) for name, weight in taken.items())

    # Taken up again after its end (killed while merging, say): it ends at the same step, with the same adapter.
    again = trainer(job, tiny_model, settings)
    training.train(job, again, last_checkpoint(job.artifacts), 2)
    assert again.state.global_step == best + 2 * 4
    assert training.take_best(job, again, 2) == result
    for name, weight in adapter_of(again.model).items():
        assert torch.equal(weight, taken[name]), name


def test_figures_that_wait_until_a_step_is_told_are_those_that_trl_tells(tiny_model: Path, tmp_path: Path) -> None:
    from radeon_stack.workloads.finetune import training

    settings = config(steps=4, gradient_accumulation=2, eval_every=2, learning_rate=1e-2)
    told: dict[str, list[dict[str, float]]] = {}
    for name in ("waiting", "trl"):
        job, events = job_in(tmp_path / name)
        trained = trainer(job, tiny_model, settings)
        trained.tally = trained.tally if name == "waiting" else None
        training.train(job, trained, None)
        told[name] = [event.values for event in events if isinstance(event, ev.Metric)]
    assert len(told["trl"]) == 4 + 2
    for waiting, trl in zip(told["waiting"], told["trl"], strict=True):
        assert waiting == pytest.approx(trl, rel=1e-6)
        assert any(name.endswith("mean_token_accuracy") for name in waiting)
    steps = [one for one in told["waiting"] if "loss" in one]
    assert all({"entropy", "num_tokens", "grad_norm"} <= one.keys() for one in steps)


def test_an_adapter_is_resumed_to_the_bit_and_in_its_dtype(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    from radeon_stack.workloads.finetune import training

    usual = {"eval_every": 100, "checkpoint_every": 3, "learning_rate": 1e-2}
    job, _ = job_in(tmp_path / "whole")
    whole = trainer(job, tiny_model, config(steps=6, **usual))
    training.train(job, whole, None)
    job, _ = job_in(tmp_path / "halves")
    training.train(job, trainer(job, tiny_model, config(steps=3, **usual)), None)
    resumed = trainer(job, tiny_model, config(steps=6, **usual))
    training.train(job, resumed, last_checkpoint(job.artifacts))
    expected, found = adapter_of(whole.model), adapter_of(resumed.model)
    assert {one.dtype for one in found.values()} == {torch.bfloat16}
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def test_without_patience_the_last_adapter_is_kept_and_the_best_step_is_told(tiny_model: Path, tmp_path: Path) -> None:
    from radeon_stack.workloads.finetune import training

    job, _ = job_in(tmp_path)
    trained = trainer(job, tiny_model, config(steps=10))
    training.train(job, trained, None)
    result = training.take_best(job, trained, 0)
    assert (result["saved_step"], result["stopped_early"]) == (10, False)
    assert result["best_eval_loss"] < result["eval_loss"]  # of the last step, which is evaluated too
    assert [path.name for path in (job.artifacts / "checkpoints").iterdir()] == ["step-10"]


def test_a_stop_while_evaluating_is_heeded_at_once(tiny_model: Path, tmp_path: Path) -> None:
    from radeon_stack.workloads.finetune import training
    from radeon_stack.workloads.finetune.callbacks import Evaluator

    class Impatient(Evaluator):
        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            job.on_signal(signal.SIGTERM, None)
            super().on_prediction_step(*args, **kwargs)

    job, _ = job_in(tmp_path)
    trained = trainer(job, tiny_model, config(eval_every=9))
    trained.remove_callback(Evaluator)
    trained.add_callback(Impatient(job, 0))
    with pytest.raises(StopRequested) as stopped:
        training.train(job, trained, None)
    assert (stopped.value.stage, stopped.value.step) == ("evaluating", 8)


def test_a_run_with_rows_held_back_shows_their_loss(cli: Cli, tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    rows = [{"prompt": f"What follows {n}?", "completion": str(n + 1)} for n in range(40)]
    (tmp_path / "numbers.json").write_text(json.dumps(rows))
    sets = ("--set", "data.eval_share=0.1", "--set", "train.eval_every=5", "--set", "export.merge=false")
    result = cli(*tiny_run, *LOCAL, "--data", "numbers.json", *sets, cwd=tmp_path)
    assert result.code == Exit.OK, result.err
    told = result.json
    data = told["facts"]["data"]
    assert (data["form"], data["rows"], data["rows_held_back"], data["held_back_also_learnt"]) == ("prompt", 36, 4, 0)
    evaluated = {metric["step"]: metric["eval_loss"] for metric in told["metrics"] if "eval_loss" in metric}
    assert list(evaluated) == [5, 10, 12]
    assert [metric["step"] for metric in told["metrics"] if "loss" in metric] == list(range(1, 13))
    assert told["result"]["eval_loss"] == evaluated[12] and told["result"]["saved_step"] == 12
    report = Path(told["report"]).read_text()
    assert "Evaluated best at step" in report and report.count('class="line second"') >= 2


def test_rows_that_were_learnt_too_are_counted_among_those_held_back(tiny_model: Path, tmp_path: Path) -> None:
    from radeon_stack.contracts.finetune import Data
    from radeon_stack.workloads.finetune.base import load_tokenizer
    from radeon_stack.workloads.finetune.data import read_rows
    from radeon_stack.workloads.finetune.encoding import encode_rows
    from radeon_stack.workloads.finetune.evaluation import split
    from radeon_stack.workloads.finetune.story import data_facts

    rows = read_rows(Data(copies=100), None)
    job, _ = job_in(tmp_path)
    encoded = encode_rows(job, load_tokenizer(tiny_model), rows.rows, max_length=256, loss_on="all")
    facts = data_facts(rows, *split(encoded, 0.1, 3407))
    assert (facts["rows"], facts["rows_held_back"], facts["held_back_also_learnt"]) == (90, 10, 10)


def test_early_stopping_without_evaluations_is_refused_before_torch(cli: Cli, tiny_run: tuple[str, ...]) -> None:
    result = cli(*tiny_run, *LOCAL, "--set", "train.early_stopping=3")
    assert result.code == Exit.USAGE
    assert "config.train.early_stopping: early stopping needs evaluations" in result.error
