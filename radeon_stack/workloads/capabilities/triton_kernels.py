"""Three small Triton kernels: that they compile and run is the question."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """out = x + y over n values."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, mask=inside) + tl.load(y + at, mask=inside), mask=inside)


@triton.jit
def dot(x, w, out, inner, columns, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """out [m, n] float32 = x [m, k] · w [k, n], row-major; sizes are multiples of the tile."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    k = tl.arange(0, K)
    total = tl.zeros((M, N), dtype=tl.float32)
    for begin in range(0, inner, K):
        left = tl.load(x + row[:, None] * inner + (begin + k)[None, :])
        right = tl.load(w + (begin + k)[:, None] * columns + column[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + row[:, None] * columns + column[None, :], total)
