"""The router of a mixture-of-experts layer: transformers' and ours, with its linear layer and without, against float64.

`part`: `router` is the whole, from hidden states; `bare` is what follows the linear layer: softmax over all experts,
the top_k largest, their weights normalised. The linear layer is frozen and the same on both sides.

`layers`: so many routers on hidden states of their own, and one way back through all, as a model has it. A way back of
its own costs the host more than a router does. What is compared is the first one's.

Which experts are chosen can only be judged where float64 has a clear answer: tokens whose last chosen and first left
expert are tied, or nearer than the rounding of the logits, are left out of every comparison, and their number is told.
Everything is compared expert by expert, since the order among equal ones means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from radeon_stack.figures import Case
from radeon_stack.workloads.bench.ffn import tokens_of
from radeon_stack.workloads.bench.nf4 import DTYPES, LIMIT_ULPS, kernels_run_on, ulp
from radeon_stack.workloads.bench.suite import Built, Missing, Work
from radeon_stack.workloads.bench.timing import Call, first_line

Routed = tuple[torch.Tensor, torch.Tensor]
Router = Callable[[torch.Tensor], Routed]


@dataclass(frozen=True)
class Setting:
    """Inputs of a case. x: hidden states [tokens, hidden], or for `bare` logits [tokens, experts]; weight: the linear
    layer's, [experts, hidden]; grad [tokens, experts] is the gradient that an expert's weight gets where it is chosen.
    `others` are the inputs of the further layers, which share the weight.
    """

    case: Case
    x: torch.Tensor
    weight: torch.Tensor
    grad: torch.Tensor
    others: tuple[torch.Tensor, ...] = ()

    @property
    def bare(self) -> bool:
        return self.case["part"] == "bare"

    @property
    def top_k(self) -> int:
        return int(self.case["top_k"])

    def logits(self) -> torch.Tensor:
        """In float64."""
        x = self.x.detach().double()
        return x if self.bare else x @ self.weight.double().T

    def clear(self) -> torch.Tensor:
        """Tokens [tokens, bool] whose experts are beyond doubt."""
        logits = self.logits()
        if self.top_k == logits.shape[1]:
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        *_, last, first_left = logits.topk(self.top_k + 1, -1).values.unbind(-1)
        # Each logit is rounded by half a unit at most; twice that is left for the sum's own.
        doubt = 0.0 if self.bare else 2 * ulp(str(self.case["dtype"])) * logits.abs().amax(-1)
        return last - first_left > doubt


@dataclass(frozen=True)
class Gating:
    """The suite's object."""

    name: str = "gating"
    address: str = f"{__name__}:SUITE"
    results: Mapping[str, str] = field(
        default_factory=lambda: {"chosen": "router", "weights": "forward", "d_x": "backward"}
    )

    @property
    def implementations(self) -> Sequence[str]:
        return tuple(IMPLEMENTATIONS)

    def cases(self, config: Any) -> list[Case]:
        return [{**one, "dtype": DTYPES[one["dtype"]]} for one in config.gating.combinations()]

    def dtype(self, case: Case) -> str:
        return str(case["dtype"])

    def work(self, case: Case) -> Mapping[str, Work]:
        """Of each layer: hidden states (or logits) in, weights and int64 indices out; the way back reads the gradient
        and index.
        """
        tokens, experts, hidden, top_k = tokens_of(case), *(int(case[n]) for n in ("experts", "hidden", "top_k"))
        dtype = self.dtype(case)
        size, bare = getattr(torch, dtype).itemsize, case["part"] == "bare"
        x = tokens * (experts if bare else hidden) * size
        weight, done = (0, 0.0) if bare else (experts * hidden * size, 2.0 * tokens * experts * hidden)
        routed = tokens * top_k * (size + 8)
        layers = int(case["layers"])
        forward = Work(layers * (x + weight + routed), layers * done, dtype, tokens)
        # The softmax is needed again: its logits are read, or computed from the hidden states.
        backward = Work(layers * (2 * x + weight + routed), layers * done, dtype, tokens)
        step = Work(forward.bytes + backward.bytes, forward.operations + backward.operations, dtype, tokens)
        return {"forward": forward, "backward": backward, "step": step}

    def setting(self, case: Case, device: torch.device, seed: int) -> Setting:
        generator = torch.Generator(device).manual_seed(seed)
        tokens, experts, hidden = tokens_of(case), int(case["experts"]), int(case["hidden"])
        dtype = getattr(torch, self.dtype(case))

        def draw(*shape: int, std: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, device=device, generator=generator) * std).to(dtype)

        def inputs() -> torch.Tensor:
            return draw(tokens, experts if case["part"] == "bare" else hidden).requires_grad_()

        x, weight, grad = inputs(), draw(experts, hidden, std=hidden**-0.5), draw(tokens, experts)
        return Setting(case, x, weight, grad, tuple(inputs() for _ in range(int(case["layers"]) - 1)))

    def build(self, name: str, setting: Setting) -> Built:
        router, note = IMPLEMENTATIONS[name](setting)
        inputs = [setting.x, *setting.others]
        index = router(setting.x)[1]
        grads = [setting.grad.gather(1, index).to(setting.x.dtype)] * len(inputs)

        def forward() -> list[torch.Tensor]:
            return [router(x)[0] for x in inputs]

        def backward(weights: list[torch.Tensor]) -> Any:
            return torch.autograd.grad(weights, inputs, grads)

        def results() -> dict[str, torch.Tensor]:
            weights, index = router(setting.x)
            (d_x,) = torch.autograd.grad(weights, setting.x, setting.grad.gather(1, index).to(weights.dtype))
            return {"chosen": by_expert(torch.ones_like(weights), index, setting),
                    "weights": by_expert(weights.detach(), index, setting), "d_x": d_x}  # fmt: skip

        calls = {
            "forward": Call(forward),
            "backward": Call(backward, prepare=forward),
            "step": Call(lambda: backward(forward())),
        }
        return Built(results, calls, note, timed=not note)

    def truth(self, setting: Setting) -> tuple[Mapping[str, torch.Tensor], str]:
        """weights = p / Σ p over the chosen, which is the softmax of the chosen logits alone; so is its gradient."""
        clear, logits = setting.clear(), setting.logits()
        values, index = logits.topk(setting.top_k, -1)
        weights, grad = values.softmax(-1), setting.grad.double().gather(1, index)
        d_values = weights * (grad - (weights * grad).sum(-1, keepdim=True))
        d_logits = by_expert(d_values, index, setting)
        d_x = d_logits if setting.bare else d_logits @ setting.weight.double()
        found = {"chosen": by_expert(torch.ones_like(weights), index, setting),
                 "weights": by_expert(weights, index, setting), "d_x": d_x}  # fmt: skip
        count = int(clear.sum())
        part = "" if count == len(clear) else f"{count} of {len(clear)} tokens, whose experts are beyond doubt"
        return {name: tensor[clear] for name, tensor in found.items()}, part

    def part(self, setting: Setting, results: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        clear = setting.clear()
        return {name: tensor.detach()[clear] for name, tensor in results.items()}

    def limit(self, case: Case) -> float:
        return LIMIT_ULPS * ulp(self.dtype(case))


def by_expert(values: torch.Tensor, index: torch.Tensor, setting: Setting) -> torch.Tensor:
    """[tokens, top_k] as [tokens, experts], zero where an expert is not chosen."""
    dense = torch.zeros(len(values), int(setting.case["experts"]), dtype=values.dtype, device=values.device)
    return dense.scatter(1, index, values)


def transformers_router(setting: Setting) -> tuple[Router, str]:
    """transformers' Qwen3MoeTopKRouter; `bare`, what its forward does after the linear layer."""
    if setting.bare:
        return lambda logits: softmax_topk(logits, setting.top_k), ""
    try:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
    except ImportError as error:
        raise Missing(f"transformers' Qwen3MoeTopKRouter cannot be imported: {first_line(error)}") from error
    config = Qwen3MoeConfig(
        hidden_size=int(setting.case["hidden"]),
        num_experts=int(setting.case["experts"]),
        num_experts_per_tok=setting.top_k,
        norm_topk_prob=True,
    )
    with torch.device("meta"):
        module: Any = Qwen3MoeTopKRouter(config)
    module.weight = torch.nn.Parameter(setting.weight, requires_grad=False)

    def route(x: torch.Tensor) -> Routed:
        _, weights, index = module(x)
        return weights, index

    return route, ""


def softmax_topk(logits: torch.Tensor, top_k: int) -> Routed:
    """As a router in plain torch has it: softmax in float32, topk, normalised, rounded."""
    shares = F.softmax(logits, dtype=torch.float, dim=-1)
    weights, index = torch.topk(shares, top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), index


def radeon_router(setting: Setting) -> tuple[Router, str]:
    """torch's product, and the rest in one launch, forward and back."""
    note = kernels_run_on(setting.x.device, str(setting.case["dtype"]))
    from radeon_stack.kernels.router import gate, router

    if setting.bare:
        return lambda logits: router(logits, setting.top_k), note
    return lambda x: gate(x, setting.weight, setting.top_k), note


IMPLEMENTATIONS: Mapping[str, Callable[[Setting], tuple[Router, str]]] = {
    "transformers": transformers_router,
    "radeon_router": radeon_router,
}
SUITE = Gating()
