"""Matrix products: LoRA's thin ones by either BLAS, and grouped ones."""

from __future__ import annotations

import torch

from radeon_stack.workloads.capabilities.measure import (
    DTYPES,
    all_checked,
    checked,
    device,
    exact,
    on_gpu,
    random,
    timed,
)
from radeon_stack.workloads.capabilities.steps import Measured, MissingError, Step, Steps

# A projection of an 8B model, and two numbers of tokens: one that tiles divide, and one that leaves them a tail.
FEATURES, TOKENS = 4096, (1024, 1000 + 13)
CPU_FEATURES, CPU_TOKENS = 256, (64, 61)
GROUPS = (0, 300, 1, 211, 0, 512)  # rows a group: none, one, odd
CPU_GROUPS = (0, 30, 1, 33)


def lora(seed: int, library: str, rank: int) -> Steps:
    """Steps `forward` (x·A·B) and `backward` (gradients of x, A and B) in bf16 at that rank.

    `library`: `lt` is hipBLASLt (cuBLASLt on CUDA), `blas` rocBLAS (cuBLAS). That it is right here does not clear
    hipBLASLt of reading past small operands: what lies behind them was mapped, which in a long run it may not be.
    """
    features, tokens = (FEATURES, TOKENS) if on_gpu() else (CPU_FEATURES, CPU_TOKENS)
    name = {"lt": "cublaslt", "blas": "cublas"}[library]
    kind = DTYPES["bf16"]
    a = random(seed, features, rank, dtype=kind, scale=features**-0.5)
    b = random(seed + 1, rank, features, dtype=kind, scale=rank**-0.5)
    xs = [random(seed + 2 + t, t, features, dtype=kind) for t in tokens]
    gs = [random(seed + 3 + t, t, features, dtype=kind) for t in tokens]

    def prefer() -> None:
        if on_gpu():
            torch.backends.cuda.preferred_blas_library(name)

    def forward_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x @ a
        return h, h @ b

    def backward_of(x: torch.Tensor, h: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dh = g @ b.T
        return dh, dh @ a.T, x.T @ dh, h.T @ g

    def forward() -> Measured:
        prefer()
        pairs = []
        for x in xs:
            h, y = forward_of(x)
            pairs += [(h, exact(x) @ exact(a)), (y, exact(h) @ exact(b))]
        _require_taken(name)
        return all_checked(pairs, kind, timed(lambda: forward_of(xs[0])))

    def backward() -> Measured:
        prefer()
        pairs = []
        for x, g in zip(xs, gs, strict=True):
            h = x @ a
            dh, dx, da, db = backward_of(x, h, g)
            pairs += [(dh, exact(g) @ exact(b).T), (dx, exact(dh) @ exact(a).T)]
            pairs += [(da, exact(x).T @ exact(dh)), (db, exact(h).T @ exact(g))]
        h = xs[0] @ a
        return all_checked(pairs, kind, timed(lambda: backward_of(xs[0], h, gs[0])))

    yield Step("forward", forward)
    yield Step("backward", backward)


def _require_taken(name: str) -> None:
    """Missing when torch took another library than it was told to: it does so on cards that the library lacks."""
    if on_gpu():
        taken = str(torch.backends.cuda.preferred_blas_library()).rpartition(".")[2].lower()
        if taken != name:
            raise MissingError(f"{name} for this card: torch took {taken}")


def grouped_mm(seed: int) -> Steps:
    """Steps `forward` and `backward` of torch's grouped product in bf16: [rows, k] · [groups, k, n], groups by rows."""
    call = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if call is None:
        raise MissingError(f"grouped_mm in torch {torch.__version__}")
    kind = DTYPES["bf16"]
    rows, (inner, outer) = (GROUPS, (2048, 768)) if on_gpu() else (CPU_GROUPS, (64, 48))
    x = random(seed, sum(rows), inner, dtype=kind).requires_grad_()
    weights = random(seed + 1, len(rows), inner, outer, dtype=kind, scale=inner**-0.5).requires_grad_()
    upstream = random(seed + 2, sum(rows), outer, dtype=kind)
    ends = torch.tensor(rows).cumsum(0).to(torch.int32).to(device())
    exact_x, exact_w = exact(x).requires_grad_(), exact(weights).requires_grad_()
    parts = exact_x.split(list(rows))
    expected = torch.cat([part @ weight for part, weight in zip(parts, exact_w, strict=True)])
    gradients = torch.autograd.grad(expected, (exact_x, exact_w), exact(upstream))
    made: list[torch.Tensor] = []

    def forward() -> Measured:
        made.append(call(x, weights, offs=ends))
        return checked(made[0], expected.detach(), kind, timed(lambda: call(x, weights, offs=ends)))

    def backward() -> Measured:
        def once() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(made[0], (x, weights), upstream, retain_graph=True)

        return all_checked(list(zip(once(), gradients, strict=True)), kind, timed(once))

    yield Step("forward", forward)
    yield Step("backward", backward)
