"""8-bit floats: casts to each format, and scaled products."""

from __future__ import annotations

import torch

from radeon_stack.workloads.capabilities.measure import checked, device, exact, on_gpu, random, timed
from radeon_stack.workloads.capabilities.steps import Measured, MissingError, Step, Steps

# Exponent bits, mantissa bits, bias, and whether it is "fnuz": no infinities, no -0, NaN at 0x80 (OCP OFP8 1.0 for
# the first two; arXiv 2206.02915 for fnuz).
FORMATS = {
    "e4m3fn": (4, 3, 7, False),
    "e5m2": (5, 2, 15, False),
    "e4m3fnuz": (4, 3, 8, True),
    "e5m2fnuz": (5, 2, 16, True),
}
VALUES = 1 << 16
ROWS, INNER, COLUMNS = 512, 2048, 768
CPU_ROWS, CPU_INNER, CPU_COLUMNS = 32, 64, 48


def cast(seed: int, name: str) -> Steps:
    """Steps `encode` (float32 to the nearest value of the format, ties to even) and `decode` (of each code)."""
    kind = _dtype(name)
    codes = torch.arange(256, dtype=torch.uint8)
    values = decoded(name)
    finite = values.isfinite()

    def encode() -> Measured:
        largest = float(values[finite].max())
        x = random(seed, VALUES).clamp(-3, 3) * torch.logspace(-3, 0, VALUES, device=device()) * (largest / 3)
        error = nearest(x, values) - exact(x.to(kind).float())
        return Measured(float(error.abs().max() / largest), 0.0)

    def decode() -> Measured:
        found = exact(codes.to(device()).view(kind).float())
        if not torch.equal(found.isfinite(), finite):
            return Measured(float("nan"), 0.0)
        return Measured(float((found - values)[finite].abs().max()), 0.0)

    yield Step("encode", encode)
    yield Step("decode", decode)


def decoded(name: str) -> torch.Tensor:
    """[256] float64: the value of each code, from the format's definition; inf and NaN are both NaN."""
    exponent_bits, mantissa_bits, bias, fnuz = FORMATS[name]
    values = []
    for code in range(256):
        sign, rest = -1.0 if code & 0x80 else 1.0, code & 0x7F
        exponent, mantissa = rest >> mantissa_bits, rest & ((1 << mantissa_bits) - 1)
        fraction = mantissa / (1 << mantissa_bits)
        small = exponent == 0
        value = sign * (fraction if small else 1 + fraction) * 2.0 ** ((1 if small else exponent) - bias)
        top = exponent == (1 << exponent_bits) - 1
        special = code == 0x80 if fnuz else rest == 0x7F if name == "e4m3fn" else top
        values.append(float("nan") if special else value)
    return torch.tensor(values, dtype=torch.float64)


def nearest(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[n] float64: the finite value of the format nearest to each x; of two as near, the one with an even code."""
    keep = values.isfinite() & ((torch.arange(256) < 0x80) | (values != 0))  # one zero
    codes = torch.arange(256)[keep]
    ordered, order = values[keep].sort()
    even = (codes[order] & 1) == 0
    at = exact(x)
    above = torch.searchsorted(ordered, at).clamp(1, len(ordered) - 1)
    low, high = ordered[above - 1], ordered[above]
    to_low, to_high = at - low, high - at
    take_low = (to_low < to_high) | ((to_low == to_high) & even[above - 1])
    return torch.where(take_low, low, high)


def scaled_mm(seed: int, scaling: str, left: str) -> Steps:
    """Step `forward`: [m, k] · [k, n] of 8-bit floats with scales (one each, or a row's and a column's), in bf16."""
    first, second = native(left), native("e4m3fn")
    rows, inner, columns = (ROWS, INNER, COLUMNS) if on_gpu() else (CPU_ROWS, CPU_INNER, CPU_COLUMNS)
    x = random(seed, rows, inner).to(first)
    w = random(seed + 1, columns, inner).to(second).T
    by_row = scaling == "row"
    scale_x = 0.5 + random(seed + 2, *((rows, 1) if by_row else ())).abs()
    scale_w = 0.5 + random(seed + 3, *((1, columns) if by_row else ())).abs()
    if not hasattr(torch, "_scaled_mm"):
        raise MissingError(f"_scaled_mm in torch {torch.__version__}")

    def once() -> torch.Tensor:
        return torch._scaled_mm(x, w, scale_a=scale_x, scale_b=scale_w, out_dtype=torch.bfloat16)

    def forward() -> Measured:
        expected = (exact(x.float()) @ exact(w.float())) * exact(scale_x) * exact(scale_w)
        return checked(once(), expected, torch.bfloat16, timed(once))

    yield Step("forward", forward)


def native(name: str) -> torch.dtype:
    """The format that the matrix units take: fnuz on gfx94x (LLVM's AMDGPUUsage), OCP's elsewhere."""
    if on_gpu() and str(getattr(torch.cuda.get_device_properties(0), "gcnArchName", "")).startswith("gfx94"):
        name = {"e4m3fn": "e4m3fnuz", "e5m2": "e5m2fnuz"}[name]
    return _dtype(name)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, f"float8_{name}", None)
    if not isinstance(found, torch.dtype):
        raise MissingError(f"float8_{name} in torch {torch.__version__}")
    return found
