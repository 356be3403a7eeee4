"""An adapted 4-bit linear layer: PEFT's, and ours in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.kernels.helpers import distance

peft = pytest.importorskip("peft", reason="needs the packages of the extra 'work'")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the packages of the extra 'work'")

from radeon_stack.kernels import adapters  # noqa: E402


class Model(nn.Module):
    """A 4-bit linear layer among others."""

    def __init__(self, device: str, *, double: bool, bias: bool) -> None:
        super().__init__()
        plain = nn.Linear(128, 192, bias=bias)
        self.layer = bitsandbytes.nn.Linear4bit(
            128, 192, bias=bias, compute_dtype=torch.float32, compress_statistics=double, quant_type="nf4"
        )
        self.layer.load_state_dict(plain.state_dict())
        self.layer.support_avx512bf16_for_cpu = False
        self.to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


def adapted(device: str, *, ours: bool, double: bool = False, bias: bool = False, **more: Any) -> Any:
    torch.manual_seed(5)
    model = Model(device, double=double, bias=bias)
    config = peft.LoraConfig(r=8, lora_alpha=4, target_modules=["layer"], **more)
    made = peft.get_peft_model(model, adapters.use_nf4_linear(config) if ours else config)
    torch.manual_seed(6)
    nn.init.normal_(made.base_model.model.layer.lora_B["default"].weight, std=0.1)
    return made


def step(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of x, A and B."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    (out * torch.linspace(-1, 1, out.shape[-1], device=x.device)).sum().backward()
    layer = model.base_model.model.layer
    assert x.grad is not None
    return [out.detach(), x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_pefts_layer_with_the_same_output_and_gradients(device: str, double: bool, bias: bool) -> None:
    ours, theirs = (adapted(device, ours=one, double=double, bias=bias) for one in (True, False))
    assert type(ours.base_model.model.layer) is adapters.NF4LoraLinear
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 7, 128, device=device)
    for found, wanted in zip(step(ours, x), step(theirs, x), strict=True):
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        assert distance(found, wanted) < 1e-5


def test_many_rows_go_another_way_to_the_same_result(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from radeon_stack.kernels import linear

    x = torch.randn(5, 128, device=device)
    few = step(adapted(device, ours=True, bias=True), x)
    monkeypatch.setattr(linear, "decode_once", lambda *_: True)
    for found, wanted in zip(step(adapted(device, ours=True, bias=True), x), few, strict=True):
        assert distance(found, wanted) < 1e-5


@pytest.mark.parametrize("more", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_is_not_plain_is_left_to_peft(device: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(device, ours=True, bias=True, **more)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("not for this layer")

    monkeypatch.setattr(adapters, "nf4_linear", never)
    assert model(torch.randn(3, 128, device=device)).isfinite().all()


def test_without_its_adapter_it_is_the_base_alone(device: str) -> None:
    model, x = adapted(device, ours=True), torch.randn(3, 128, device=device)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x), model.base_model.model.layer.base_layer(x))
