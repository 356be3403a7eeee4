"""How much memory does a fine-tune take on a card? Worked out beforehand, in bytes by kind; pure functions.

**Weights** are exact: NF4 is half a byte a parameter and an absmax a block of 64, which is float32 or, quantised too
("double"), one byte and a float32 a 256 blocks (QLoRA, arXiv 2305.14314, section 3; bitsandbytes `quantize_4bit`).

**Activations** are counted, not guessed. `tests/work/test_estimate.py` runs transformers' own Llama and Qwen3-MoE with
TRL's loss, with Liger's kernels and without, and counts every live tensor; the coefficients below are the slopes of
these counts: bytes a token, h the hidden size, f the intermediate, k the width of keys or values, e of experts a token,
r the rank. They hold for bf16, sdpa's fused kernels, no dropout, and heads that make the logits piece by piece: ours
has at most 256 MiB of them at once (`TILE_BYTES` of `kernels/head.py`), TRL's (1.16) tiles of 4096 tokens by 32768
words (`trl/kernels/chunked_logprob.py`, `_CHUNKED_LOGPROB_CHUNK_SIZE`).

**Kept products** are those of the adapters, x·aᵀ, of all layers that are computed again (`kernels/kept.py`). A run does
without them where they would be more than a share of what its steps leave. One layer's wider ones are there besides at
the peak, if that leaves room for them, and all that is saved of the last layer while the head computes; they are not
counted.

**Optimizers**: 8-bit AdamW keeps two bytes a parameter and two float32 a block of 256 (arXiv 2110.02861); torch's keeps
two numbers of the parameter's own type, and TRL holds the adapter of a quantised model in bf16, else PEFT in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.contracts.sections import BIRTHDAY
from radeon_stack.launch.model_shape import ModelShape

NF4_BLOCK, ABSMAX_BLOCK = 64, 256
EIGHT_BIT_BLOCK = 256
HALF, FLOAT = 2, 4  # bytes
TILE_TOKENS, TILE_WORDS = 4096, 32768  # of TRL's head
TILE_BYTES = 256 << 20  # of ours
SPARE = "kept products"
KEPT_TOKENS = 1024  # of a pass that keeps products, at least (`LEAST_ROWS` of kernels/kept.py)
KEPT_RANK = 128  # at most (`MAX_RANK` of kernels/configs.py)
# Contexts of the runtime, its BLAS workspaces, and what the allocator cannot use for want of a fitting gap. Not
# measured on a Radeon: taken.
RUNTIME = 512 << 20
TOLERANCE = 0.1  # of what was measured; benchmarks and tests hold it
# Layers that FSDP2 has whole at once: one that computes, and of the next what arrives and what it is copied to.
GATHERED = 3
BIRTHDAY_TOKENS = 64  # the chat of that data set with any of the common templates


@dataclass(frozen=True)
class Training:
    """What decides the memory besides the model. `length` in tokens, `batch` in sequences a device and pass.

    `prepared`: what is not quantised is held in float32, as PEFT's `prepare_model_for_kbit_training` does; ours is not.
    """

    batch: int
    length: int
    rank: int
    targets: tuple[str, ...] | None = None
    """None: all linear layers but the head."""
    experts_rank: int = 0
    quantized: bool = True
    """In NF4."""
    eight: bool = False
    """In FP8, in NF4's place; the adapter is in float32 as over 16 bit."""
    double: bool = True
    experts_quantized: bool = False
    optimizer: str = "adamw_8bit"
    checkpointing: bool = True
    every: int = 1
    """Of checkpointing: every n-th layer's activations are computed again; the others' are kept."""
    offloaded: bool = False
    """Of checkpointing: what is kept of such a layer, its input, is in the host's memory."""
    kept: bool = False
    """Of checkpointing: the adapters' products of such a layer are kept."""
    attention: str = "sdpa"
    processes: int = 1
    shares: int = 1
    """Each process holds one of so many shares of the layers' frozen weights, and gathers a layer when it computes."""
    prepared: bool = False
    fused: bool = False
    """Liger's kernels are in the model: norms keep no float32 copy, the gate no product of its own."""
    head: bool = False
    """Ours in the place of TRL's."""
    packed: bool = False
    """Rows share sequences, all of `length`, and attention is told by a mask which of them are one row."""
    merged: bool = False
    """The merged 16-bit model is read back onto the device at the end."""

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True)
class Estimate:
    """Bytes by kind while training; `merged` what reading the merged model back takes afterwards."""

    parts: Mapping[str, int]
    trained: int
    """Parameters of the adapter."""
    merged: int = 0
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> int:
        """The most that torch's allocator has given out: `torch.cuda.max_memory_allocated`."""
        return sum(self.parts.values())

    @property
    def spare(self) -> int:
        """Of these, what a run does without where there is no room."""
        return self.parts.get(SPARE, 0)

    @property
    def total(self) -> int:
        """What a card must have: with what the runtime takes besides, and without what can be spared."""
        return self.tensors - self.spare + RUNTIME


