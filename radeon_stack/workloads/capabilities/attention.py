"""Causal attention, forward and backward, by each of torch's backends and by flash-attn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from radeon_stack.workloads.capabilities.measure import DTYPES, all_checked, checked, exact, on_gpu, random, timed
from radeon_stack.workloads.capabilities.steps import Measured, Step, Steps

# One sequence of the seed's benchmark (32 heads, 2048 tokens); less where there is no GPU.
HEADS, LENGTH = 32, 2048
CPU_HEADS, CPU_LENGTH = 4, 128
BACKENDS = {
    "sdpa_flash": "FLASH_ATTENTION",
    "sdpa_efficient": "EFFICIENT_ATTENTION",
    "sdpa_cudnn": "CUDNN_ATTENTION",
    "sdpa_math": "MATH",
}
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attention(seed: int, implementation: str, dtype: str, head_dim: int) -> Steps:
    """Steps `forward` and `backward` on [1, heads, length, head_dim]; first and last head are checked."""
    kind = DTYPES[dtype]
    heads, length = (HEADS, LENGTH) if on_gpu() else (CPU_HEADS, CPU_LENGTH)
    shape = (1, heads, length, head_dim)
    q, k, v = (random(seed + i, *shape, dtype=kind).requires_grad_() for i in range(3))
    upstream = random(seed + 3, *shape, dtype=kind)
    call = _call(implementation)
    ends = [0, heads - 1]
    some = [exact(tensor[:, ends]).requires_grad_() for tensor in (q, k, v)]
    expected = plain(*some)
    gradients = torch.autograd.grad(expected, some, exact(upstream[:, ends]))
    made: list[torch.Tensor] = []

    def forward() -> Measured:
        made.append(call(q, k, v))
        return checked(made[0][:, ends], expected.detach(), kind, timed(lambda: call(q, k, v)))

    def backward() -> Measured:
        def once() -> Any:
            return torch.autograd.grad(made[0], (q, k, v), upstream, retain_graph=True)

        pairs = [(found[:, ends], right) for found, right in zip(once(), gradients, strict=True)]
        return all_checked(pairs, kind, timed(once))

    yield Step("forward", forward)
    yield Step("backward", backward)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The definition: softmax(q kᵀ / √d + causal mask) v over [batch, heads, length, d]."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As transformers' `eager`: products in the model's dtype, softmax in float32."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


def _call(implementation: str) -> Call:
    attend = torch.nn.functional.scaled_dot_product_attention
    if implementation == "eager":
        return _eager
    if implementation == "sdpa":
        return lambda q, k, v: attend(q, k, v, is_causal=True)
    if implementation == "flash_attn":
        from flash_attn import flash_attn_func

        return lambda q, k, v: flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True).transpose(1, 2)
    backend = getattr(SDPBackend, BACKENDS[implementation])

    def held(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([backend]):
            return attend(q, k, v, is_causal=True)

    return held
