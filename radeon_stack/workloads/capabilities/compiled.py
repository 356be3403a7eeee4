"""Does Triton compile for this card, and is what it compiles right?"""

from __future__ import annotations

import torch

from radeon_stack.workloads.capabilities.fp8 import native
from radeon_stack.workloads.capabilities.measure import checked, device, exact, random, timed
from radeon_stack.workloads.capabilities.steps import Measured, Step, Steps

COUNT, BLOCK = 1_000_003, 1024  # the last block is a partial one
ROWS, INNER, COLUMNS = 512, 1024, 512
TILE = (64, 64, 64)


def add(seed: int) -> Steps:
    """Step `run`: the sum of two vectors in float32."""
    from radeon_stack.workloads.capabilities import triton_kernels as kernels

    def run() -> Measured:
        x, y = random(seed, COUNT), random(seed + 1, COUNT)
        out = torch.full_like(x, torch.nan)
        grid = (-(-COUNT // BLOCK),)
        kernels.add[grid](x, y, out, COUNT, BLOCK=BLOCK)
        return checked(
            out, exact(x) + exact(y), torch.float32, timed(lambda: kernels.add[grid](x, y, out, COUNT, BLOCK=BLOCK))
        )

    yield Step("run", run)


def dot(seed: int, dtype: str) -> Steps:
    """Step `run`: a product by `tl.dot` with float32 sums, of bf16 or 8-bit floats (e4m3 as the card has it)."""
    from radeon_stack.workloads.capabilities import triton_kernels as kernels

    kind = torch.bfloat16 if dtype == "bf16" else native("e4m3fn")

    def run() -> Measured:
        x, w = random(seed, ROWS, INNER).to(kind), random(seed + 1, INNER, COLUMNS).to(kind)
        out = torch.full((ROWS, COLUMNS), torch.nan, device=device())
        m, n, k = TILE

        def once() -> None:
            kernels.dot[(ROWS // m, COLUMNS // n)](x, w, out, INNER, COLUMNS, M=m, N=n, K=k)

        once()
        # Operands are exact, sums are float32: what matrix units keep of them is no less than bf16's spacing.
        return checked(out, exact(x.float()) @ exact(w.float()), torch.float16, timed(once))

    yield Step("run", run)
