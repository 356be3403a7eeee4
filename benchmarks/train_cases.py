"""The models, batches and trainers that train_speed.py times: ours, stock TRL + PEFT + bitsandbytes, and unsloth.

Each is made as its documentation has it, from random weights of the real shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_checkpoint import device, drawn, shapes, tokenizer

R9700_GIB = 29.86
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Case:
    """One model and batch; `cap` GiB of GPU memory, or all there is; `experts_rank` adapters an expert too."""

    kind: str
    sizes: Mapping[str, Any]
    length: int
    batch: int
    accumulation: int
    targets: Sequence[str] | str = "all-linear"
    experts_rank: int = 0
    cap: float | None = None
    double: bool = True


CASES: Mapping[str, Case] = {
    "llama-short": Case("Llama", LLAMA, 60, 5, 2),
    "llama": Case("Llama", LLAMA, 2048, 4, 1),
    "qwen-short": Case("Qwen3Moe", {**QWEN, "num_hidden_layers": 8}, 60, 5, 2, ATTENTION, double=False),
    "qwen": Case("Qwen3Moe", {**QWEN, "num_hidden_layers": 8}, 2048, 4, 1, ATTENTION, double=False),
    "qwen-whole": Case("Qwen3Moe", QWEN, 512, 1, 2, ATTENTION, cap=R9700_GIB, double=False),
    "qwen-whole-experts": Case("Qwen3Moe", QWEN, 512, 1, 2, ATTENTION, 8, R9700_GIB, False),
}
SMOKE: Mapping[str, Case] = {
    "llama": Case("Llama", TINY, 12, 2, 1),
    "qwen": Case("Qwen3Moe", TINY, 12, 2, 2, ATTENTION, 4, None, False),
}


class Drawn:
    """A tensor of a checkpoint that is drawn when it is read. transformers reads by slicing."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def __getitem__(self, _: Any) -> torch.Tensor:
        return drawn(self.shape)

    def is_floating_point(self) -> bool:
        return True


@dataclass(frozen=True)
class Work:
    """What an implementation is to make a trainer for: the case, its optimizer steps, a folder to write into, and the
    checkpoint's folder where it reads one."""

    case: Case
    steps: int
    scratch: Path
    checkpoint: Path | None


def load(case: Case, quantization: Any) -> Any:
    """A model from a checkpoint of random numbers, through transformers' own loading."""
    import transformers

    kind = getattr(transformers, f"{case.kind}ForCausalLM")
    config = getattr(transformers, f"{case.kind}Config")(**case.sizes)
    checkpoint = {name: Drawn(shape) for name, shape in shapes(case.kind, case.sizes).items()}
    where = {"device_map": {"": device()}, "dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    return kind.from_pretrained(None, config=config, state_dict=checkpoint, quantization_config=quantization, **where)


def settings(work: Work) -> Any:
    """The recipe's configuration for a case."""
    from radeon_stack.contracts.finetune import FinetuneConfig

    case = work.case
    told = {
        "model": "random",
        "quantization": {"double": case.double},
        "lora": {"target_modules": case.targets, "experts_rank": case.experts_rank},
        "train": {
            "steps": work.steps,
            "batch_size": case.batch,
            "gradient_accumulation": case.accumulation,
            "checkpoint_every": 1000,
            "gradient_checkpointing": True,
        },
    }
    return FinetuneConfig.model_validate(told)


def rows(work: Work) -> list[list[int]]:
    """Token ids for every step, drawn by a seed: the same for all."""
    case = work.case
    count = work.steps * case.batch * case.accumulation
    generator = torch.Generator().manual_seed(0)
    most = int(case.sizes["vocab_size"])
    return [torch.randint(2, most, (case.length,), generator=generator).tolist() for _ in range(count)]


def ours(work: Work) -> Any:
    """The trainer as `train-llama` and `train-qwen-moe` make it."""
    from radeon_stack.kernels.liger import use_liger
    from radeon_stack.workloads.finetune import base, training
    from radeon_stack.workloads.finetune.encoding import Encoded
    from radeon_stack.workloads.job import Arguments, Job

    config = settings(work)
    model = load(work.case, base.quantization_config(config.quantization, torch.bfloat16))
    job = Job(Arguments(work.scratch, work.scratch, "", None, False), lambda event: None)
    data = [Encoded(ids, ids, "") for ids in rows(work)]
    model = base.ready(model, config.quantization)
    use_liger(model)
    return training.trainer_for(job, config, model, tokenizer(), data)


def stock(work: Work, *, prepared: bool = False) -> Any:
    """TRL's trainer, PEFT's adapter and bitsandbytes' loading, as their documentation puts them together."""
    from datasets import Dataset
    from peft import LoraConfig, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig
    from trl import SFTTrainer

    from radeon_stack.workloads.finetune.training import sft_arguments

    case, data = work.case, rows(work)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model = load(case, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **nf4))
    if prepared:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=64, lora_alpha=64, target_modules=case.targets, task_type="CAUSAL_LM")
    return SFTTrainer(
        model,
        args=sft_arguments(settings(work), work.scratch),
        train_dataset=Dataset.from_dict({"input_ids": data, "labels": data}),
        processing_class=tokenizer(),
        peft_config=lora,
    )


def unsloth(work: Work) -> Any:
    """unsloth's model and TRL's trainer, as unsloth's documentation puts them together."""
    from unsloth import FastLanguageModel  # before transformers, as it asks  # isort: skip
    from datasets import Dataset
    from trl import SFTTrainer

    from radeon_stack.workloads.finetune.training import sft_arguments

    case, data = work.case, rows(work)
    model, words = FastLanguageModel.from_pretrained(
        model_name=str(work.checkpoint), max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=64,
        target_modules=ALL_LINEAR if case.targets == "all-linear" else list(case.targets),
        lora_alpha=64,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )
    return SFTTrainer(
        model=model,
        args=sft_arguments(settings(work), work.scratch),
        train_dataset=Dataset.from_dict({"input_ids": data, "labels": data}),
        processing_class=words,
    )


IMPLEMENTATIONS: Mapping[str, Callable[[Work], Any]] = {
    "ours": ours,
    "stock": stock,
    "stock_prepared": partial(stock, prepared=True),
    "unsloth": unsloth,
}
