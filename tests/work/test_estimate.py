"""The estimate's activations against what transformers, PEFT and TRL take for a step, every tensor counted."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.launch import estimate as estimating
from radeon_stack.launch.estimate import TOLERANCE, Training, layers
from radeon_stack.launch.model_shape import ModelShape, read_shape
from tests.shapes import ATTENTION
from tests.work.models import folder_of

pytestmark = pytest.mark.work
WORDS = 64  # the head's tiles are as small: its own test has them large

NARROW = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
NARROW |= {"num_hidden_layers": 1}
LLAMA = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2}
MOE = {"hidden_size": 512, "moe_intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2}
MOE |= {"head_dim": 64, "num_experts": 8, "num_experts_per_tok": 4}


def made(kind: str, sizes: dict[str, Any], folder: Path, training: Training) -> tuple[Any, ModelShape]:
    """A model of these sizes with TRL's head and an adapter in bf16, as for training; and its shape, read back."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    config = getattr(transformers, f"{kind}Config")(vocab_size=WORDS, tie_word_embeddings=False, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)
    model.set_attn_implementation(training.attention)
    model.save_pretrained(folder)
    model.requires_grad_(False)
    if training.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=training.every)
        model.enable_input_require_grads()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    targets: Any = list(training.targets) if training.targets else "all-linear"
    model = get_peft_model(model, LoraConfig(r=training.rank, target_modules=targets, task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.train(), read_shape(folder)


def difference(kind: str, sizes: dict[str, Any], folder: Path, training: Training) -> float:
    """Of the estimate from what was counted, as a share of the latter."""
    import torch

    from tests.work.counting import peak_of_a_step

    model, shape = made(kind, sizes, folder, training)
    if training.head:
        from radeon_stack.workloads.finetune.loss import use_head

        assert use_head(model.get_base_model(), torch.bfloat16) == "on"
    if training.fused:
        from radeon_stack.kernels.liger import use_liger

        assert use_liger(model).startswith("rms_norm, rope")
    counted = peak_of_a_step(model, training.batch, training.length)
    counted -= sum(p.numel() * 2 for p in model.parameters() if p.requires_grad)  # gradients are told apart
    return layers(shape, training) / counted - 1


@pytest.fixture
def idle_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's host code with its tensors, and kernels that do nothing: what is computed does not matter here."""
    backends = pytest.importorskip("liger_kernel.backends", reason="needs liger-kernel (the extra 'dev')")
    backends.available_impls("rope")  # looked for once: errors of those that are not there would hold a step's tensors
    from radeon_stack.kernels import liger
    from radeon_stack.workloads.finetune import loss

    jit = pytest.importorskip("triton.runtime.jit", reason="needs triton (the extra 'dev')")
    monkeypatch.setattr(jit.JITFunction, "run", lambda *arguments, **named: None)
    for module in (liger, loss):
        monkeypatch.setattr(module, "can_run_on", lambda device: True)
    for kind in ("llama", "qwen3_moe"):
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        monkeypatch.setattr(module, liger.ROPE, getattr(module, liger.ROPE))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.utils

    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", WORDS)
    monkeypatch.setattr(estimating, "TILE_WORDS", WORDS)


# kind, sizes, targets
STEPS: list[tuple[str, dict[str, Any], tuple[str, ...] | None]] = [
    ("Llama", LLAMA, None),
    ("Llama", LLAMA | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}, None),
    ("Llama", LLAMA | {"intermediate_size": 768}, ATTENTION),
    ("Llama", LLAMA | {"intermediate_size": 1024}, ATTENTION),
    ("Qwen3Moe", MOE, ATTENTION),
    ("Qwen3Moe", MOE | {"num_experts_per_tok": 2, "moe_intermediate_size": 512}, ATTENTION),
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("kind", "sizes", "targets"), STEPS)
def test_the_layers_take_what_was_estimated(
    tmp_path: Path, kind: str, sizes: dict[str, Any], targets: tuple[str, ...] | None, checkpointing: bool
) -> None:
    training = Training(2, 256, 16, targets=targets, quantized=False, checkpointing=checkpointing)
    assert abs(difference(kind, sizes | {"num_hidden_layers": 3}, tmp_path, training)) < TOLERANCE


@pytest.mark.usefixtures("small_tiles", "idle_kernels")
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("kind", "sizes", "targets"), STEPS)
def test_with_ligers_kernels_they_take_less_and_what_was_estimated(
    tmp_path: Path, kind: str, sizes: dict[str, Any], targets: tuple[str, ...] | None, checkpointing: bool
) -> None:
    training = Training(2, 256, 16, targets=targets, quantized=False, checkpointing=checkpointing, fused=True)
    assert abs(difference(kind, sizes | {"num_hidden_layers": 3}, tmp_path, training)) < TOLERANCE


