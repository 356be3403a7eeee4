"""Liger's kernels in small models of each family: the same outputs and gradients as transformers' own."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.kernels.helpers import DEVICE, distance

transformers = pytest.importorskip("transformers", reason="needs the packages of the extra 'work'")
pytest.importorskip("liger_kernel", reason="needs liger-kernel (the extra 'dev')")

from radeon_stack.kernels import interface  # noqa: E402
from radeon_stack.kernels.liger import use_liger  # noqa: E402

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 4}
DENSE, NO_GATE = "rms_norm, rope, swiglu", "rms_norm, rope"
# model_type, what its configuration needs besides sizes, and what of Liger's it gets
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, DENSE),
    "mistral": ({"sliding_window": None}, DENSE),
    "qwen2": ({}, DENSE),
    "qwen3": ({}, DENSE),
    "qwen3_moe": (EXPERTS, NO_GATE),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, NO_GATE),
    "gemma2": (GEMMA, "rms_norm, rope, geglu"),
    "gemma3_text": (GEMMA, "rms_norm, rope, geglu"),
    "phi3": ({"partial_rotary_factor": 0.5}, DENSE),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}, NO_GATE),
}
# Ours in transformers' own precision; what each rounds where it likes in half of it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modelling files as they are, for the next test."""
    for kind in FAMILIES:
        name = kind.removesuffix("_text")
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        monkeypatch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's interpreter (3.9) lacks: numbers are tensors to a kernel, and libdevice has no functions there."""
    if DEVICE != "cpu":
        return
    from liger_kernel.ops import geglu, rms_norm
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


def small(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """Two layers, an odd number of heads and widths that fill no block; no weight is what it begins as."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_key_value_heads": 1}
    sizes |= {"num_hidden_layers": 2, "head_dim": 16, "vocab_size": 61, "max_position_embeddings": 64}
    words = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    settings = {**sizes, **words, "attn_implementation": "eager", **FAMILIES[kind][0], **more}
    shape = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(DEVICE, dtype).train()


def step(model: Any) -> dict[str, torch.Tensor]:
    """Logits of two rows, one padded on the left and one on the right, and every gradient of a loss on them."""
    torch.manual_seed(4)
    ids = torch.randint(3, 61, (2, 9), device=DEVICE)
    seen = torch.ones_like(ids)
    seen[0, :3] = 0
    seen[1, 6:] = 0
    logits = model(input_ids=ids, attention_mask=seen).logits
    logits = logits * seen[..., None]  # what a row's padding comes to is nobody's business
    (logits * torch.linspace(-1, 1, 61, device=DEVICE)).float().square().mean().backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {"logits": logits.detach(), **found}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    far = {name: distance(found[name], wanted[name]) for name in wanted}
    assert not {name: far for name, far in far.items() if not far < tolerance}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_of_each_family_computes_the_same(kind: str, dtype: torch.dtype) -> None:
    wanted = step(small(kind, dtype))
    model = small(kind, dtype)
    assert use_liger(model) == FAMILIES[kind][1]
    same(step(model), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_kernels_are_what_computes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernel.ops import geglu, rms_norm, rope, swiglu

    called: list[str] = []

    def counted(own: Any, told: str) -> Any:
        def call(*arguments: Any) -> Any:
            called.append(told)
            return own(*arguments)

        return call

    for module, name, told in (
        (rms_norm, "rms_norm_forward", "rms_norm"),
        (rope, "rope_forward", "rope"),
        (swiglu, "swiglu_forward", "swiglu"),
        (geglu, "geglu_forward", "geglu"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name), told))
    model = small(kind)
    chosen = use_liger(model).split(", ")
    step(model)
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    assert Counter(called) == {told: norms if told == "rms_norm" else 2 for told in chosen}


def test_experts_and_their_router_are_left_alone() -> None:
    model = small("qwen3_moe")
    before = {name: module.forward.__func__ for name, module in model.named_modules() if ".mlp" in name}
    use_liger(model)
    after = {name: module.forward.__func__ for name, module in model.named_modules() if ".mlp" in name}
    assert after == before and any(interface.is_experts(module) for module in model.modules())


def test_adapters_of_the_mlp_are_asked_and_learn() -> None:
    peft = pytest.importorskip("peft", reason="needs the packages of the extra 'work'")
    names = ["gate_proj", "up_proj", "down_proj"]

    def adapted(*, fused: bool) -> Any:
        model = small("llama")
        if fused:
            assert use_liger(model) == DENSE
        made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
        torch.manual_seed(6)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return made

    wanted = step(adapted(fused=False))
    assert len(wanted) == 1 + 2 * len(names) * 2
    assert all(float(one.norm()) > 0 for one in wanted.values())
    same(step(adapted(fused=True)), wanted, TOLERANCE[torch.float32])


def test_an_adapted_model_is_fused_as_well() -> None:
    peft = pytest.importorskip("peft", reason="needs the packages of the extra 'work'")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    plain, fused = (peft.get_peft_model(small("llama"), config) for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    wanted = step(plain)
    assert use_liger(fused) == DENSE
    same(step(fused), wanted, TOLERANCE[torch.float32])


def test_a_model_loaded_later_is_as_transformers_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = step(small("llama"))
    use_liger(small("llama"))
    later = small("llama")
    assert {type(module).__module__ for module in later.model.layers.modules()} == {
        "torch.nn.modules.container",
        "torch.nn.modules.linear",
        "transformers.activations",
        "transformers.models.llama.modeling_llama",
    }
    if DEVICE == "cpu":  # … and computes where no kernel runs
        monkeypatch.delenv("TRITON_INTERPRET")
        same(step(later), wanted, 1e-12)


@pytest.mark.parametrize(("activation", "chosen"), [("gelu", NO_GATE), ("swish", DENSE)])
def test_a_gate_with_another_activation_stays(activation: str, chosen: str) -> None:
    wanted = step(small("llama", hidden_act=activation))
    model = small("llama", hidden_act=activation)
    assert use_liger(model) == chosen
    same(step(model), wanted, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("width", "chosen"), [(32768, "rms_norm, rope, geglu"), (32769, NO_GATE)])
def test_rows_that_spill_registers_stay(width: int, chosen: str) -> None:
    assert use_liger(small("gemma2", num_hidden_layers=1, intermediate_size=width)) == chosen


def test_it_is_off_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    other = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)
    ).to(DEVICE)
    assert use_liger(other) == "off (Liger has none for gpt2)"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
        assert use_liger(small("llama")).startswith("off (import of liger_kernel")
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        assert use_liger(small("llama")) == "off (no GPU)"
