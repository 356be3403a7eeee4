"""QLoRA from beginning to end, to be read top to bottom."""

from __future__ import annotations

import gc
import platform
import time
from importlib.metadata import version
from typing import Any

import torch
from transformers import set_seed

from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.errors import CheckError
from radeon_stack.runs.events import Phase, Sample, read_events
from radeon_stack.workloads.finetune import adapter, base, merging, training
from radeon_stack.workloads.finetune.checkpoints import Checkpoint
from radeon_stack.workloads.finetune.data import Rows
from radeon_stack.workloads.finetune.encoding import encode_rows
from radeon_stack.workloads.finetune.sampling import first_logits, generate, sample
from radeon_stack.workloads.job import Job


def finetune(job: Job, config: FinetuneConfig, rows: Rows, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Fine-tune (from a checkpoint if there is one), save, merge and check; returns the result's figures."""
    job.fact("environment", environment())
    set_seed(config.train.seed)
    dtype = base.DTYPES[config.train.precision]
    question = config.samples.prompt or rows.question
    answer = config.samples.expected or (rows.answer if question == rows.question else None)
    job.fact("prompt", {"prompt": question, "expected": answer})

    folder = base.base_folder(job)
    tokenizer = base.load_tokenizer(folder)
    encoded = encode_rows(job, tokenizer, rows.rows, max_length=config.data.max_length, loss_on=config.data.loss_on)
    tokens = sum(len(row.input_ids) for row in encoded)
    job.fact(
        "data",
        {"name": rows.name, "rows": len(encoded), "tokens_mean": tokens / len(encoded), "sample": encoded[0].text},
    )
    model = base.load_for_training(job, folder, config.quantization, dtype)
    result: dict[str, Any] = {"steps": config.train.steps, "samples": config.samples.count}

    def ask(phase: Phase, of: Any) -> None:
        if question and config.samples.count:
            if of is not None:
                sample(job, of, tokenizer, config.samples, phase, question, answer, config.train.seed)
            result.update(score(job, phase))

    # What was asked before training was told by the attempt that this one continues.
    ask("before", None if checkpoint else model)
    trainer = training.trainer_for(job, config, model, tokenizer, encoded)
    job.fact("train_arguments", train_arguments(trainer.args))
    job.fact("model", base.describe(trainer.model, folder, job.arguments.model))
    if not checkpoint:
        job.fact("lora_before", adapter.statistics(trainer.model))

    output = training.train(job, trainer, checkpoint.path if checkpoint else None)
    job.fact("trainer_output", output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result |= {"final_loss": losses[-1], "train_seconds": output["train_runtime"]}
    job.fact("lora_after", adapter.statistics(trainer.model))
    result["peak_memory_bytes"] = base.peak_memory()
    ask("after", trainer.model)
    saved = merging.save_adapter(job, trainer.model, tokenizer)
    if config.export.merge:
        del trainer, model  # room for the 16-bit base
        gc.collect()
        merged, merged_folder = merging.merge(
            job, base.load_16bit(job, folder, dtype, "load 16 bit", on=torch.device("cpu")), folder, saved, tokenizer
        )
        reloaded = base.load_16bit(job, merged_folder, dtype, "reload", on=base.device())
        if question:
            check_reloaded(job, config, merged, reloaded, tokenizer, question)
        ask("merged", reloaded)
    return result


def score(job: Job, phase: Phase) -> dict[str, float]:
    """Right answers of a phase, their number and share; {} where no answer was expected."""
    events = read_events(job.arguments.run / "events.jsonl")
    asked = {e.index: e.correct for e in events if isinstance(e, Sample) and e.phase == phase and e.correct is not None}
    if not asked:
        return {}
    right = sum(map(bool, asked.values()))
    return {f"correct_{phase}": right, f"right_{phase}": right / len(asked)}


def check_reloaded(job: Job, config: FinetuneConfig, merged: Any, reloaded: Any, tokenizer: Any, question: str) -> None:
    """CheckError unless the model read back from disk answers as the one in memory does."""
    greedy = config.samples.model_copy(update={"temperature": 0.0, "count": 1})
    job.progress("check answers", 0, 1)
    kept = merged.to(reloaded.device)
    difference = (first_logits(kept, tokenizer, question) - first_logits(reloaded, tokenizer, question)).abs().max()
    answers = [generate(m, tokenizer, greedy, question, 0)[0] for m in (kept, reloaded)]
    job.fact(
        "reloaded",
        {"logit_difference": difference.item(), "same_answer": answers[0] == answers[1], "greedy_answer": answers[1]},
    )
    if answers[0] != answers[1]:
        raise CheckError(f"reloaded, the merged model answers {answers[1]!r}, in memory {answers[0]!r}", where="merged")
    job.progress("check answers", 1, 1)


def environment() -> dict[str, Any]:
    """Versions and device, for the record."""
    packages = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
    found = base.device()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "hip": torch.version.hip,
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
