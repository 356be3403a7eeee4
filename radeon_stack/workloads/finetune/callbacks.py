"""What happens beside the steps: they are told and watched, checkpoints find their place, evaluations are heeded."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from typing import Any

import torch
from transformers import TrainerCallback

from radeon_stack import atomic
from radeon_stack.contracts.finetune import FinetuneConfig, Speed
from radeon_stack.errors import WorkloadError
from radeon_stack.kernels.adapters import can_keep, can_spare
from radeon_stack.kernels.kept import Keeper
from radeon_stack.kernels.link import Link
from radeon_stack.kernels.recompute import checkpointed, use_recompute
from radeon_stack.runs.events import Metric
from radeon_stack.workloads.finetune import ranks
from radeon_stack.workloads.finetune.checkpoints import best_folder, checkpoints, last_checkpoint, scratch
from radeon_stack.workloads.finetune.evaluation import (
    Evaluation,
    evaluations_in,
    is_better,
    out_of_patience,
    read_record,
    write_record,
)
from radeon_stack.workloads.finetune.health import SHOWN, Watch, diagnosis, figures, figures_in, remedy
from radeon_stack.workloads.finetune.resident import available, resident
from radeon_stack.workloads.job import Job, StopRequested, TakenOverError

GIVE_UP = 2  # a stop is 1
SHARE_OF_HOST = 0.5  # of the memory that is free as training begins, for products that wait there


def told_of(logs: dict[str, Any]) -> dict[str, float]:
    """Of what the trainer logs, the figures of a step or of an evaluation; {} for what is neither."""
    if "loss" in logs:
        return {name: float(value) for name, value in logs.items()}
    return {name: float(logs[name]) for name in ("eval_loss", "eval_mean_token_accuracy") if name in logs}


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
        self._job.emit(Metric(step=state.global_step, values=told_of(logs)))
        self._job.progress("train", state.global_step, self._steps, unit="steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        wish = ranks.most_of(GIVE_UP if self._job.rank.first and self._job.taken_over() else int(self._job.stop_asked))
        if wish == GIVE_UP:
            raise TakenOverError(self._job.arguments.run)
        if wish:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False  # there is little time left
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        ranks.meet()  # each process adds its own state of chance to the folder
        if self._job.rank.first:
            self._keep(state)
        ranks.meet()

    def _keep(self, state: Any) -> None:
        self._job.require_own()
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
        if ranks.any_of(self._job.stop_asked):
            # An evaluation may last longer than one who stops a run will wait; the step before it is done again.
            saved = last_checkpoint(self._job.artifacts)
            raise StopRequested("evaluating", saved.step if saved else None)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any], model: Any = None, **_: Any
    ) -> Any:
        self._job.stage = "train"
        self._job.emit(Metric(step=state.global_step, values=told_of(metrics)))
        if not self._patience:
            return control
        found = Evaluation(state.global_step, float(metrics["eval_loss"]))
        folder = best_folder(self._job.artifacts)
        best = read_record(folder)
        better = is_better(found, best)
        ranks.meet()  # all have read it before the first one writes
        if better and self._job.rank.first:
            with atomic.whole_directory(folder) as partial:
                model.save_pretrained(partial)
                write_record(partial, found)
        best = found if better else best
        if out_of_patience(evaluations_in(state.log_history), best, self._patience):
            control.should_training_stop = True
        return control


class Watcher(TrainerCallback):
    """Ends training where the loss is not sound any more; the checkpoint before that stays the last."""

    def __init__(self, job: Job, config: FinetuneConfig) -> None:
        self._job = job
        self._config = config
        self._watch = Watch(config.train.precision == "fp16", config.train.stop_diverging)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for known in figures_in(state.log_history):
            self._watch.see(known)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> Any:
        if not logs or "loss" not in logs:
            return control
        watch = self._watch
        if what := watch.see(figures(state.global_step, logs)):
            self._give_up(what)
        if watch.above or watch.unscaled:
            # It may recover. If not, what is saved now would take the place of the last sound checkpoint.
            control.should_save = control.should_save and ranks.any_of(self._job.stop_asked)
        return control

    def _give_up(self, what: str) -> None:
        watch, saved = self._watch, last_checkpoint(self._job.artifacts)
        told = {
            "what": what,
            "step": watch.steps[-1].step,
            "last_sound": [asdict(one) for one in watch.sound[-SHOWN:]],
            "checkpoint": saved.step if saved else None,
        }
        self._job.fact("unsound_loss", told)
        raise WorkloadError(
            diagnosis(what, watch),
            where="train",
            remedy=remedy(
                self._config,
                watch,
                checkpoint=saved.step if saved else None,
                amd=torch.version.hip is not None,
            ),
        )


class Ledger(TrainerCallback):
    """Notes what is held between steps: what a step needs beyond it grows with the batch."""

    def __init__(self, job: Job, optimizer: str) -> None:
        self._job = job
        self._per_parameter = 2 if optimizer.endswith("_8bit") else 8  # bytes of state: two moments, of 1 or 4 bytes
        self._begun = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        held = torch.cuda.memory_allocated() if torch.cuda.is_available() else resident()
        if state.global_step == self._begun:
            # The first step brings gradients and optimizer states, which will stay or come again with every step.
            trained = [p for p in model.parameters() if p.requires_grad]
            held += sum(p.numel() * (p.element_size() + self._per_parameter) for p in trained)
        self._job.held = held


class Recompute(TrainerCallback):
    """Has the layers that transformers was told to compute again computed our way; it tells them as training begins."""

    def __init__(self, job: Job, speed: Speed) -> None:
        self._job, self._speed = job, speed
        self._keeper: Keeper | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model = getattr(model, "module", model)
        share = SHARE_OF_HOST / self._job.rank.beside
        self._keeper = keeper_for(model, int(share * available())) if self._speed.keep_products else None
        if not use_recompute(model, can_spare, self._keeper):
            self._keeper = None

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._keeper is not None:
            self._job.fact("products", self._keeper.close())


def keeper_for(model: Any, limit: int) -> Keeper | None:
    """Who keeps products of the layers that are computed again, where the host's memory is another than the card's.

    limit: bytes of it.
    """
    layers = checkpointed(model)
    devices = {parameter.device for parameter in model.parameters()}
    if len(layers) < 2 or len(devices) != 1 or (device := devices.pop()).type != "cuda":
        return None
    if torch.cuda.get_device_properties(device).is_integrated:
        return None
    return Keeper(layers, Link(device, limit), can_keep)


class Rate(TrainerCallback):
    """Has the configured learning rate hold after a resume: the optimizer and scheduler come back with the old one."""

    def __init__(self, learning_rate: float) -> None:
        self._rate = learning_rate

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
        if all(base == self._rate for base in scheduler.base_lrs):
            return
        for group, old in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] *= self._rate / old
            group["initial_lr"] = self._rate
        scheduler.base_lrs = [self._rate for _ in scheduler.base_lrs]
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
