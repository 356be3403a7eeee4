"""Configuration of the `finetune` workload. The defaults are the seed's Llama-3.1-8B run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from radeon_stack.contracts.options import TakesOptions
from radeon_stack.contracts.sections import Dataset, Section, TakesData, TakesModel


class Data(Dataset):
    """What is learnt."""

    copies: int = Field(1000, ge=1, le=10_000_000, description="how often 'birthday' repeats its chat")
    max_length: int = Field(1024, ge=8, le=1 << 20, description="tokens; longer rows are cut")
    loss_on: Literal["all", "assistant"] = Field(
        "all", description="'assistant': only the assistant's answers are learnt, prompts are masked"
    )
    eval_share: float = Field(
        0.0, ge=0.0, le=0.9, description="share of the rows that is evaluated on and not learnt, drawn by train.seed"
    )
    # Off: a batch of so many packs is many more rows, so the same steps would learn something else.
    packing: bool = Field(
        False,
        description="several rows, whole and apart, in each sequence of max_length tokens, for evaluations too; "
        "train.batch_size then counts these sequences",
    )
    group_by_length: bool = Field(
        False,
        description="rows of like length in a batch, for less padding; their order is no more by chance alone: "
        "in turns of at most 50 steps, from the longest to the shortest",
    )


class Quantization(Section):
    """How the frozen base is held."""

    kind: Literal["nf4", "fp8", "none"] = Field(
        "nf4",
        description="'nf4': 4-bit NormalFloat, block 64; 'fp8': 8-bit floats (e4m3fn), as the checkpoint has them "
        "or rounded while it is read; 'none': 16 bit",
    )
    double: bool = Field(True, description="of 'nf4': quantise the block scales (absmax) too")
    products: Literal["auto", "dequantize", "triton", "scaled_mm"] = Field(
        "auto",
        description="of 'fp8': decode a weight for each product, or in the product's kernel; 'auto' chooses by size. "
        "'scaled_mm' rounds activations to 8 bit too: only where a probe found it right",
    )
    experts: Literal["nf4", "none"] = Field(
        "nf4", description="a mixture-of-experts model's experts, when kind is 'nf4': packed too, or left in 16 bit"
    )
    keep: bool = Field(
        False,
        description="keep the packed base in the cache: the next run reads a quarter of the bytes, and packs nothing",
    )


class Lora(Section):
    """The adapter."""

    rank: int = Field(64, ge=1, le=4096)
    alpha: int = Field(64, ge=1, le=1 << 16, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | Literal["all-linear"] = Field(
        "all-linear", description="'all-linear' (all but the output head), or a list of module names"
    )
    experts_rank: int = Field(
        0, ge=0, le=128, description="rank of adapters an expert, scaled by alpha / rank too; 0: none"
    )


class Train(Section):
    """How it is learnt."""

    steps: int = Field(100, ge=1, description="optimizer steps")
    batch_size: int = Field(5, ge=1, description="sequences a process and forward pass")
    gradient_accumulation: int = Field(2, ge=1, description="forward passes an optimizer step")
    learning_rate: float = Field(5e-5, gt=0.0, le=1.0)
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup: float = Field(0.1, ge=0.0, lt=1.0, description="share of the steps spent warming up")
    weight_decay: float = Field(0.01, ge=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    optimizer: Literal["adamw_8bit", "adamw_torch", "adamw_torch_fused", "paged_adamw_8bit"] = "adamw_8bit"
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="activations are computed again on the way back, in place of being kept; 'auto': of as few layers "
        "as the memory estimate wants (all, where it is not known)",
    )
    every_n_layers: int = Field(1, ge=1, le=1024, description="of gradient_checkpointing: only of every n-th layer")
    offload_activations: bool = Field(
        False,
        description="of gradient_checkpointing: what is kept of a layer waits in the host's memory; a slower step for "
        "less GPU memory at long rows",
    )
    seed: int = Field(42, ge=0, lt=1 << 32, description="LoRA initialisation, dropout, sampling")
    data_seed: int = Field(3407, ge=0, lt=1 << 32, description="order of the data")
    parallel: Literal["auto", "data", "layers", "sharded"] = Field(
        "auto",
        description="over several GPUs: 'data', the whole model on each and a part of every batch; 'layers', a part of "
        "the layers on each; 'sharded', as 'data' with a share of the base on each, gathered layer by layer (FSDP2); "
        "'auto': 'data' where the memory estimate says that the model fits one, else 'layers'",
    )
    processes: int | None = Field(None, ge=1, le=64, description="on the CPU; on GPUs it is one a GPU")
    checkpoint_every: int = Field(25, ge=1, description="steps between checkpoints; what --resume goes back to")
    eval_every: int = Field(25, ge=1, description="steps between evaluations, where data.eval_share holds rows back")
    early_stopping: int = Field(
        0,
        ge=0,
        description="evaluations without a better loss that end training; the best adapter is what is saved; 0: off",
    )
    stop_diverging: bool = Field(True, description="end training when the loss diverges; nan ends it always")


# What may be given anew with --resume: where a run is continued does not depend on it.
RESUMABLE = (
    "config.train.learning_rate",
    "config.train.batch_size",
    "config.train.gradient_accumulation",
    "config.train.gradient_checkpointing",
    "config.train.every_n_layers",
    "config.train.offload_activations",
)


class Speed(Section):
    """What makes it quicker and leaves the result as it is, but for rounding; each can be switched off."""

    nf4_linear: bool = Field(
        True, description="4-bit linear layers and their adapters as one operation of ours, on a GPU; false: PEFT's"
    )
    liger: bool = Field(True, description="Liger's fused RMSNorm, RoPE, SwiGLU and GeGLU, on a GPU; false: torch's")
    head: bool = Field(
        True,
        description="the loss from logits made once, on a GPU, where the head is a frozen matrix; false: TRL's, which"
        " makes them again on the way back",
    )
    keep_products: bool = Field(
        True,
        description="where layers are computed again, the host's memory keeps as many of their products as it is faster"
        " to copy than to compute, and the card's those of adapters and of two layers, if it has room; false: none",
    )


class Samples(Section):
    """The question put to the model before and after."""

    count: int = Field(5, ge=0, le=256)
    prompt: str | None = Field(None, description="default: the data's own first question")
    expected: str | None = Field(None, description="an answer is right when it contains this; default: the data's")
    max_new_tokens: int = Field(48, ge=1, le=1 << 16)
    temperature: float = Field(0.7, ge=0.0, le=10.0, description="0: greedy")
    top_p: float = Field(0.9, gt=0.0, le=1.0)


class Export(Section):
    """What is left behind besides the adapter."""

    merge: bool = Field(True, description="merge into the 16-bit base, reload it and check it")
    reload: Literal["16bit", "quantized"] = Field(
        "16bit", description="how the merged model is read back: as it is, or quantised like the base (a large one)"
    )
    tensorboard: bool = Field(False, description="the curves as TensorBoard's event files, in artifacts/tensorboard")


# What unsloth takes of these keys, as we use it; why it takes no more.
UNSLOTH_TAKES: Mapping[tuple[str, str], tuple[tuple[Any, ...], str]] = {
    ("quantization", "kind"): (("nf4", "none"), "FP8 is trained by ours alone"),
    ("quantization", "double"): ((True,), "it always quantises the scales too"),
    ("quantization", "experts"): (("nf4",), "it always packs the experts"),
    ("quantization", "keep"): ((False,), "it reads the 16-bit checkpoint each time"),
    ("lora", "experts_rank"): ((0,), "adapters an expert are ours alone"),
    ("data", "packing"): ((False,), "our packs were not tried with it"),
    ("data", "group_by_length"): ((False,), "our order was not tried with it"),
    ("train", "every_n_layers"): ((1,), "its checkpointing is of all layers"),
    ("train", "offload_activations"): ((False,), "its checkpointing decides that itself"),
    ("train", "parallel"): (("auto",), "it trains in one process on one GPU"),
    ("train", "processes"): ((None, 1), "it trains in one process on one GPU"),
    ("train", "precision"): (("bf16", "fp16"), "its kernels are for 16 bit"),
    ("model_options", "attention"): (("auto",), "it chooses its attention itself"),
}


class FinetuneConfig(TakesData, TakesModel, TakesOptions):
    """Everything the `finetune` workload can be told; paths are added by the launch plan."""

    backend: Literal["trl", "unsloth"] = Field(
        "trl",
        description="what trains: 'trl', TRL's trainer with PEFT, bitsandbytes and our kernels; 'unsloth', unsloth's "
        "model and kernels with TRL's trainer, for which there is an image of its own",
    )
    any_architecture: bool = Field(False, description="train a model whose architecture is not known to train")
    data: Data = Data()
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    train: Train = Train()
    speed: Speed = Speed()
    samples: Samples = Samples()
    export: Export = Export()

    @property
    def layer(self) -> str:
        """What the recipe's image must have on top: `unsloth`, or nothing."""
        return "unsloth" if self.backend == "unsloth" else ""

    @model_validator(mode="after")
    def _what_the_backend_can(self) -> FinetuneConfig:
        if self.backend == "unsloth":
            _refuse(self, UNSLOTH_TAKES, "backend = 'unsloth'")
        return self


def _refuse(config: FinetuneConfig, takes: Mapping[tuple[str, str], tuple[tuple[Any, ...], str]], with_: str) -> None:
    """ValidationError, placed at each key that has a value which is not taken."""
    found: list[InitErrorDetails] = []
    for (table, key), (allowed, why) in takes.items():
        value = getattr(getattr(config, table), key)
        if value not in allowed:
            told = {"allowed": " or ".join(map(repr, allowed)), "with": with_, "why": why}
            error = PydanticCustomError("backend", "{allowed} with {with}: {why}", told)
            found.append(InitErrorDetails(type=error, loc=(table, key), input=value))
    if found:
        raise ValidationError.from_exception_data("FinetuneConfig", found)
