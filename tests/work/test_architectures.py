"""Every architecture that is called known trains, by a small model of its own shape."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.errors import Exit
from radeon_stack.runs import events as ev
from radeon_stack.workloads.finetune.architectures import KNOWN
from tests.conftest import Cli
from tests.work.test_evaluation import config
from tests.work.test_training import job_in, origin_of

pytestmark = pytest.mark.work
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
# model_type of transformers, and what its configuration needs besides sizes
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {"sliding_window": None}),
    "MixtralForCausalLM": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2ForCausalLM": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen2MoeForCausalLM": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "Qwen3ForCausalLM": ("qwen3", {}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", EXPERTS),
    "Gemma2ForCausalLM": ("gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 32}),
    "Gemma3ForCausalLM": ("gemma3_text", {"query_pre_attn_scalar": 16, "sliding_window": 32}),
    "Phi3ForCausalLM": ("phi3", {"pad_token_id": 2}),
    "GptOssForCausalLM": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32}),
}


def small_model(architecture: str, folder: Path, tiny_model: Path, **options: Any) -> Path:
    """Two layers of it with random weights, and the tiny LLaMA's tokenizer; `options` of its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, more = SHAPES[architecture]
    words = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    shape = AutoConfig.for_model(
        kind,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        **({"vocab_size": words, "pad_token_id": 2} | more | options),
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)
    for file in tiny_model.glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(tiny_model / "chat_template.jinja", folder)
    return folder


def test_each_known_architecture_has_a_shape_here() -> None:
    assert SHAPES.keys() == KNOWN.keys()


@pytest.mark.parametrize("architecture", SHAPES)
def test_a_known_architecture_trains_and_merges(architecture: str, tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from radeon_stack.contracts.finetune import Lora, Quantization
    from radeon_stack.workloads.finetune import base, merging, training
    from radeon_stack.workloads.finetune.architectures import architectures_of, require_known
    from radeon_stack.workloads.finetune.data import read_rows
    from radeon_stack.workloads.finetune.encoding import encode_rows

    folder = small_model(architecture, tmp_path / "model", tiny_model)
    require_known(folder)
    assert architectures_of(folder) == [architecture]
    job, told = job_in(tmp_path / "run")
    settings = config(steps=2, learning_rate=1e-2)
    if any(word in architecture for word in ("Moe", "Mixtral", "GptOss")):
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")  # experts have tests of their own
        settings = settings.model_copy(update={"lora": Lora(rank=4, target_modules=attention)})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = encode_rows(job, tokenizer, read_rows(settings.data, None).rows, max_length=64, loss_on="assistant")
    model = base.load_for_training(job, folder, Quantization(), torch.bfloat16)
    trainer = training.trainer_for(job, settings, model, tokenizer, rows)
    assert base.describe(trainer.model, folder, "")["quantized_parameters"] > 0
    training.train(job, trainer, None)
    steps = [event.values for event in told if isinstance(event, ev.Metric)]
    assert len(steps) == 2 and all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    adapter = merging.save_adapter(job, trainer.model, tokenizer, origin_of(folder))
    merged = merging.merge(job, folder, adapter, tokenizer)
    base.load_16bit(job, merged, torch.bfloat16, "reload", on=torch.device("cpu"))


def test_an_unknown_architecture_is_refused_with_the_list_before_torch_and_may_be_forced(
    cli: Cli, tiny_run: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "other")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("LlamaForCausalLM", "LhamaForCausalLM"))
    result = cli(*tiny_run, "--engine", "local", "--model", folder)
    assert result.code == Exit.USAGE
    assert (
        "config.model: the architecture LhamaForCausalLM is not known; known: LlamaForCausalLM (Llama" in result.error
    )
    assert "--set any_architecture=true" in result.error
    assert "environment" not in result.json["facts"]
    sets = ("--set", "any_architecture=true", "--set", "train.steps=1", "--set", "export.merge=false")
    assert cli(*tiny_run, "--engine", "local", "--model", folder, *sets).code == Exit.OK
