"""`python -m radeon_stack.workloads.finetune --run DIR …`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.contracts.sections import HUB_PREFIX, is_made
from radeon_stack.workloads.finetune import unsloth_backend
from radeon_stack.workloads.finetune.architectures import require_known, require_packable
from radeon_stack.workloads.finetune.checkpoints import Checkpoint, last_checkpoint
from radeon_stack.workloads.finetune.data import read_rows
from radeon_stack.workloads.finetune.evaluation import require_evaluation
from radeon_stack.workloads.finetune.memory import advice, cpu_shortage, shortage
from radeon_stack.workloads.finetune.packing import require_batching
from radeon_stack.workloads.finetune.resident import available, most_resident, resident
from radeon_stack.workloads.imports import bring_bitsandbytes, uncollected
from radeon_stack.workloads.job import Job, Sizes, carry_out, read_config
from radeon_stack.workloads.ranks import leave

SIZES = Sizes(
    "config.train.batch_size",
    "lower it (--set train.batch_size=1), raise train.gradient_accumulation in its place, "
    "or set train.gradient_checkpointing=true",
)


def work(job: Job) -> dict[str, Any]:
    config = FinetuneConfig.model_validate(read_config(job.arguments.run))
    require_evaluation(config)
    require_batching(config)
    job.advise = lambda error: sizes_that_fit(job, config, error)
    # Bad data, and a model that cannot be had or trained, are told before torch's seconds of importing.
    rows = read_rows(config.data, job.arguments.data)
    if folder := folder_before_torch(job):
        require_known(folder, anyway=config.any_architecture)
        if config.data.packing:
            require_packable(folder, config.data.max_length)
    job.progress("import", 0, 1, note="torch, transformers, peft, trl")
    with uncollected():
        if config.backend == "unsloth":
            unsloth_backend.bring(job.arguments.cache)
        bring_bitsandbytes()
        from radeon_stack.workloads.finetune.story import finetune
    job.progress("import", 1, 1)
    return finetune(job, config, rows, continued(job))


def continued(job: Job) -> Checkpoint | None:
    """The checkpoint that this attempt goes on from."""
    return last_checkpoint(job.artifacts) if job.arguments.resume else None


def resumed_step(job: Job) -> int | None:
    checkpoint = continued(job)
    return checkpoint.step if checkpoint else None


def folder_before_torch(job: Job) -> Path | None:
    """The base's folder: one that is given, or of the hub; None where it is made, or other processes wait for it."""
    model = job.arguments.model
    if model.startswith(HUB_PREFIX) and job.rank.alone:
        from radeon_stack.workloads.finetune.hub import fetched

        return fetched(job)
    return None if is_made(model) else Path(model)


def sizes_that_fit(job: Job, config: FinetuneConfig, error: Exception) -> Sizes | None:
    """What to change after an error for want of memory; None where it has no figures."""
    found = shortage(str(error))
    torch = sys.modules.get("torch")
    if found is None:
        of_main = cpu_shortage(str(error), most=most_resident(), reachable=resident() + available())
        # Beside a GPU, one that does not say how much it was asked for may be the GPU's.
        found = of_main if of_main.asked or torch is None or not torch.cuda.is_available() else None
    return advice(found, config, stage=job.stage, held=job.held) if found else None


if __name__ == "__main__":
    leave(carry_out(sys.argv[1:], work, SIZES, resumed_step))
