"""Mixture-of-experts layers by each of transformers' implementations, forward and backward."""

from __future__ import annotations

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from radeon_stack.workloads.capabilities.measure import (
    DTYPES,
    all_checked,
    checked,
    exact,
    on_gpu,
    random,
    timed,
)
from radeon_stack.workloads.capabilities.steps import Measured, MissingError, Step, Steps

EXPERTS, HIDDEN, INNER, TOKENS, TOP = 32, 1024, 512, 256, 4
CPU_EXPERTS, CPU_HIDDEN, CPU_INNER, CPU_TOKENS, CPU_TOP = 8, 64, 32, 48, 2


def experts(seed: int, implementation: str) -> Steps:
    """Steps `forward` and `backward` (of input and weights) of a layer of SwiGLU experts in bf16."""
    if implementation != "eager" and implementation not in ALL_EXPERTS_FUNCTIONS:
        raise MissingError(f"{implementation} among the experts implementations of transformers here")
    sizes = (
        (EXPERTS, HIDDEN, INNER, TOKENS, TOP) if on_gpu() else (CPU_EXPERTS, CPU_HIDDEN, CPU_INNER, CPU_TOKENS, CPU_TOP)
    )
    count, hidden, inner, tokens, top = sizes
    kind = DTYPES["bf16"]
    config = Qwen3MoeConfig(
        num_experts=count, hidden_size=hidden, moe_intermediate_size=inner, num_experts_per_tok=top, hidden_act="silu"
    )
    config._experts_implementation = implementation
    layer = Qwen3MoeExperts(config)
    layer.gate_up_proj.data = random(seed, count, 2 * inner, hidden, dtype=kind, scale=hidden**-0.5)
    layer.down_proj.data = random(seed + 1, count, hidden, inner, dtype=kind, scale=inner**-0.5)
    x = random(seed + 2, tokens, hidden, dtype=kind).requires_grad_()
    weights, chosen = random(seed + 3, tokens, count).softmax(-1).topk(top)
    weights = (weights / weights.sum(-1, keepdim=True)).to(kind)
    upstream = random(seed + 4, tokens, hidden, dtype=kind)
    leaves = (x, layer.gate_up_proj, layer.down_proj)
    copies = [exact(leaf).requires_grad_() for leaf in leaves]
    expected = plain(copies[0], copies[1], copies[2], chosen.cpu(), exact(weights))
    gradients = torch.autograd.grad(expected, copies, exact(upstream))
    made: list[torch.Tensor] = []

    def forward() -> Measured:
        made.append(layer(x, chosen, weights))
        return checked(made[0], expected.detach(), kind, timed(lambda: layer(x, chosen, weights)))

    def backward() -> Measured:
        def once() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(made[0], leaves, upstream, retain_graph=True)

        return all_checked(list(zip(once(), gradients, strict=True)), kind, timed(once))

    yield Step("forward", forward)
    yield Step("backward", backward)


def plain(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The definition, expert by expert.

    x [tokens, hidden], gate_up [experts, 2·inner, hidden], down [experts, hidden, inner], chosen and weights
    [tokens, top].
    """
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, dim=-1)
        row = (torch.nn.functional.silu(gate) * up) @ down[expert].T
        out = out.index_add(0, token, row * weights[token, place, None])
    return out
