"""bitsandbytes: NF4 against its definition, its products against the decoded weight, the 8-bit optimizer."""

from __future__ import annotations

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim import AdamW8bit

from radeon_stack.workloads.capabilities.measure import (
    DTYPES,
    all_checked,
    checked,
    device,
    exact,
    on_gpu,
    random,
    timed,
    worst_row,
)
from radeon_stack.workloads.capabilities.steps import Measured, Step, Steps

# The 16 levels of NormalFloat4: QLoRA (arXiv 2305.14314), appendix E.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK = 64
SIZE, CPU_SIZE = 4096, 256
# Mean step of 8-bit AdamW against float64, relative: block-wise states (arXiv 2110.02861) cost some percent.
ADAM_STEPS, ADAM_ERROR = 5, 0.1


def nf4(seed: int) -> Steps:
    """Steps `round trip` (each value to a nearest level of its block of 64) and `double` (block scales in 8 bit)."""
    kind = DTYPES["bf16"]
    weight = random(seed, *_shape(), dtype=kind)
    blocks = exact(weight).reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    cuts = (levels[1:] + levels[:-1]) / 2
    expected = levels[torch.bucketize(blocks / scales, cuts)] * scales

    def once(double: bool) -> torch.Tensor:
        packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=double)
        return dequantize_4bit(packed, state).reshape(-1, BLOCK)

    def round_trip() -> Measured:
        # Between two levels as near, either is right: no farther than the nearest, and a level, is what is asked.
        found = exact(once(False)) / scales
        x = blocks / scales
        farther = (found - x).abs() - (expected / scales - x).abs()
        beside = (found.reshape(-1)[: 1 << 16, None] - levels).abs().amin(1)
        error = float(torch.maximum(farther.max(), beside.max()))
        return Measured(error, torch.finfo(kind).eps, timed(lambda: once(False)))

    def double() -> Measured:
        # Scales of 8 bit are off by 1 % to 3 %, and either of two levels as near may be taken.
        return Measured(worst_row(once(True), expected), 0.15, timed(lambda: once(True)))

    yield Step("round trip", round_trip)
    yield Step("double", double)


def nf4_matmul(seed: int) -> Steps:
    """Steps `forward` (512 rows), `one row` (what decoding calls) and `backward` of an NF4 layer in bf16."""
    kind = DTYPES["bf16"]
    columns, rows = _shape()
    layer = Linear4bit(rows, columns, bias=False, compute_dtype=kind, quant_type="nf4")
    layer.weight.data.copy_(random(seed, columns, rows, scale=rows**-0.5))
    layer = layer.to(device())
    layer.support_avx512bf16_for_cpu = False  # its repacked layout has no backward
    x = random(seed + 1, 512 if on_gpu() else 16, rows, dtype=kind).requires_grad_()
    one = x.detach()[:1]
    upstream = random(seed + 2, x.shape[0], columns, dtype=kind)
    weight = exact(dequantize_4bit(layer.weight.data, layer.weight.quant_state))

    def forward() -> Measured:
        return checked(layer(x), exact(x) @ weight.T, kind, timed(lambda: layer(x)))

    def single() -> Measured:
        with torch.no_grad():
            return checked(layer(one), exact(one) @ weight.T, kind, timed(lambda: layer(one)))

    def backward() -> Measured:
        y = layer(x)

        def once() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(y, (x,), upstream, retain_graph=True)

        return all_checked([(once()[0], exact(upstream) @ weight)], kind, timed(once))

    yield Step("forward", forward)
    yield Step("one row", single)
    yield Step("backward", backward)


def adamw8bit(seed: int) -> Steps:
    """Step `steps`: five steps of AdamW8bit against AdamW's definition in float64 (one alone reads no state back)."""

    def run() -> Measured:
        start = random(seed, 512, 512)
        weight = torch.nn.Parameter(start.clone())
        optimizer = AdamW8bit([weight], lr=1e-2, weight_decay=0.0)
        gradients = [random(seed + 1 + i, 512, 512) for i in range(ADAM_STEPS)]
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        expected = _adam([exact(g) for g in gradients], lr=1e-2)
        moved = exact(weight) - exact(start)
        error = float((moved - expected).abs().mean() / expected.abs().mean())
        if torch.uint8 not in {getattr(value, "dtype", None) for value in optimizer.state[weight].values()}:
            raise RuntimeError("it keeps no 8-bit state")
        return Measured(error, ADAM_ERROR, timed(optimizer.step))

    yield Step("steps", run)


def _adam(gradients: list[torch.Tensor], lr: float) -> torch.Tensor:
    """What Adam moves a weight by (arXiv 1412.6980, algorithm 1; β 0.9 and 0.999, ε 1e-8)."""
    first = second = moved = torch.zeros_like(gradients[0])
    for t, g in enumerate(gradients, start=1):
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        moved = moved - lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    return moved


def _shape() -> tuple[int, int]:
    return (SIZE, SIZE) if on_gpu() else (CPU_SIZE, CPU_SIZE)
