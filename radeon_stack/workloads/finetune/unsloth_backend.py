"""unsloth in the place of our loading and kernels: its own public way, for the same recipe, adapter and checks.

https://docs.unsloth.ai (2026.10.9): `FastLanguageModel.from_pretrained`, `get_peft_model`, then TRL's trainer. It is
imported before transformers, whose classes it changes: in this process every model is loaded by it from then on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from radeon_stack.contracts.finetune import FinetuneConfig, Quantization, Speed
from radeon_stack.errors import CheckError, MachineError
from radeon_stack.workloads.job import Job

PACKAGES = ("unsloth", "unsloth_zoo")


def bring(cache: Path) -> None:
    """Import it, with nothing counted and its compiled code in the cache. MachineError where it is not installed."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache / "unsloth"))
    try:
        import_module("unsloth")
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        raise MachineError(
            "unsloth is not installed where the workload runs",
            where="config.backend",
            remedy="take an image that has it (make image ROCM=… ARCH=… KIND=train-unsloth); without one, an "
            "environment of its own (pip install 'radeon-stack[unsloth]'); or --set backend=trl",
        ) from error


@dataclass(frozen=True)
class Loading:
    """What `base` does to load a model, done by unsloth. `length`: tokens of the longest sequence."""

    length: int
    checkpointing: bool

    @classmethod
    def of(cls, config: FinetuneConfig) -> Loading:
        return cls(config.data.max_length + config.samples.max_new_tokens, bool(config.train.gradient_checkpointing))

    def load_for_training(
        self, job: Job, folder: Path, quantization: Quantization, dtype: Any, attention: str, *, parallel: str = "none"
    ) -> Any:
        """The frozen base on the device. CheckError when it is not quantised as asked."""
        from radeon_stack.workloads.finetune import base, fp8

        fp8.arguments(folder, quantization)  # refuses what is in FP8 already
        model = self._load(job, folder, dtype, "load", four_bit=quantization.kind == "nf4")
        base.keep_trainable_layout(model)
        base.check_quantized(model, quantization)
        if quantization.kind == "nf4" and (left := _experts_left(model)):
            raise CheckError(f"{left} is still in 16 bit", where="config.quantization.experts")
        return model

    def load_16bit(self, job: Job, folder: Path, dtype: Any, stage: str, *, on: Any) -> Any:
        """The model of a folder in 16 bit, on the device that unsloth takes."""
        return self._load(job, folder, dtype, stage, four_bit=False)

    def _load(self, job: Job, folder: Path, dtype: Any, stage: str, *, four_bit: bool) -> Any:
        from unsloth import FastLanguageModel

        from radeon_stack.workloads.finetune.bars import bars

        with bars(job, stage):
            model, _ = FastLanguageModel.from_pretrained(
                model_name=str(folder),
                max_seq_length=self.length,
                dtype=dtype,
                load_in_4bit=four_bit,
                load_in_16bit=not four_bit,
                use_gradient_checkpointing="unsloth" if self.checkpointing else False,
                local_files_only=True,
            )
        return model


def _experts_left(model: Any) -> str:
    """The name of a weight of experts that is not packed; "": none. Their classes may be unsloth's own."""
    return next(
        (
            name
            for name, one in model.named_parameters()
            if ".experts." in name and one.is_floating_point() and (one.ndim > 2 or name.endswith(".weight"))
        ),
        "",
    )


def adapted(model: Any, config: FinetuneConfig) -> Any:
    """The model with its adapter. UsageError for a target that names no layer of the model."""
    from unsloth import FastLanguageModel

    from radeon_stack.workloads.finetune.adapter import linear_names, lora_config

    asked = lora_config(config.lora, model, Speed(nf4_linear=False)).target_modules
    return FastLanguageModel.get_peft_model(
        model,
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        # Named one by one: left to itself it would adapt the experts of a mixture too.
        target_modules=sorted(linear_names(model) if config.lora.target_modules == "all-linear" else asked),
        bias="none",
        use_gradient_checkpointing="unsloth" if config.train.gradient_checkpointing else False,
        random_state=config.train.seed,
        max_seq_length=config.data.max_length,
    )
