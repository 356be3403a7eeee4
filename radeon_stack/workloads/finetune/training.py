"""Stock TRL training, told step by step; checkpoints that are whole or not there."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.kernels.adapters import add_experts_lora
from radeon_stack.runs.events import Metric
from radeon_stack.workloads.finetune import fp8, ranks
from radeon_stack.workloads.finetune.adapter import experts_alpha, lora_config
from radeon_stack.workloads.finetune.checkpoints import Checkpoint, checkpoints, scratch
from radeon_stack.workloads.finetune.encoding import Encoded
from radeon_stack.workloads.job import Job, StopRequested


def trainer_for(job: Job, config: FinetuneConfig, model: Any, tokenizer: Any, rows: Sequence[Encoded]) -> SFTTrainer:
    """An SFTTrainer with the adapter on the model and the rows as they were encoded."""
    data = Dataset.from_dict({"input_ids": [r.input_ids for r in rows], "labels": [r.labels for r in rows]})
    trainer = SFTTrainer(
        model,
        args=sft_arguments(config, scratch(job.artifacts)),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora_config(config.lora, model, config.speed),
    )
    if config.lora.experts_rank:
        add_experts_lora(trainer.model, config.lora.experts_rank, experts_alpha(config.lora))
    fp8.leave_to_each_process(trainer.model)
    trainer.add_callback(_Teller(job, config.train.steps))
    return trainer


def sft_arguments(config: FinetuneConfig, folder: Path) -> SFTConfig:
    """The recipe's settings in TRL's words."""
    train = config.train
    return SFTConfig(
        output_dir=str(folder),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler,
        warmup_steps=math.ceil(train.warmup * train.steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optimizer,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        activation_checkpointing=train.gradient_checkpointing,
        seed=train.seed,
        data_seed=train.data_seed,
        save_steps=train.checkpoint_every,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        dataset_kwargs={"skip_prepare_dataset": True},  # rows come encoded
        max_length=None,
        report_to=[],
        ddp_find_unused_parameters=False,
        ddp_timeout=int(ranks.PATIENCE.total_seconds()),
        disable_tqdm=True,
    )


def train(job: Job, trainer: SFTTrainer, checkpoint: Checkpoint | None) -> dict[str, float]:
    """Train, from a checkpoint if there is one; returns the trainer's own figures, {} when no step was left.

    StopRequested after a clean stop, with the step whose checkpoint was written.
    """
    if checkpoint and checkpoint.step >= trainer.args.max_steps:
        # Resumed here, the trainer would take one step more than it was told to (transformers 5.23).
        trainer.model.load_adapter(str(checkpoint.path), adapter_name="default", is_trainable=True)
        trainer.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
        return {}
    with job.deferred_stop():
        output = trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    ranks.meet()
    if job.rank.first:
        shutil.rmtree(scratch(job.artifacts), ignore_errors=True)
    if ranks.any_of(job.stop_asked):
        raise StopRequested("training", trainer.state.global_step)
    return dict(output.metrics)


class _Teller(TrainerCallback):
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
        if ranks.any_of(self._job.stop_asked):
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        ranks.meet()  # each process adds its own state of chance to the folder
        if self._job.rank.first:
            self._keep(state)
        ranks.meet()

    def _keep(self, state: Any) -> None:
        folder = checkpoints(self._job.artifacts)
        made = scratch(self._job.artifacts) / f"checkpoint-{state.global_step}"
        kept = folder / f"step-{state.global_step}"
        shutil.rmtree(kept, ignore_errors=True)
        os.rename(made, kept)
        for older in folder.glob("step-*"):
            if older != kept:
                shutil.rmtree(older, ignore_errors=True)
