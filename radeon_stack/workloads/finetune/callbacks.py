"""What happens beside the steps: they are told, checkpoints find their place, evaluations are heeded."""

from __future__ import annotations

import os
import shutil
from typing import Any

from transformers import TrainerCallback

from radeon_stack import atomic
from radeon_stack.runs.events import Metric
from radeon_stack.workloads.finetune.checkpoints import best_folder, checkpoints, last_checkpoint, scratch
from radeon_stack.workloads.finetune.evaluation import (
    Evaluation,
    evaluations_in,
    is_better,
    out_of_patience,
    read_record,
    write_record,
)
from radeon_stack.workloads.job import Job, StopRequested


class Teller(TrainerCallback):
    """Tells each step, moves finished checkpoints to their place, and ends training when asked to."""

    def __init__(self, job: Job, steps: int) -> None:
        self._job = job
        self._steps = steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._job.progress("train", state.global_step, self._steps, unit="steps")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self._job.emit(Metric(step=state.global_step, values={key: float(value) for key, value in logs.items()}))
        self._job.progress("train", state.global_step, self._steps, unit="steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self._job.stop_asked:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False  # there is little time left
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = checkpoints(self._job.artifacts)
        made = scratch(self._job.artifacts) / f"checkpoint-{state.global_step}"
        kept = folder / f"step-{state.global_step}"
        shutil.rmtree(kept, ignore_errors=True)
        os.rename(made, kept)
        for older in folder.glob("step-*"):
            if older != kept:
                shutil.rmtree(older, ignore_errors=True)


class Evaluator(TrainerCallback):
    """Tells each evaluation; with `patience`, keeps the best adapter and ends training when none is better."""

    def __init__(self, job: Job, patience: int) -> None:
        self._job = job
        self._patience = patience

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._job.stage = "evaluate"
        if self._job.stop_asked:
            # An evaluation may last longer than one who stops a run will wait; the step before it is done again.
            saved = last_checkpoint(self._job.artifacts)
            raise StopRequested("evaluating", saved.step if saved else None)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any], model: Any = None, **_: Any
    ) -> Any:
        self._job.stage = "train"
        told = ("eval_loss", "eval_mean_token_accuracy")
        self._job.emit(
            Metric(step=state.global_step, values={name: float(metrics[name]) for name in told if name in metrics})
        )
        if not self._patience:
            return control
        found = Evaluation(state.global_step, float(metrics["eval_loss"]))
        folder = best_folder(self._job.artifacts)
        best = read_record(folder)
        if is_better(found, best):
            with atomic.whole_directory(folder) as partial:
                model.save_pretrained(partial)
                write_record(partial, found)
            best = found
        if out_of_patience(evaluations_in(state.log_history), best, self._patience):
            control.should_training_stop = True
        return control