def training_of(config: FinetuneConfig, processes: int = 1, shares: int = 1) -> Training:
    """What a recipe asks for. Rows are as long as they may be, as packs are: what data holds is not looked at here."""
    targets = config.lora.target_modules
    short = config.data.dataset == BIRTHDAY and not config.data.packing
    return Training(
        batch=config.train.batch_size,
        length=min(config.data.max_length, BIRTHDAY_TOKENS) if short else config.data.max_length,
        rank=config.lora.rank,
        targets=None if isinstance(targets, str) else targets,
        experts_rank=config.lora.experts_rank,
        quantized=config.quantization.kind == "nf4",
        eight=config.quantization.kind == "fp8",
        double=config.quantization.double,
        experts_quantized=config.quantization.experts == "nf4",
        optimizer=config.train.optimizer,
        checkpointing=bool(config.train.gradient_checkpointing),
        every=config.train.every_n_layers,
        offloaded=config.train.offload_activations,
        kept=config.speed.nf4_linear and config.speed.keep_products,
        attention=config.model_options.attention,
        processes=processes,
        shares=shares,
        fused=config.speed.liger,
        head=config.speed.head,
        packed=config.data.packing,
        merged=config.export.merge and config.export.reload != "quantized",
    )


def estimate(model: ModelShape, training: Training) -> Estimate:
    """What one device of the run holds at its peak: the whole model, or its share of it."""
    trained = _trained(model, training)
    wide = HALF if training.quantized else FLOAT
    in_4bit = (model.quantizable + model.experts * training.experts_quantized) * training.quantized
    in_8bit = model.quantizable * training.eight
    in_16bit = model.parameters - in_4bit - in_8bit
    kept = FLOAT if training.prepared else HALF
    activations = layers(model, training)
    whole = {
        "weights in 4 bit": _nf4(in_4bit, training.double),
        "weights in 8 bit": in_8bit + FLOAT * sum(linear.outputs for linear in model.linears) * training.eight,
        "weights in 16 bit": in_16bit * kept,
    }
    shared = whole | {"weights in 16 bit": (in_16bit - model.kept) * kept}  # not embeddings and head
    parts = {
        **{name: size - shared[name] + -(-shared[name] // training.shares) for name, size in whole.items()},
        "gathered": GATHERED * -(-sum(shared.values()) // model.layers) if training.shares > 1 else 0,
        "adapter": trained * wide,
        "gradients": trained * wide * (2 if training.processes > 1 else 1),
        "optimizer": _optimizer(trained, training.optimizer, wide),
        "activations": activations,
        SPARE: _products(model, training),
    }
    reasons = {
        "weights in 4 bit": f"{in_4bit:,} parameters" + (", absmax quantised too" if training.double else ""),
        "weights in 8 bit": f"{in_8bit:,} parameters, a scale a row",
        "weights in 16 bit": f"{in_16bit:,} parameters: "
        + ("embeddings, head, norms" if training.quantized or training.eight else "nothing is quantised")
        + (", experts" if model.experts and not training.experts_quantized and training.quantized else ""),
        "gathered": f"{GATHERED} of {model.layers} layers: one computes, the next is on its way or copied out",
        "adapter": f"{trained:,} parameters of {wide} bytes",
        "gradients": "of the adapter" + (", and their copy for the all-reduce" if training.processes > 1 else ""),
        "optimizer": training.optimizer,
        "activations": f"{training.batch} × {training.length} tokens{' in packs' if training.packed else ''}, "
        + _kept(model, training),
        SPARE: "of the adapters, where the card has room for them (speed.keep_products)",
    }
    if training.shares > 1:
        reasons |= {name: f"{reasons[name]}; a share of {training.shares}" for name in whole if shared[name]}
    merged = model.parameters * HALF if training.merged else 0
    return Estimate(parts, trained, merged, reasons)


def _trained(model: ModelShape, training: Training) -> int:
    """Parameters of the adapters: rank · (rows + columns) of each matrix, an expert's gate and up being one."""
    linears = sum(one.inputs + one.outputs for one in model.linears if _targeted(one.name, training.targets))
    expert = (2 * model.expert_width + model.hidden) + (model.hidden + model.expert_width)
    return training.rank * linears + training.experts_rank * model.expert_count * expert


def layers(model: ModelShape, training: Training) -> int:
    """Bytes of activations at the peak: what is kept for the way back, and the larger of one layer's way back and the
    head's, with the largest weight decoded beside it.
    """
    tokens, h = training.tokens, model.hidden
    stream = FLOAT if training.prepared else HALF  # float32 embeddings make the residual stream float32
    working = max(
        tokens * _working(model, training) + _scores(model, training, 6),
        tokens * (16 * h + _narrow(model, training)) + _scores(model, training, 12),
    ) + _apart(model, training, mask=3)
    head = _head(model, training)
    largest = max(linear.parameters for linear in model.linears)
    decoded = largest * HALF if training.quantized or training.eight else 0
    again = _again(model, training)
    saved = tokens * _saved(model, training) + _scores(model, training, 6) + _apart(model, training, mask=2)
    kept = (model.layers - again) * saved
    if again:
        inputs = (1 if training.offloaded else again) * tokens * h * stream
        return kept + inputs + max(working + decoded, head)
    return kept + max(max(working - saved, 0) + decoded, head)


def _head(model: ModelShape, training: Training) -> int:
    """Bytes at the head's peak, from the last layer's result on: ours has a gradient a token, TRL's sums in float32."""
    tokens, h = training.tokens, model.hidden
    if training.head:
        logits = tokens * (model.words or TILE_WORDS) * HALF
        pieces = -(-logits // TILE_BYTES)
        return tokens * (8 if training.fused else 10) * h + logits // pieces
    return tokens * 10 * h + min(tokens, TILE_TOKENS) * TILE_WORDS * HALF


def _again(model: ModelShape, training: Training) -> int:
    """Layers that are computed again: the first of every n."""
    return -(-model.layers // training.every) if training.checkpointing else 0


def _kept(model: ModelShape, training: Training) -> str:
    again = _again(model, training)
    if again == model.layers:
        return "one layer at a time" + (", the others' inputs in the host's memory" if training.offloaded else "")
    return f"all {model.layers} layers kept" if not again else f"{model.layers - again} of {model.layers} layers kept"


def _products(model: ModelShape, training: Training) -> int:
    """Bytes of the adapters' products in all layers that are computed again."""
    kept = training.kept and not training.offloaded and training.rank <= KEPT_RANK
    if not (kept and training.quantized and training.tokens >= KEPT_TOKENS):
        return 0
    adapted = sum(_targeted(linear.name, training.targets) for linear in model.linears)
    return HALF * training.tokens * training.rank * adapted * _again(model, training) // model.layers


def _saved(model: ModelShape, training: Training) -> int:
    """Bytes a token that a layer keeps for its way back."""
    h, f, narrow = model.hidden, model.intermediate, _narrow(model, training)
    if model.experts:
        return (13 if training.fused else 20) * h + narrow + model.experts_per_token * (2 * h + 6 * model.expert_width)
    adapted = 2 * h + 2 * f if _adapts_mlp(model, training) else 0  # the inputs of the adapted
    return (10 * h + 4 * f if training.fused else 14 * h + 6 * f) + adapted + narrow


def _working(model: ModelShape, training: Training) -> int:
    """Bytes a token at the peak of a layer's way back, what it keeps included: in its MLP, or in its attention."""
    h, f, narrow = model.hidden, model.intermediate, _narrow(model, training)
    if model.experts:
        return (15 if training.fused else 25) * h + narrow + model.experts_per_token * (8 * h + 6 * model.expert_width)
    adapted = _adapts_mlp(model, training)
    if training.fused:
        return 13 * h + (10 if adapted else 6) * f + narrow
    return max(18 * h + (12 if adapted else 10) * f, 32 * h + 4 * f) + narrow


def _narrow(model: ModelShape, training: Training) -> int:
    """Bytes a token of keys, values and A's products, and what a residual stream in float32 adds."""
    adapted = sum(_targeted(linear.name, training.targets) for linear in model.linears)
    products = HALF * training.rank * -(-adapted // model.layers)
    return 4 * model.key_value + products + (6 * model.hidden if training.prepared else 0)


def _adapts_mlp(model: ModelShape, training: Training) -> bool:
    """Does the adapter cover a layer as wide as the MLP?"""
    return any(
        model.intermediate in (linear.inputs, linear.outputs) and _targeted(linear.name, training.targets)
        for linear in model.linears
    )


def _scores(model: ModelShape, training: Training, width: int) -> int:
    """Bytes of a layer's attention scores, where they are made whole: eager attention alone."""
    if training.attention != "eager":
        return 0
    return training.batch * model.heads * training.length**2 * width


def _apart(model: ModelShape, training: Training, *, mask: int) -> int:
    """Bytes a layer takes more where a mask keeps rows of packs apart (sdpa): the mask of so many bytes an element, one
    as truth values and two more as numbers; and keys and values repeated for each head, which sdpa does not do for
    itself beside a mask (transformers 5.23). Eager attention has all that without packs too, flash attention nothing.
    """
    if not training.packed or training.attention not in ("auto", "sdpa"):
        return 0
    return training.tokens * (mask * training.length + 4 * (model.query - model.key_value))


def _nf4(parameters: int, double: bool) -> int:
    blocks = -(-parameters // NF4_BLOCK)
    scales = blocks + FLOAT * -(-blocks // ABSMAX_BLOCK) if double else FLOAT * blocks
    return -(-parameters // 2) + scales


def _optimizer(trained: int, optimizer: str, wide: int) -> int:
    if "8bit" in optimizer:
        return 2 * (trained + FLOAT * -(-trained // EIGHT_BIT_BLOCK))
    return 2 * trained * wide


def _targeted(name: str, targets: tuple[str, ...] | None) -> bool:
    """As PEFT matches a list: the whole name, or its end after a point."""
    return targets is None or any(name == target or name.endswith(f".{target}") for target in targets)
