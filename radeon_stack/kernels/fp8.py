"""A frozen linear layer whose weight is in 8-bit floats, forward and back.

The format is OCP's e4m3fn (finite, 4 exponent and 3 mantissa bits, largest 448), not gfx942's own fnuz. Weights alone
are in 8 bit: activations and gradients keep their dtype, so nothing else is rounded, except where `_scaled_mm` is asked
for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from radeon_stack.errors import UsageError
from radeon_stack.kernels.configs import FP8_DECODE_BLOCK, Tile, decode_once, fp8_tile, full_precision_tile
from radeon_stack.kernels.launch import family, launch
from radeon_stack.kernels.once import apply, once_differentiable
from radeon_stack.kernels.sizes import cdiv

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3fn: 1.75 · 2^8 (OCP OFP8 1.0, table 1)
BLOCK = 128  # rows and columns that share a scale in block-wise FP8 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)

Way = Literal["auto", "dequantize", "triton", "scaled_mm"]
"""How a product is made. "dequantize": the weight in the activations' dtype, one at a time, for the length of one
product: anywhere. "triton": the weight decoded in the product's loop. "scaled_mm": `torch._scaled_mm`, forward alone,
with activations rounded to e4m3fn by row: only where a probe found it right. "auto": "dequantize" on a CPU and for many
rows, else "triton"."""


@dataclass(frozen=True)
class Fp8Weight:
    """[N, K] in e4m3fn, and what its values are multiplied with: float32, not copied.

    scale: [N, 1], one for each output channel, or [⌈N / 128⌉, ⌈K / 128⌉], one for each block. UsageError for others.
    """

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype != E4M3 or self.scale.dtype != torch.float32:
            raise UsageError(
                f"a weight in {self.codes.dtype} with scales in {self.scale.dtype}: taken are {E4M3} and torch.float32",
                remedy="do not convert a quantised model with .to(dtype) or .half()",
            )
        n, k = self.codes.shape
        if self.scale.shape not in ((n, 1), (cdiv(n, BLOCK), cdiv(k, BLOCK))):
            raise UsageError(f"scales {list(self.scale.shape)} of a weight [{n}, {k}]: neither by channel nor by block")

    @property
    def by_block(self) -> bool:
        """Of a matrix of at most 128 columns and one row, both are the same."""
        return tuple(self.scale.shape) != (self.codes.shape[0], 1)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes in memory, scales included."""
        return self.codes.nbytes + self.scale.nbytes


def quantize(matrix: Tensor) -> Fp8Weight:
    """A 16- or 32-bit matrix [N, K], each channel scaled so that its largest value is e4m3fn's; ties to even.

    A channel of zeros keeps the scale 1. One with a NaN or an infinity is all NaN.
    """
    values = matrix.float()
    largest = values.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    # A channel so small that its scale is subnormal may come out above 448, where the cast would give NaN.
    codes = (values / scale).clamp(-LARGEST, LARGEST).to(E4M3)
    bad = ~largest.isfinite()
    return Fp8Weight(codes, torch.where(bad, torch.nan, scale))


def dequantize(weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """The definition: code · scale in float32, rounded to `dtype` once. [N, K]."""
    every = torch.arange(256, dtype=torch.uint8, device=weight.codes.device).view(E4M3).float()
    codes = _bytes(weight.codes).flatten().int()
    values = every.index_select(0, codes).view(weight.shape)  # on a CPU five times as fast as torch's cast
    if not weight.by_block:
        return values.mul_(weight.scale).to(dtype)
    rows = weight.scale.repeat_interleave(BLOCK, 0)[: weight.shape[0]]
    for number in range(rows.shape[1]):  # scales of the size of the weight would be a second float32 copy
        values[:, BLOCK * number : BLOCK * (number + 1)].mul_(rows[:, number, None])
    return values.to(dtype)


def fp8_linear_reference(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """x·wᵀ + bias; x: […, K]."""
    return functional.linear(x, dequantize(weight, x.dtype), None if bias is None else bias.to(x.dtype))


def fp8_linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None, way: Way = "auto") -> Tensor:
    """The same; the gradient goes to x, weight and bias are frozen. x: […, K] in 16 or 32 bit."""
    if x.shape[-1] != weight.shape[1]:
        raise UsageError(f"x is {tuple(x.shape)}, and the layer takes rows of {weight.shape[1]}")
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = apply(_Fp8Linear, rows, _Frozen(weight, bias, way))
    return out.view(*x.shape[:-1], weight.shape[0])


@dataclass(frozen=True)
class _Frozen:
    weight: Fp8Weight
    bias: Tensor | None
    way: Way


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: _Frozen) -> Tensor:
        ctx.frozen = frozen  # by reference: what is frozen need not be kept twice
        return product(x, frozen.weight, frozen.bias, frozen.way, over_columns=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, None]:
        frozen: _Frozen = ctx.frozen
        if not ctx.needs_input_grad[0]:
            return None, None
        # In 8 bit, gradients would have three bits of mantissa: they are never rounded to it.
        way: Way = "auto" if frozen.way == "scaled_mm" else frozen.way
        return product(d_out, frozen.weight, None, way, over_columns=False), None


