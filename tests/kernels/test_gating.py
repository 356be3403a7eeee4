"""Our router in transformers' models: the same experts, weights and gradients."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from tests.kernels.helpers import DEVICE

transformers = pytest.importorskip("transformers", reason="needs the packages of the extra 'work'")

from radeon_stack.kernels.gating import ROUTERS, use_gate  # noqa: E402

KINDS = {"qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}


def router(kind: str, *, normalise: bool) -> Any:
    modelling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    sizes = {"hidden_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": normalise}
    made = getattr(modelling, f"{KINDS[kind]}TopKRouter")(transformers.AutoConfig.for_model(kind, **sizes))
    torch.manual_seed(9)
    made.weight = torch.nn.Parameter(torch.randn(6, 24), requires_grad=False)
    return made.to(DEVICE)


class Model(torch.nn.Module):
    """A router with a configuration."""

    def __init__(self, own: torch.nn.Module, *, wants_logits: bool = False) -> None:
        super().__init__()
        self.gate = own
        self.config = type("Config", (), {"output_router_logits": wants_logits})()


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])  # in one launch, and in two
def test_it_routes_as_transformers_own_does(kind: str, normalise: bool, dtype: torch.dtype) -> None:
    def routed(own: Any) -> list[torch.Tensor]:
        own = own.to(dtype)
        torch.manual_seed(10)
        x = torch.randn(3, 5, 24, device=DEVICE).to(dtype).requires_grad_()
        _, weights, index = own(x)
        d_weights = torch.linspace(-1, 1, weights.numel(), device=DEVICE).view_as(weights)
        return [weights.detach(), index, *torch.autograd.grad(weights, x, d_weights)]

    wanted = routed(router(kind, normalise=normalise))
    model = Model(router(kind, normalise=normalise))
    assert use_gate(model) == 1
    assert model.gate(torch.randn(5, 24, device=DEVICE))[0] is None
    model.gate.to(dtype)
    for found, own in zip(routed(model.gate), wanted, strict=True):
        torch.testing.assert_close(found, own)


def test_under_autocast_a_router_of_float32_stays_so_there_and_back() -> None:
    model = Model(router("qwen3_moe", normalise=True))
    use_gate(model)
    x = torch.randn(5, 24, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        _, weights, _ = model.gate(x)
    weights.sum().backward()
    assert weights.dtype == torch.float32 and x.grad is not None


def test_where_a_loss_wants_the_logits_or_the_rows_have_another_type_it_is_transformers_own() -> None:
    model = Model(router("qwen3_moe", normalise=True), wants_logits=True)
    assert use_gate(model) == 0
    model = Model(router("qwen3_moe", normalise=True))
    use_gate(model)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert model.gate(torch.randn(5, 24, device=DEVICE).half())[0] is not None


def test_the_names_are_those_transformers_has() -> None:
    assert {f"{name}TopKRouter" for name in KINDS.values()} == set(ROUTERS)
