"""Whole models of transformers on our experts, beside its own loop over experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from radeon_stack.errors import UsageError
from radeon_stack.kernels import experts
from radeon_stack.kernels.interface import is_experts, is_fused, pack_experts, register
from tests.kernels.helpers import distance
from tests.work.models import EXPERT_MODELS, SMALL

transformers = pytest.importorskip("transformers", reason="needs the packages of the extra 'work'")


@pytest.fixture(params=list(EXPERT_MODELS))
def model(request: pytest.FixtureRequest, device: str) -> Iterator[Any]:
    register()
    name, own = EXPERT_MODELS[request.param]
    config = getattr(transformers, f"{name}Config")(**SMALL, **own)
    made = getattr(transformers, f"{name}ForCausalLM")._from_config(config, experts_implementation="eager").to(device)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    yield made


def step(model: Any, implementation: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits, gradients) of one batch."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    ids = torch.arange(14, device=model.device).view(2, 7) * 5 % 97
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(one: Any, other: Any, limit: float = 1e-4) -> None:
    (logits, gradients), (wanted, wanted_gradients) = one, other
    assert distance(logits, wanted) < limit
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        if gradient.norm() > 0:
            assert distance(gradients[name], gradient) < limit, name


def test_a_model_gives_the_same_logits_and_gradients_on_our_experts(model: Any) -> None:
    same(step(model, "radeon_grouped"), step(model, "eager"))


@pytest.mark.parametrize("double", [False, True])
def test_packed_experts_give_what_their_decoded_values_give(model: Any, double: bool) -> None:
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts" in n and p.ndim == 3)
    assert pack_experts(model, double=double) == experts
    same(step(model, "radeon_nf4"), step(model, "eager"))


def test_experts_in_16_bit_are_refused_where_4_bit_ones_were_asked_for(model: Any) -> None:
    with pytest.raises(UsageError, match="not in NF4"):
        step(model, "radeon_nf4")


def test_adapters_in_pefts_form_give_what_their_definition_gives(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft", reason="needs the packages of the extra 'work'")
    from radeon_stack.kernels.adapters import add_experts_lora

    layer = next(module for module in model.modules() if is_experts(module))
    if not is_fused(layer):
        return
    pack_experts(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(add_experts_lora(adapted, 4, 8.0)) == 4
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    found = step(model, "radeon_nf4")
    assert sum(".experts." in name for name in found[1]) == 2 * 2 * 2
    monkeypatch.setattr(experts, "can_run_on", lambda device: False)
    same(found, step(model, "radeon_nf4"))


def test_experts_of_another_rank_count_as_nothing(model: Any) -> None:
    layer = next(module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "has_gate"))
    experts = layer.down_proj.shape[0]
    hidden = torch.randn(6, 64, device=layer.down_proj.device)
    index = torch.tensor([[0, 1], [1, experts], [experts, experts], [2, 0], [experts, 2], [3, 1]], device=hidden.device)
    weights = torch.rand(6, 2, device=hidden.device).masked_fill(index == experts, 0.0)
    layer._is_expert_parallel = True
    found = {}
    for name in ("grouped_mm", "radeon_grouped"):
        model.set_experts_implementation(name)
        found[name] = layer(hidden, index, weights)
    assert distance(found["radeon_grouped"], found["grouped_mm"]) < 1e-5


def test_under_autocast_it_computes_in_autocasts_type(model: Any) -> None:
    layer = next(module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "has_gate"))
    hidden = torch.randn(6, 64, device=layer.down_proj.device)
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]], device=hidden.device)
    weights = torch.rand(6, 2, device=hidden.device)
    model.set_experts_implementation("radeon_grouped")
    wanted = layer(hidden, index, weights)
    with torch.autocast(hidden.device.type, torch.float16):
        found = layer(hidden, index, weights)
    assert found.dtype == hidden.dtype
    assert 1e-6 < distance(found, wanted) < 2e-3


def test_nothing_is_packed_where_not_all_can_be() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**{**SMALL, "intermediate_size": 80}, num_local_experts=2, num_experts_per_tok=1)
    model = MixtralForCausalLM._from_config(config)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    with pytest.raises(UsageError, match="no whole blocks"):
        pack_experts(model)
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == before


def test_odd_widths_cannot_be_packed_and_are_named() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**{**SMALL, "intermediate_size": 80}, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(UsageError, match=r"MixtralExperts\.down_proj: rows of 80"):
        pack_experts(MixtralForCausalLM._from_config(config))
