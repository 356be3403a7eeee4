"""Adapters of experts: trained over packed experts by us, read on a 16-bit base by PEFT alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from radeon_stack.errors import UsageError

pytestmark = pytest.mark.work
torch = pytest.importorskip("torch")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from radeon_stack.kernels import interface, nf4, quantizer  # noqa: E402
from radeon_stack.kernels.adapters import GroupedExpertsLora, add_experts_lora  # noqa: E402
from tests.work.models import folder_of  # noqa: E402

IDS = torch.arange(14).view(2, 7) * 5 % 97
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def packed(folder: Path, dtype: Any = torch.float32) -> Any:
    """Its experts in NF4. Attention stays as it is: bitsandbytes multiplies in bf16 on some CPUs."""
    interface.register()
    quantizer.register()
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": "cpu"},
        experts_implementation="radeon_nf4",
        quantization_config=quantizer.Nf4Config(compute=dtype, skip=[*ATTENTION, "lm_head"]),
    )


def adapted(model: Any, rank: int = 4) -> Any:
    torch.manual_seed(3)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=ATTENTION, task_type="CAUSAL_LM")
    peft = get_peft_model(model, lora)
    add_experts_lora(peft, rank, 2.0 * rank)
    return peft


def stirred(model: Any) -> Any:
    """As after training: no factor is zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.05)
    return model


def decoded(folder: Path) -> Any:
    """A 16-bit model (here 32) whose values are those that the packed one's decode to."""
    small, model = packed(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = dict(small.named_modules())
    with torch.no_grad():
        for path, module in model.named_modules():
            for name in interface.matrix_names(module) if interface.is_experts(module) else ():
                getattr(module, name).copy_(nf4.decode_reference(interface.experts_weight(modules[path], name)))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("qwen3_moe", tmp_path_factory.mktemp("models") / "qwen3")


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_peft_reads_the_adapter_on_a_base_in_16_bit_and_gets_the_same_model(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path / "model")
    ours = stirred(adapted(packed(folder)))
    ours.save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(decoded(folder), tmp_path / "adapter")
    assert not any(isinstance(module, GroupedExpertsLora) for module in theirs.modules())
    with torch.no_grad():
        found, wanted = ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits
        bare = decoded(folder)(input_ids=IDS).logits
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max() < (bare - wanted).abs().max()


def test_gradients_are_those_of_pefts_own_way(folder: Path, tmp_path: Path) -> None:
    ours = stirred(adapted(packed(folder)))
    ours.save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(decoded(folder), tmp_path / "adapter", is_trainable=True)
    gradients = []
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    found, wanted = gradients
    assert found.keys() == wanted.keys() and len(found) == 2 * (4 * 2 + 2 * 2)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_adapters_begin_with_no_effect(folder: Path) -> None:
    model = packed(folder)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        assert torch.equal(adapted(model)(input_ids=IDS).logits, before)


def test_while_they_are_disabled_the_base_is_there_alone(folder: Path) -> None:
    model = packed(folder)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        peft = stirred(adapted(model))
        with peft.disable_adapter():
            assert torch.equal(peft(input_ids=IDS).logits, before)
        assert not torch.equal(peft(input_ids=IDS).logits, before)


def test_what_was_saved_is_loaded_again_into_adapters_that_are_there(folder: Path, tmp_path: Path) -> None:
    one, other = stirred(adapted(packed(folder))), adapted(packed(folder))
    one.save_pretrained(tmp_path / "adapter")
    other.load_adapter(str(tmp_path / "adapter"), "default", is_trainable=True)
    with torch.no_grad():
        assert torch.equal(one(input_ids=IDS).logits, other(input_ids=IDS).logits)


def test_only_adapters_are_trained_and_none_is_decoded_for_it(folder: Path) -> None:
    model = adapted(packed(folder, torch.bfloat16), rank=4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    experts = {name: p.numel() for name, p in trained.items() if ".experts." in name}
    assert len(experts) == 2 * 2 * 2
    assert sum(experts.values()) == 2 * 5 * 4 * ((64 + 128) + (64 + 64))


def test_adapters_are_not_passed_by_without_a_word(folder: Path) -> None:
    model = adapted(packed(folder))
    model.get_base_model().set_experts_implementation("eager")
    with pytest.raises(UsageError, match="would pass the adapters of down_proj by"):
        model(input_ids=IDS)


def test_what_cannot_have_adapters_says_so(folder: Path, tmp_path: Path, tiny_model: Path) -> None:
    model = adapted(packed(folder))
    with pytest.raises(UsageError, match="has adapters already"):
        add_experts_lora(model, 4, 8.0)
    with pytest.raises(UsageError, match="rank 200: the kernels take 1 to 128"):
        add_experts_lora(adapted_attention(packed(folder)), 200, 8.0)
    with pytest.raises(UsageError, match="GptOssExperts: adapters for its experts are not there yet"):
        add_experts_lora(adapted_attention(packed(folder_of("gpt_oss", tmp_path / "oss"))), 4, 8.0)
    dense = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(UsageError, match="the model has no experts"):
        add_experts_lora(adapted_attention(dense), 4, 8.0)


def adapted_attention(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM"))
