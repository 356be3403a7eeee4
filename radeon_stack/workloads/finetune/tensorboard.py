"""The curves of a run as TensorBoard's event files.

By tensorboardX: it needs protobuf besides what is here. torch's own writer needs the package `tensorboard`, and with it
a web server and gRPC. transformers' callback would begin a new run at each resume.
"""

from __future__ import annotations

import time
from typing import Any

from tensorboardX import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations import rewrite_logs

from radeon_stack.workloads.finetune.base import peak_memory
from radeon_stack.workloads.finetune.callbacks import told_of
from radeon_stack.workloads.job import Job

FLUSH_SECONDS = 1  # a writer's thread puts it on disk: what a process that is killed may lose


class Curves(TrainerCallback):
    """Draws what is told of steps and evaluations, and beside it tokens a second of a step and peak memory in bytes.

    For the first process alone. A resumed attempt has TensorBoard forget the steps that it takes again.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._writer: Any = None
        self._begun = 0.0
        self._tokens = 0.0  # counted anew in each attempt

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = str(self._job.artifacts / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=state.global_step + 1, flush_secs=FLUSH_SECONDS)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        told = told_of(logs or {})
        if "num_tokens" in told:
            seen, self._tokens = self._tokens, told["num_tokens"]
            told["tokens_per_second"] = (self._tokens - seen) / (time.monotonic() - self._begun)
            told["peak_memory_bytes"] = peak_memory()
        for name, value in rewrite_logs(told).items():
            self._writer.add_scalar(name, value, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._writer.close()
        self._job.artifact("tensorboard", self._job.artifacts / "tensorboard")