def product(x: Tensor, weight: Fp8Weight, bias: Tensor | None, way: Way, *, over_columns: bool) -> Tensor:
    """x·wᵀ + bias over columns, x·w else. x: [rows, K] or [rows, N]."""
    if way == "auto":
        many = x.device.type == "cpu" or decode_once(family(x.device), x.shape[0])
        way = "dequantize" if many else "triton"
    if way == "scaled_mm" and not over_columns:
        raise UsageError("_scaled_mm is for the way forward: gradients are not rounded to 8 bit")
    if way == "scaled_mm":
        return scaled_product(x, weight, bias)
    if way == "triton":
        return decoding_product(x, weight, bias, over_columns=over_columns)
    matrix = decode(weight, x.dtype)
    if not over_columns:
        return x @ matrix
    return functional.linear(x, matrix, None if bias is None else bias.to(x.dtype))


def decode(weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """`dequantize`, on a GPU by a kernel: without a float32 copy on the way."""
    return dequantize(weight, dtype) if weight.codes.device.type == "cpu" else decode_by_kernel(weight, dtype)


def decode_by_kernel(weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """`dequantize` to the bit, by the kernel."""
    from radeon_stack.kernels.jit.fp8 import fp8_decode

    out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    rows, columns = weight.shape
    constants = {"BLOCKS": int(weight.by_block), "BLOCK_C": FP8_DECODE_BLOCK}
    launch(
        fp8_decode,
        (rows, cdiv(columns, FP8_DECODE_BLOCK), 1),
        (_bytes(weight.codes), weight.scale.contiguous(), out, columns),
        constants,
    )
    return out


def decoding_product(
    x: Tensor, weight: Fp8Weight, bias: Tensor | None, *, over_columns: bool, tile: Tile | None = None
) -> Tensor:
    """The product by the kernel that decodes the weight in its loop."""
    from radeon_stack.kernels.jit.fp8 import fp8_linear as kernel

    x = x.contiguous()
    rows, k = x.shape
    n = weight.shape[0] if over_columns else weight.shape[1]
    out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    if tile is None:
        scaled = not over_columns and not weight.by_block
        wide = x.dtype == torch.float32
        tile = full_precision_tile() if wide else fp8_tile(family(x.device), rows, scaled=scaled)
    constants = {
        "OVER_COLUMNS": over_columns,
        "BLOCKS": int(weight.by_block),
        "BIAS": bias is not None,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP": tile.group,
    }
    arguments = (x, _bytes(weight.codes), weight.scale.contiguous(), x if bias is None else bias, out, rows, n, k)
    grid = (cdiv(rows, tile.m) * cdiv(n, tile.n), 1, 1)
    launch(kernel, grid, arguments, constants, warps=tile.warps, stages=tile.stages)
    return out


def scaled_product(x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
    """x·wᵀ + bias by `torch._scaled_mm`: x rounded to e4m3fn, each row scaled to its largest. In bf16, then x's."""
    if weight.by_block:
        raise UsageError("_scaled_mm takes scales by channel, and this weight has them by block")
    rows = x.float()
    largest = rows.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    codes = (rows / scale).clamp(-LARGEST, LARGEST).to(E4M3)
    out = torch._scaled_mm(
        codes, weight.codes.T, scale_a=scale, scale_b=weight.scale.reshape(1, -1), out_dtype=torch.bfloat16
    )
    out = out if bias is None else out + bias.to(out.dtype)
    return out.to(x.dtype)


def _bytes(codes: Tensor) -> Tensor:
    return codes.contiguous().view(torch.uint8)


class Fp8Linear(nn.Linear):
    """`nn.Linear` with its weight in e4m3fn and `weight_scale` beside it; frozen.

    It computes in its input's dtype, or autocast's. `compute_dtype` is what adapters are made in: PEFT would otherwise
    make them in the weight's dtype, and round their first values to 8 bit.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        compute_dtype: torch.dtype,
        scale_shape: tuple[int, int] | None = None,
        way: Way = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=compute_dtype)
        codes: Tensor = self.weight.detach().to(E4M3)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scale = codes.new_ones(scale_shape or (out_features, 1), dtype=torch.float32)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.compute_dtype = compute_dtype
        self.way: Way = way

    @property
    def quantized(self) -> Fp8Weight:
        """Its weight, not copied."""
        return Fp8Weight(self.weight.detach(), self.weight_scale.detach())

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))  # noqa: A001
        bias = None if self.bias is None else self.bias.detach()
        return fp8_linear(input, self.quantized, bias, self.way)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, e4m3fn, scales {list(self.weight_scale.shape)}"
