"""QLoRA from beginning to end, to be read top to bottom."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import set_seed

from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.contracts.options import AUTO
from radeon_stack.kernels import shipped
from radeon_stack.kernels.liger import use_liger
from radeon_stack.runs.events import Phase, Sample, read_events
from radeon_stack.workloads.finetune import (
    adapter,
    base,
    fp8,
    merging,
    ranks,
    sharded,
    sources,
    training,
    unsloth_backend,
)
from radeon_stack.workloads.finetune.architectures import require_packable
from radeon_stack.workloads.finetune.checkpoints import Checkpoint
from radeon_stack.workloads.finetune.data import Rows
from radeon_stack.workloads.finetune.encoding import Encoded, encode_rows
from radeon_stack.workloads.finetune.evaluation import split
from radeon_stack.workloads.finetune.fingerprint import Origin, fingerprint
from radeon_stack.workloads.finetune.sampling import sample
from radeon_stack.workloads.job import Job


def finetune(job: Job, config: FinetuneConfig, rows: Rows, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Fine-tune (from a checkpoint if there is one), save, merge and check; returns the result's figures."""
    ranks.join(job.rank)
    by_unsloth = config.backend == "unsloth"
    loading: Any = unsloth_backend.Loading.of(config) if by_unsloth else base
    job.fact("environment", environment(unsloth_backend.PACKAGES if by_unsloth else ()))
    set_seed(config.train.seed)
    dtype = base.DTYPES[config.train.precision]
    question = config.samples.prompt or rows.question
    answer = config.samples.expected or (rows.answer if question == rows.question else None)
    job.fact("prompt", {"prompt": question, "expected": answer})

    folder = ranks.first_then_all(job.rank, lambda: sources.base_folder(job, any_architecture=config.any_architecture))
    if config.data.packing:  # looked at before torch was imported, but for what several processes take from the hub
        require_packable(folder, config.data.max_length)
    origin = Origin(fingerprint(folder), sources.told_as(job.arguments.model, folder))
    tokenizer = base.load_tokenizer(folder)
    encoded = encode_rows(job, tokenizer, rows.rows, max_length=config.data.max_length, loss_on=config.data.loss_on)
    learnt, held_back = split(encoded, config.data.eval_share, config.train.seed)
    job.fact("data", data_facts(rows, learnt, held_back))
    parallel = config.train.parallel
    together = parallel == "sharded"
    model = loading.load_for_training(
        job, folder, config.quantization, dtype, config.model_options.attention, parallel=parallel
    )
    job.fact("liger", liger(model, config))
    result: dict[str, Any] = {"samples": config.samples.count}

    def ask(phase: Phase, of: Any) -> None:
        shared = together and phase != "merged"
        if question and config.samples.count and (job.rank.first or shared):
            if of is not None:
                settings, seed = config.samples, config.train.seed
                sample(job, of, tokenizer, settings, phase, question, answer, seed, together=shared)
            result.update(score(job, phase))

    # What was asked before training was told by the attempt that this one continues.
    ask("before", None if checkpoint else model)
    if together:
        sharded.put_away(model)
    trainer = training.trainer_for(job, config, model, tokenizer, learnt, held_back)
    job.fact("train_arguments", train_arguments(trainer.args))
    job.fact("model", base.describe(trainer.model, folder, job.arguments.model))
    if not checkpoint:
        job.fact("lora_before", adapter.statistics(trainer.model))

    if output := training.train(job, trainer, checkpoint, config.train.early_stopping):
        job.fact("trainer_output", output)
        result["train_seconds"] = output["train_runtime"]
        result["train_steps"] = trainer.state.global_step - (checkpoint.step if checkpoint else 0)
    if not together:
        ranks.part()
    if not (job.rank.first or together):
        return result
    result["steps"] = trainer.state.global_step
    result["final_loss"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    result |= training.take_best(job, trainer, config.train.early_stopping)
    job.fact("lora_after", adapter.statistics(trainer.model))
    result["peak_memory_bytes"] = base.peak_memory()
    ask("after", trainer.model)
    if together:
        ranks.part()
    if not job.rank.first:
        return result
    saved = merging.save_adapter(job, trainer.model, tokenizer, origin)
    if config.export.merge:
        del trainer, model
        free_memory()
        spread = parallel in ("layers", "sharded")
        with fp8.in_16_bit(job, folder, dtype) as whole:
            merged = merging.merge(job, whole, saved, tokenizer, given=folder)
        if config.export.reload == "quantized":
            over = "layers" if spread and torch.cuda.is_available() else "none"
            ask("merged", loading.load_for_training(job, merged, config.quantization, dtype, AUTO, parallel=over))
        else:
            # What one card could not train does not fit it in 16 bit either.
            device = torch.device("cpu") if spread else base.device()
            ask("merged", loading.load_16bit(job, merged, dtype, "reload", on=device))
    return result


def liger(model: Any, config: FinetuneConfig) -> str:
    """Put Liger's kernels in where they are wanted; what is in, or why nothing is."""
    if config.backend == "unsloth":
        return "off (unsloth has its own)"
    return use_liger(model) if config.speed.liger else "off (speed.liger)"


def data_facts(rows: Rows, learnt: Sequence[Encoded], held_back: Sequence[Encoded]) -> dict[str, Any]:
    """What is learnt and what is evaluated on, for the record."""
    tokens = sum(len(row.input_ids) for row in learnt)
    facts: dict[str, Any] = {
        "name": rows.name,
        "form": rows.form,
        "rows": len(learnt),
        "tokens_mean": tokens / len(learnt),
        "sample": learnt[0].text,
    }
    if held_back:
        known = {tuple(row.input_ids) for row in learnt}
        # An evaluation on what was learnt by heart says nothing; the reader shall see it.
        facts |= {
            "rows_held_back": len(held_back),
            "held_back_also_learnt": sum(tuple(row.input_ids) in known for row in held_back),
        }
    return facts


def free_memory() -> None:
    """Give back what nothing refers to any more, the accelerator's cached blocks included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def score(job: Job, phase: Phase) -> dict[str, float]:
    """Right answers of a phase, their number and share; {} where no answer was expected."""
    events = read_events(job.arguments.run / "events.jsonl")
    asked = {e.index: e.correct for e in events if isinstance(e, Sample) and e.phase == phase and e.correct is not None}
    if not asked:
        return {}
    right = sum(map(bool, asked.values()))
    return {f"correct_{phase}": right, f"right_{phase}": right / len(asked)}


def environment(more: Sequence[str] = ()) -> dict[str, Any]:
    """Versions and device, for the record."""
    packages = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", *more)
    found = base.device()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "hip": torch.version.hip,
        **({"compiled_kernels": shipped.count()} if shipped.folder() else {}),
        "device": torch.cuda.get_device_name(found) if found.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def train_arguments(args: Any) -> dict[str, Any]:
    """The effective train arguments, as plain data and without what is empty."""
    return {
        key: value
        for key, value in sorted(args.to_dict().items())
        if isinstance(value, str | int | float | bool | list | dict) and value not in ("", [], {})
    }
