"""Small Triton kernels that the audit of kernels is tried on: good ones, and one of each kind that is not."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from radeon_stack.kernels.variant import Variant


@triton.jit
def matmul(a, b, c, m, n, k, row_a, row_b, row_c, tile_m: tl.constexpr, tile_n: tl.constexpr, tile_k: tl.constexpr):
    rows = tl.program_id(0) * tile_m + tl.arange(0, tile_m)
    columns = tl.program_id(1) * tile_n + tl.arange(0, tile_n)
    inner = tl.arange(0, tile_k)
    total = tl.zeros((tile_m, tile_n), tl.float32)
    for start in range(0, k, tile_k):
        left = tl.load(
            a + rows[:, None] * row_a + (start + inner)[None, :],
            mask=(rows < m)[:, None] & (start + inner < k)[None, :],
            other=0.0,
        )
        right = tl.load(
            b + (start + inner)[:, None] * row_b + columns[None, :],
            mask=(start + inner < k)[:, None] & (columns < n)[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(
        c + rows[:, None] * row_c + columns[None, :],
        total.to(c.dtype.element_ty),
        mask=(rows < m)[:, None] & (columns < n)[None, :],
    )


@triton.jit
def add(a, b, n, block: tl.constexpr):
    places = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(b + places, tl.load(a + places, mask=places < n) + 1, mask=places < n)


@triton.jit
def aborting(a, block: tl.constexpr):
    tl.store(a + tl.arange(0, block), tl.load(a + tl.arange(0, block)), missing=True)


class Aborting:
    """Stands for a kernel on which the compiler dies."""

    fn = None  # no source
    arg_names: tuple[str, ...] = ()

    def run(self, *args: Any, **options: Any) -> None:
        import os

        os.write(2, b"LLVM ERROR: Cannot select: intrinsic\n")
        os.abort()


def matmul_variant(name: str, tile: tuple[int, int, int], kind: str = "bf16", **told: Any) -> Variant:
    sizes = dict.fromkeys(("m", "n", "k", "row_a", "row_b", "row_c"), "i32")
    told = {"num_warps": 8, "num_stages": 2, "dot": True, "default": True} | told
    return Variant(
        name,
        matmul,
        dict.fromkeys(("a", "b", "c"), f"*{kind}") | sizes | dict.fromkeys(("tile_m", "tile_n", "tile_k"), "constexpr"),
        dict(zip(("tile_m", "tile_n", "tile_k"), tile, strict=True)),
        aligned=("a", "b", "c", "k", "row_a", "row_b", "row_c"),
        **told,
    )


ADD = {"a": "*fp16", "b": "*fp16", "n": "i32", "block": "constexpr"}


def variants(arch: str) -> tuple[Variant, ...]:
    return (
        matmul_variant("good", (128, 128, 32)),
        Variant("no dot", add, ADD, {"block": 1024}, 4, 1, False, True),
        matmul_variant("spills", (128, 256, 32), num_warps=4),
        matmul_variant("spills, not a default", (128, 256, 32), num_warps=4, default=False),
        matmul_variant("fp32", (64, 64, 32), kind="fp32", num_warps=4),
        matmul_variant("too much LDS", (64, 64, 128), num_warps=4, num_stages=5, default=False),
        Variant("does not compile", aborting, {"a": "*fp32", "block": "constexpr"}, {"block": 64}, 4, 1, False, True),
        Variant("compiler dies", Aborting(), {}, {}, 4, 1, False, True),
        Variant("told wrongly", add, dict(ADD, n="constexpr"), {"n": 7, "block": 64}, 4, 1, False, True),
    )
