"""Stock TRL training, told step by step; checkpoints that are whole or not there."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from trl import SFTConfig, SFTTrainer

from radeon_stack.contracts.finetune import FinetuneConfig, Train
from radeon_stack.kernels.adapters import add_experts_lora
from radeon_stack.workloads.finetune import ranks, sharded, unsloth_backend
from radeon_stack.workloads.finetune.adapter import experts_alpha, load_into, lora_config
from radeon_stack.workloads.finetune.base import DTYPES
from radeon_stack.workloads.finetune.batches import RowsTrainer, dataset
from radeon_stack.workloads.finetune.callbacks import Evaluator, Ledger, Rate, Recompute, Teller, Watcher
from radeon_stack.workloads.finetune.checkpoints import Checkpoint, best_folder, scratch
from radeon_stack.workloads.finetune.encoding import Encoded
from radeon_stack.workloads.finetune.evaluation import evaluations_in, out_of_patience, read_record
from radeon_stack.workloads.finetune.loss import Tally, use_head
from radeon_stack.workloads.finetune.packing import FLASH, batches_told, packed, padding_in_order
from radeon_stack.workloads.job import Job, StopRequested


def trainer_for(
    job: Job,
    config: FinetuneConfig,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Encoded],
    held_back: Sequence[Encoded] = (),
) -> SFTTrainer:
    """An SFTTrainer with the adapter on the model and the rows as they were encoded, or in packs of them."""
    room = config.data.max_length
    packs, evaluated = (packed(part, room) if config.data.packing else [] for part in (rows, held_back))
    flat = model.config._attn_implementation == FLASH
    unsloth = config.backend == "unsloth"
    trainer = RowsTrainer(
        unsloth_backend.adapted(model, config) if unsloth else model,
        args=sft_arguments(config, scratch(job.artifacts), evaluate=bool(held_back)),
        train_dataset=dataset(packs or rows),
        eval_dataset=dataset(evaluated or held_back) if held_back else None,
        processing_class=tokenizer,
        peft_config=None if unsloth else lora_config(config.lora, model, config.speed),
    )
    if not unsloth:
        trainer.tally = Tally()
        dtype = DTYPES[config.train.precision]
        job.fact("head", use_head(trainer.model.get_base_model(), dtype) if config.speed.head else "off (speed.head)")
    told = batches_told(rows, packs, config.train.batch_size, flat=flat)
    if packs:
        trainer.take_packs(flat=flat)
    elif config.data.group_by_length:
        order = trainer.group([len(row.input_ids) for row in rows], config.train.data_seed)
        told["padding_ungrouped"] = told["padding"]
        told["padding"] = padding_in_order([order.lengths[row] for row in order], config.train.batch_size)
    job.fact("batches", told)
    if config.lora.experts_rank:
        add_experts_lora(trainer.model, config.lora.experts_rank, experts_alpha(config.lora))
    ranks.leave_to_each_process(trainer.model)
    if config.train.parallel == "sharded":
        sharded.average_adapters(trainer.accelerator)
    if not unsloth and not config.train.offload_activations:
        trainer.add_callback(Recompute(job, config.speed))
    # In this order: a loss is told before it is judged.
    trainer.add_callback(Teller(job, config.train.steps))
    if config.export.tensorboard and job.rank.first:
        from radeon_stack.workloads.finetune.tensorboard import Curves

        trainer.add_callback(Curves(job))
    trainer.add_callback(Watcher(job, config))
    trainer.add_callback(Ledger(job, config.train.optimizer))
    trainer.add_callback(Rate(config.train.learning_rate))
    if held_back:
        trainer.add_callback(Evaluator(job, config.train.early_stopping))
    return trainer


def sft_arguments(config: FinetuneConfig, folder: Path, *, evaluate: bool = False) -> SFTConfig:
    """The recipe's settings in TRL's words."""
    train = config.train
    return SFTConfig(
        output_dir=str(folder),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler,
        warmup_steps=min(math.ceil(train.warmup * train.steps), train.steps - 1),  # in its first one nothing is learnt
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optimizer,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        **_checkpointing(train),
        seed=train.seed,
        data_seed=train.data_seed,
        save_steps=train.checkpoint_every,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would show the mean of the losses before in a nan's place
        eval_strategy="steps" if evaluate else "no",
        eval_steps=train.eval_every,
        per_device_eval_batch_size=train.batch_size,
        prediction_loss_only=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        dataset_kwargs={"skip_prepare_dataset": True},  # rows come encoded
        max_length=None,
        # It teaches routers to spread tokens over experts. They are frozen here: it would bend what is before them.
        router_aux_loss_coef=0.0,
        report_to=[],
        ddp_find_unused_parameters=False,
        ddp_timeout=int(ranks.PATIENCE.total_seconds()),
        disable_tqdm=True,
    )


def _checkpointing(train: Train) -> dict[str, Any]:
    """Which layers are computed again, and where what is kept of them waits, in the words of the transformers there is.

    Before 5.23, which unsloth's releases want, it was called otherwise, and was all layers or none.
    """
    wanted = bool(train.gradient_checkpointing)
    if "activation_checkpointing" not in SFTConfig.__dataclass_fields__:
        return {"gradient_checkpointing": wanted, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    offload = train.offload_activations and torch.cuda.is_available()
    settings = {"use_reentrant": False, "every_n_layers": train.every_n_layers, "offload": offload}
    return {"activation_checkpointing": wanted, "activation_checkpointing_kwargs": settings}


def train(job: Job, trainer: SFTTrainer, checkpoint: Checkpoint | None, patience: int = 0) -> dict[str, float]:
    """Train, from a checkpoint if there is one; returns the trainer's own figures, {} when no step was left.

    StopRequested after a clean stop, with the step whose checkpoint was written.
    """
    if checkpoint:
        state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
        best = read_record(best_folder(job.artifacts))
        if checkpoint.step >= trainer.args.max_steps or out_of_patience(
            evaluations_in(state.log_history), best, patience
        ):
            # Resumed here, the trainer would take one step more than it was told to (transformers 5.23).
            load_into(trainer.model, checkpoint.path)
            trainer.state = state
            return {}
    with job.deferred_stop():
        output = trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    ranks.meet()
    if job.rank.first:
        shutil.rmtree(scratch(job.artifacts), ignore_errors=True)
    if ranks.any_of(job.stop_asked):
        raise StopRequested("training", trainer.state.global_step)
    return dict(output.metrics)


def take_best(job: Job, trainer: SFTTrainer, patience: int) -> dict[str, Any]:
    """What the evaluations came to; with `patience`, the trained adapter becomes the best one's.

    {} where nothing was evaluated, else {"eval_loss", "best_step", "best_eval_loss", "saved_step", "stopped_early"}.
    """
    evaluations = evaluations_in(trainer.state.log_history)
    if not evaluations:
        return {}
    steps = trainer.state.global_step
    kept = read_record(best_folder(job.artifacts)) if patience else None
    if kept and kept.step != steps:
        load_into(trainer.model, best_folder(job.artifacts))
    best = kept or min(evaluations, key=lambda one: (one.loss != one.loss, one.loss))
    return {
        "eval_loss": evaluations[-1].loss,
        "best_step": best.step,
        "best_eval_loss": best.loss,
        "saved_step": kept.step if kept else steps,
        "stopped_early": steps < trainer.args.max_steps,
    }
