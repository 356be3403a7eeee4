"""The experts of a mixture-of-experts layer: transformers' implementations and ours, 16 bit and NF4, against float64.

The layer is Qwen3-MoE's (silu(gate) · up, then down), its weights random and frozen, as in QLoRA: gradients go to the
hidden states and the routing weights. How tokens are routed is part of the case:

- `even`: each token to its own random experts;
- `skewed`: expert n is drawn with a weight of 1 / n (Zipf), a token's experts without repetition;
- `single`: every choice of every token is the same expert, the worst there can be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from radeon_stack.figures import Case
from radeon_stack.workloads.bench.nf4 import DTYPES, LIMIT_ULPS, kernels_run_on, quantised, ulp, whole_blocks
from radeon_stack.workloads.bench.suite import Built, Missing, Work
from radeon_stack.workloads.bench.timing import Call, first_line

# In float64, forward and backward: what a card with slow float64 does in a second or two. Beyond, a part is compared.
TRUTH_OPERATIONS = 1e12
COPIED_SHARE, COPIED_CPU = 4, 4 << 30  # batched_mm copies weights for each choice: at most this part of the memory


@dataclass(frozen=True)
class Setting:
    """Inputs of a case. hidden, grad: [tokens, hidden]; index (int64), share: [tokens, top_k];
    gate_up: [experts, 2 · intermediate, hidden], gate's rows first; down: [experts, hidden, intermediate].
    """

    case: Case
    hidden: torch.Tensor
    index: torch.Tensor
    share: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    grad: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def touched(self) -> int:
        """Experts that have a token."""
        return int(self.index.unique().numel())

    def rows(self) -> torch.Tensor:
        """The tokens that are compared, int64: thinned to what float64 can do in time. Tokens depend on no other."""
        cost = 2 * operations(self.case)
        count = max(1, min(self.tokens, int(self.tokens * TRUTH_OPERATIONS / cost)))
        # Evenly, the last among them: what is wrong at the end of a tensor is wrong in its index arithmetic.
        picked = [self.tokens - 1 - (i * self.tokens) // count for i in reversed(range(count))]
        return torch.tensor(picked, device=self.hidden.device)


@dataclass(frozen=True)
class Layer:
    """An implementation: (hidden, share) → out, the bytes of its weights, and where they are its own, the setting with
    the values that they have."""

    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    weights_bytes: int
    exact: Setting | None = None
    note: str = ""
    timed: bool = True


Implementation = Callable[[Setting], Layer]


@dataclass(frozen=True)
class Ffn:
    """The suite's object."""

    name: str = "ffn"
    address: str = f"{__name__}:SUITE"
    results: Mapping[str, str] = field(
        default_factory=lambda: {"out": "forward", "d_hidden": "backward", "d_share": "router"}
    )

    @property
    def implementations(self) -> Sequence[str]:
        return tuple(IMPLEMENTATIONS)

    def cases(self, config: Any) -> list[Case]:
        return [{**one, "dtype": DTYPES[one["dtype"]]} for one in config.ffn.combinations()]

    def dtype(self, case: Case) -> str:
        return str(case["dtype"])

    def work(self, case: Case) -> Mapping[str, Work]:
        """Of 16-bit weights, all experts touched that can be; an implementation knows better (`Built.work`)."""
        slots = tokens_of(case) * int(case["top_k"])
        touched = 1 if case["routing"] == "single" else min(int(case["experts"]), slots)
        return work_of(case, touched * expert_values(case) * getattr(torch, self.dtype(case)).itemsize)

    def setting(self, case: Case, device: torch.device, seed: int) -> Setting:
        generator = torch.Generator(device).manual_seed(seed)
        experts, wide, inner = (int(case[name]) for name in ("experts", "hidden", "intermediate"))
        tokens, top_k, dtype = tokens_of(case), int(case["top_k"]), getattr(torch, self.dtype(case))

        def draw(*shape: int, std: float = 1.0) -> torch.Tensor:
            return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, std, generator=generator)

        gate_up = draw(experts, 2 * inner, wide, std=wide**-0.5)
        down = draw(experts, wide, inner, std=inner**-0.5)
        index = routed(str(case["routing"]), tokens, experts, top_k, generator)
        share = torch.randn(tokens, top_k, device=device, generator=generator).softmax(-1).to(dtype)
        hidden, grad = draw(tokens, wide), draw(tokens, wide)
        return Setting(case, hidden.requires_grad_(), index, share.requires_grad_(), gate_up, down, grad)

    def build(self, name: str, setting: Setting) -> Built:
        layer = IMPLEMENTATIONS[name](setting)
        inputs = (setting.hidden, setting.share)

        def forward() -> torch.Tensor:
            return layer.forward(*inputs)

        def backward(out: torch.Tensor) -> Any:
            return torch.autograd.grad(out, inputs, setting.grad)

        def results() -> dict[str, torch.Tensor]:
            out = forward()
            d_hidden, d_share = backward(out)
            return {"out": out, "d_hidden": d_hidden, "d_share": d_share}

        calls = {
            "forward": Call(forward),
            "backward": Call(backward, prepare=forward),
            "step": Call(lambda: backward(forward())),
        }
        whole = setting.gate_up.nbytes + setting.down.nbytes
        read = layer.weights_bytes * setting.touched / int(setting.case["experts"])
        return Built(
            results,
            calls,
            layer.note,
            {"weights_bytes": layer.weights_bytes, "weights_ratio": layer.weights_bytes / whole},
            work_of(setting.case, read),
            layer.exact,
            layer.timed,
        )

    def truth(self, setting: Setting) -> tuple[Mapping[str, torch.Tensor], str]:
        rows = setting.rows()
        part = "" if len(rows) == setting.tokens else f"{len(rows)} of {setting.tokens} tokens"
        return truth_of(setting, rows), part

    def part(self, setting: Setting, results: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        rows = setting.rows()
        return {name: tensor.detach()[rows] for name, tensor in results.items()}

    def limit(self, case: Case) -> float:
        # A routing weight's gradient is a sum that cancels by chance: of few tokens it may be small beside its
        # rounding. Even of one token, a lost choice of eight (0.35) is above this.
        return LIMIT_ULPS * ulp(self.dtype(case)) * (1 + 8 / tokens_of(case))


def tokens_of(case: Case) -> int:
    return int(case["batch"]) * int(case["seq"])


def expert_values(case: Case) -> int:
    """Weights of one expert."""
    return 3 * int(case["hidden"]) * int(case["intermediate"])


def operations(case: Case) -> float:
    """Of one pass: the forward pass's products, or those of the way back to the hidden states, which are as many."""
    return 2.0 * tokens_of(case) * int(case["top_k"]) * expert_values(case)


def work_of(case: Case, weights_bytes: float) -> dict[str, Work]:
    """Each touched expert read once a pass, as it is stored; activations in and out once. What is kept between the
    passes is not counted: it could be computed again."""
    tokens, slots, dtype = tokens_of(case), tokens_of(case) * int(case["top_k"]), str(case["dtype"])
    size = getattr(torch, dtype).itemsize
    states, routing = tokens * int(case["hidden"]) * size, slots * (size + 8)  # int64 indices
    done = operations(case)
    forward = Work(weights_bytes + 2 * states + routing, done, dtype, tokens)
    backward = Work(weights_bytes + 3 * states + routing + slots * size, done, dtype, tokens)
    return {
        "forward": forward,
        "backward": backward,
        "step": Work(forward.bytes + backward.bytes, 2 * done, dtype, tokens),
    }


def routed(how: str, tokens: int, experts: int, top_k: int, generator: torch.Generator) -> torch.Tensor:
    """Expert numbers [tokens, top_k], int64."""
    if how == "single":
        return torch.full((tokens, top_k), experts // 2, device=generator.device)
    uniform = torch.rand(tokens, experts, device=generator.device, generator=generator).clamp_(1e-9, 1 - 1e-7)
    keys = -(-uniform.log()).log()  # Gumbel noise: the largest of log p + noise is a draw from p, without repetition
    if how == "skewed":
        keys -= torch.arange(1, experts + 1, device=generator.device).log()
    return keys.topk(top_k, -1).indices


def truth_of(setting: Setting, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """out, d_hidden and d_share of these tokens in float64, an expert at a time.

    y = down(silu(gate(x)) · up(x)) of each choice, out = Σ share · y; d silu(z) = σ(z)(1 + z(1 − σ(z))).
    """
    x, grad, share = (one.detach()[rows].double() for one in (setting.hidden, setting.grad, setting.share))
    index = setting.index[rows]
    out, d_hidden, d_share = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(share)
    for expert in index.unique().tolist():
        token, choice = torch.where(index == expert)
        first, second = setting.gate_up[expert].double(), setting.down[expert].double()
        gate, up = (x[token] @ first.T).chunk(2, -1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        y = (silu * up) @ second.T
        part = share[token, choice].unsqueeze(1)
        out.index_add_(0, token, part * y)
        d_share[token, choice] = (y * grad[token]).sum(-1)
        d_inner = (part * grad[token]) @ second
        d_gate = d_inner * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_hidden.index_add_(0, token, torch.cat((d_gate, d_inner * silu), -1) @ first)
    return {"out": out, "d_hidden": d_hidden, "d_share": d_share}


def transformers_experts(implementation: str) -> Implementation:
    """transformers' experts, by the name that it gives an implementation."""

    def build(setting: Setting) -> Layer:
        if implementation == "batched_mm":
            affordable(setting)
        module = qwen3_experts(setting, implementation)
        return Layer(lambda x, share: module(x, setting.index, share), setting.gate_up.nbytes + setting.down.nbytes)

    return build


def affordable(setting: Setting) -> None:
    """Missing where weights copied for each choice would not fit."""
    each = expert_values(setting.case) * setting.gate_up.itemsize
    needed, device = each * setting.index.numel(), setting.hidden.device
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    if needed > (total // COPIED_SHARE or COPIED_CPU):
        raise Missing(f"copies an expert's weights for each choice of each token: {needed / 2**30:.0f} GiB here")


def qwen3_experts(setting: Setting, implementation: str) -> torch.nn.Module:
    """transformers' module with the setting's weights, frozen and not copied."""
    try:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        raise Missing(f"transformers' Qwen3MoeExperts cannot be imported: {first_line(error)}") from error
    case = setting.case
    config = Qwen3MoeConfig(
        hidden_size=int(case["hidden"]),
        moe_intermediate_size=int(case["intermediate"]),
        num_experts=int(case["experts"]),
        num_experts_per_tok=int(case["top_k"]),
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module: torch.nn.Module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(setting.gate_up, requires_grad=False)
    module.down_proj = torch.nn.Parameter(setting.down, requires_grad=False)
    return module


def dequantize_grouped_mm(setting: Setting) -> Layer:
    """Experts packed by bitsandbytes' parametrization: decoded, all of them, at each access; then grouped_mm."""
    try:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit
    except ImportError as error:
        raise Missing(f"bitsandbytes' parametrize cannot be imported: {first_line(error)}") from error
    for weight in (setting.gate_up, setting.down):
        whole_blocks(weight)
    module = qwen3_experts(setting, "grouped_mm")
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(module, name, compress_statistics=True, quant_type="nf4")
    exact = replace(setting, gate_up=module.gate_up_proj.detach(), down=module.down_proj.detach())
    packed = [quantised(one)[0].nbytes for one in (setting.gate_up, setting.down)]
    return Layer(lambda x, share: module(x, setting.index, share), sum(packed), exact, "decodes all experts a pass")


def radeon_grouped(setting: Setting) -> Layer:
    """Ours, over the 16-bit weights."""
    note = kernels_run_on(setting.hidden.device, str(setting.case["dtype"]))
    from radeon_stack.kernels.experts import gated_experts

    def forward(x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        return gated_experts(x, setting.index, share, setting.gate_up, setting.down)

    return Layer(forward, setting.gate_up.nbytes + setting.down.nbytes, note=note, timed=not note)


def radeon_nf4(setting: Setting) -> Layer:
    """Ours, over experts that stay in NF4, doubly quantised."""
    note = kernels_run_on(setting.hidden.device, str(setting.case["dtype"]))
    from radeon_stack.kernels.experts import gated_experts

    (gate_up, gate_up_values), (down, down_values) = quantised(setting.gate_up), quantised(setting.down)

    def forward(x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        return gated_experts(x, setting.index, share, gate_up, down)

    exact = replace(setting, gate_up=gate_up_values, down=down_values)
    return Layer(forward, gate_up.nbytes + down.nbytes, exact, note, timed=not note)


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "eager": transformers_experts("eager"),
    "batched_mm": transformers_experts("batched_mm"),
    "grouped_mm": transformers_experts("grouped_mm"),
    "dequantize_grouped_mm": dequantize_grouped_mm,
    "radeon_grouped": radeon_grouped,
    "radeon_nf4": radeon_nf4,
}
SUITE = Ffn()
