"""A frozen NF4 linear layer with a LoRA adapter: bitsandbytes with PEFT, and ours, against float64.

Gradients go to the input and to the adapter's factors. The factors are float32 as a trainer keeps them; their values
are drawn such that 16 bit hold them, so that nobody's difference is the rounding of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from radeon_stack.figures import Case
from radeon_stack.workloads.bench.nf4 import DTYPES, LIMIT_ULPS, kernels_run_on, quantised, ulp, whole_blocks
from radeon_stack.workloads.bench.suite import Built, Missing, Work
from radeon_stack.workloads.bench.timing import Call, first_line

SCALE = 0.5  # of the adapter: another than one, so that a lost one shows


@dataclass(frozen=True)
class Setting:
    """Inputs of a case. x: [tokens, in]; weight: [out, in], 16 bit; a: [rank, in], b: [out, rank], float32;
    grad: [tokens, out]."""

    case: Case
    x: torch.Tensor
    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    grad: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """An implementation: its forward pass, what gradients go to (x, a, b), its NF4 weight's bytes, and the setting with
    the values that the weight has."""

    forward: Callable[[], torch.Tensor]
    leaves: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    weights_bytes: int
    exact: Setting
    note: str = ""
    timed: bool = True


@dataclass(frozen=True)
class Linear:
    """The suite's object."""

    name: str = "linear"
    address: str = f"{__name__}:SUITE"
    results: Mapping[str, str] = field(
        default_factory=lambda: {"out": "forward", "d_x": "backward", "d_a": "backward", "d_b": "backward"}
    )

    @property
    def implementations(self) -> Sequence[str]:
        return tuple(IMPLEMENTATIONS)

    def cases(self, config: Any) -> list[Case]:
        return [{**one, "dtype": DTYPES[one["dtype"]]} for one in config.linear.combinations()]

    def dtype(self, case: Case) -> str:
        return str(case["dtype"])

    def work(self, case: Case) -> Mapping[str, Work]:
        """With weights of 4.127 bits a value: a nibble, a byte of 64 values' scale, a float32 of 256 of these."""
        return work_of(case, int(case["out"]) * int(case["in"]) * (4 + 8 / 64 + 32 / (64 * 256)) / 8)

    def setting(self, case: Case, device: torch.device, seed: int) -> Setting:
        generator = torch.Generator(device).manual_seed(seed)
        tokens, out, wide, rank = (int(case[name]) for name in ("tokens", "out", "in", "rank"))
        dtype = getattr(torch, self.dtype(case))

        def draw(*shape: int, std: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, device=device, generator=generator) * std).to(dtype)

        # b is not zero as a fresh adapter's: a's gradient would be. The adapter's part of the output is as large as
        # the weight's.
        a, b = draw(rank, wide, std=wide**-0.5).float(), draw(out, rank, std=(SCALE**2 * rank) ** -0.5).float()
        weight, x, grad = draw(out, wide, std=wide**-0.5), draw(tokens, wide), draw(tokens, out)
        return Setting(case, x.requires_grad_(), weight, a.requires_grad_(), b.requires_grad_(), grad)

    def build(self, name: str, setting: Setting) -> Built:
        layer = IMPLEMENTATIONS[name](setting)

        def backward(out: torch.Tensor) -> Any:
            return torch.autograd.grad(out, layer.leaves, setting.grad.to(out.dtype))

        def results() -> dict[str, torch.Tensor]:
            out = layer.forward()
            d_x, d_a, d_b = backward(out)
            return {"out": out, "d_x": d_x, "d_a": d_a, "d_b": d_b}

        calls = {
            "forward": Call(layer.forward),
            "backward": Call(backward, prepare=layer.forward),
            "step": Call(lambda: backward(layer.forward())),
        }
        values = {"weights_bytes": layer.weights_bytes, "weights_ratio": layer.weights_bytes / setting.weight.nbytes}
        work = work_of(setting.case, layer.weights_bytes)
        return Built(results, calls, layer.note, values, work, layer.exact, layer.timed)

    def truth(self, setting: Setting) -> tuple[Mapping[str, torch.Tensor], str]:
        """out = x·wᵀ + scale · (x·aᵀ)·bᵀ and its gradients, in float64."""
        names = ("x", "weight", "a", "b", "grad")
        x, w, a, b, grad = (getattr(setting, name).detach().double() for name in names)
        inner, d_inner = x @ a.T, grad @ b
        return {
            "out": x @ w.T + SCALE * inner @ b.T,
            "d_x": grad @ w + SCALE * d_inner @ a,
            "d_a": SCALE * d_inner.T @ x,
            "d_b": SCALE * grad.T @ inner,
        }, ""

    def part(self, setting: Setting, results: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return results

    def limit(self, case: Case) -> float:
        return LIMIT_ULPS * ulp(self.dtype(case))


def work_of(case: Case, weights_bytes: float) -> dict[str, Work]:
    """The weight read once a pass as it is stored, activations and factors in and out once."""
    tokens, out, wide, rank = (int(case[name]) for name in ("tokens", "out", "in", "rank"))
    dtype = str(case["dtype"])
    size = getattr(torch, dtype).itemsize
    x, y, factors = tokens * wide * size, tokens * out * size, rank * (out + wide) * 4
    product, low_rank = 2.0 * tokens * out * wide, 2.0 * tokens * rank * (out + wide)
    forward = Work(weights_bytes + x + y + factors, product + low_rank, dtype, tokens)
    # Back: the gradient of x is as much again, the factors' own gradients once more.
    backward = Work(weights_bytes + 2 * x + y + 2 * factors, product + 2 * low_rank, dtype, tokens)
    step = Work(forward.bytes + backward.bytes, forward.operations + backward.operations, dtype, tokens)
    return {"forward": forward, "backward": backward, "step": step}


def peft(*, factors_16bit: bool) -> Callable[[Setting], Layer]:
    """bitsandbytes' Linear4bit with PEFT's adapter on it.

    As a trainer has it: float32 factors under autocast. Or, the quickest there is, 16-bit factors and no autocast.
    """

    def build(setting: Setting) -> Layer:
        try:
            from bitsandbytes.functional import dequantize_4bit
            from bitsandbytes.nn import Linear4bit, Params4bit
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise Missing(f"bitsandbytes or peft cannot be imported: {first_line(error)}") from error
        whole_blocks(setting.weight)
        dtype, device = setting.x.dtype, setting.x.device
        if factors_16bit and dtype == torch.float32:
            raise Missing("the case is 32 bit")
        rank, out, wide = (int(setting.case[name]) for name in ("rank", "out", "in"))
        base = Linear4bit(wide, out, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        packing = {"compress_statistics": True, "quant_type": "nf4"}
        base.weight = Params4bit(setting.weight, requires_grad=False, **packing).to(device)
        model: Any = torch.nn.Module()
        model.proj = base
        model.is_loaded_in_4bit = True  # by this PEFT knows
        config = LoraConfig(r=rank, lora_alpha=SCALE * rank, lora_dropout=0.0, target_modules=["proj"])
        inject_adapter_in_model(config, model)
        adapted = model.proj
        down, up = adapted.lora_A["default"], adapted.lora_B["default"]
        kept = dtype if factors_16bit else torch.float32
        down.weight = torch.nn.Parameter(setting.a.detach().clone().to(kept))
        up.weight = torch.nn.Parameter(setting.b.detach().clone().to(kept))
        plain = factors_16bit or dtype == torch.float32

        def forward() -> torch.Tensor:
            with nullcontext() if plain else torch.autocast(device.type, dtype=dtype):
                found: torch.Tensor = adapted(setting.x)
            return found

        decoded = dequantize_4bit(base.weight.data, base.weight.quant_state)
        return Layer(
            forward,
            (setting.x, down.weight, up.weight),
            quantised(setting.weight)[0].nbytes,
            replace(setting, weight=decoded),
            f"{type(adapted).__name__}, {kept} factors{'' if plain else ', autocast'}".replace("torch.", ""),
        )

    return build


def ours(setting: Setting) -> Layer:
    """One kernel that decodes in the product and has the adapter in it; float32 factors."""
    note = kernels_run_on(setting.x.device, str(setting.case["dtype"]))
    from radeon_stack.kernels.linear import nf4_linear

    weight, decoded = quantised(setting.weight)

    def forward() -> torch.Tensor:
        return nf4_linear(setting.x, weight, setting.a, setting.b, SCALE)

    leaves, exact = (setting.x, setting.a, setting.b), replace(setting, weight=decoded)
    return Layer(forward, leaves, weight.nbytes, exact, note, timed=not note)


IMPLEMENTATIONS: Mapping[str, Callable[[Setting], Layer]] = {
    "peft": peft(factors_16bit=False),
    "peft_16bit": peft(factors_16bit=True),
    "radeon_linear": ours,
}
SUITE = Linear()