@pytest.mark.usefixtures("small_tiles")
def test_with_every_second_layer_kept_they_take_what_was_estimated(tmp_path: Path) -> None:
    training = Training(2, 256, 16, quantized=False, every=2)
    assert abs(difference("Llama", LLAMA | {"num_hidden_layers": 5}, tmp_path, training)) < TOLERANCE


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("kind", "sizes", "targets"), [("Llama", LLAMA, None), ("Qwen3Moe", MOE, ATTENTION)])
def test_packs_take_so_much_more_as_was_estimated(
    tmp_path: Path, kind: str, sizes: dict[str, Any], targets: tuple[str, ...] | None, checkpointing: bool
) -> None:
    from tests.work.counting import peak_of_a_step

    packed = Training(1, 1024, 16, targets=targets, quantized=False, checkpointing=checkpointing, packed=True)
    model, shape = made(kind, sizes | {"num_hidden_layers": 3}, tmp_path, packed)
    more = peak_of_a_step(model, 1, 1024, rows=4) - peak_of_a_step(model, 1, 1024)
    estimated = layers(shape, packed) - layers(shape, replace(packed, packed=False))
    assert more > 4 * 1024**2 and abs(estimated / more - 1) < TOLERANCE


@pytest.mark.usefixtures("small_tiles")
def test_eager_attention_takes_what_was_estimated(tmp_path: Path) -> None:
    training = Training(1, 1024, 16, quantized=False, attention="eager")
    assert abs(difference("Llama", LLAMA | {"num_hidden_layers": 2}, tmp_path, training)) < TOLERANCE


def test_trls_head_takes_a_tile_and_never_the_whole_logits(tmp_path: Path) -> None:
    training = Training(2, 512, 16, quantized=False)
    assert abs(difference("Llama", NARROW, tmp_path, training)) < TOLERANCE


@pytest.mark.usefixtures("idle_kernels")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("words", "tokens"), [(40_000, 512), (200_000, 2048)], ids=["all at once", "piece by piece"])
def test_ours_takes_as_many_logits_as_it_makes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool, words: int, tokens: int
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "WORDS", words)
    training = Training(1, tokens, 16, quantized=False, head=True, fused=fused)
    assert abs(difference("Llama", NARROW | {"hidden_size": 512}, tmp_path, training)) < TOLERANCE


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("kind", "width"), [("qwen3_moe", "moe_intermediate_size"), ("mixtral", "intermediate_size")])
def test_adapters_are_counted_those_of_experts_too(tmp_path: Path, kind: str, width: str, rank: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from radeon_stack.contracts.finetune import FinetuneConfig, Lora
    from radeon_stack.kernels.adapters import add_experts_lora
    from radeon_stack.launch.estimate import estimate, training_of

    folder = folder_of(kind, tmp_path, **{width: 128})
    targets = list(ATTENTION)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"),
    )
    if rank:
        add_experts_lora(model, rank, 1.0)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    lora = Lora(rank=4, target_modules=ATTENTION, experts_rank=rank)
    training = training_of(FinetuneConfig(model="m", lora=lora))
    found = estimate(read_shape(folder), training)
    assert found.trained == sum(trained)
    assert found.parts["adapter"] == found.parts["gradients"] == 2 * sum(trained)
    assert found.parts["optimizer"] >= 2 * sum(trained)
