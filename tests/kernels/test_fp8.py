from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from radeon_stack.errors import UsageError
from radeon_stack.kernels import fp8
from radeon_stack.kernels.fp8 import BLOCK, E4M3, Fp8Linear, Fp8Weight, Way, dequantize, fp8_linear, quantize
from radeon_stack.kernels.jit.fp8 import e4m3, narrow
from radeon_stack.kernels.sizes import cdiv
from tests.kernels.helpers import DEVICE, GPU, HALVES, distance

LIMIT = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}
WAYS: tuple[Way, ...] = ("dequantize", "triton")


def by_channel(n: int, k: int) -> Fp8Weight:
    return quantize(torch.randn(n, k, device=DEVICE) * k**-0.5)


def by_block(n: int, k: int) -> Fp8Weight:
    codes = (torch.randn(n, k, device=DEVICE) * 100).clamp(-448, 448).to(E4M3)
    scale = (torch.rand(cdiv(n, BLOCK), cdiv(k, BLOCK), device=DEVICE) + 0.1) * k**-0.5 / 100
    return Fp8Weight(codes, scale)


MADE = {"channel": by_channel, "block": by_block}


def exact(weight: Fp8Weight) -> torch.Tensor:
    """[N, K] float64, from the definition."""
    n, k = weight.shape
    scale = weight.scale.double().cpu()
    if weight.by_block:
        scale = scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    return weight.codes.cpu().double() * scale


def check(dtype: torch.dtype, rows: int, weight: Fp8Weight, way: Way, *, bias: bool = False) -> None:
    n, k = weight.shape
    x = torch.randn(rows, k, device=DEVICE).to(dtype).requires_grad_()
    added = torch.randn(n, device=DEVICE).to(dtype) if bias else None
    out = fp8_linear(x, weight, added, way)
    d_out = torch.randn_like(out)
    (d_x,) = torch.autograd.grad(out, x, d_out)
    matrix = exact(weight)
    wanted = x.detach().cpu().double() @ matrix.T + (0 if added is None else added.cpu().double())
    assert distance(out, wanted) < LIMIT[dtype]
    assert distance(d_x, d_out.cpu().double() @ matrix) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("scales", MADE)
@pytest.mark.parametrize("rows", [1, 17, 40, 130])
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_and_its_gradient_are_the_definitions(way: Way, rows: int, scales: str, dtype: torch.dtype) -> None:
    check(dtype, rows, MADE[scales](192, 320), way, bias=True)


@settings(max_examples=15)
@given(st.data())
def test_any_shape_is_right(data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    weight = MADE[data.draw(st.sampled_from(sorted(MADE)))](n, k)
    check(torch.float16, data.draw(st.integers(1, 70)), weight, "triton", bias=data.draw(st.booleans()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_code_is_decoded_to_the_bit_nan_and_subnormals_too(dtype: torch.dtype, device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(E4M3).expand(3, 256).contiguous()
    # Triton's interpreter cuts what does not fit bfloat16 off; with powers of two nothing has to be rounded.
    odd = 0.5 if dtype == torch.bfloat16 and not GPU else 0.37
    weight = Fp8Weight(codes, torch.tensor([[1.0], [odd], [2.0**-12]], device=device))
    found, wanted = fp8.decode_by_kernel(weight, dtype), dequantize(weight, dtype)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert int(found.isnan().sum()) == 2 * 3
    assert found[0, 1] == 2.0**-9 and found[0, 0x7E] == 448


@triton.jit
def narrowed(codes, out):  # type: ignore[no-untyped-def]  # Triton takes annotations for names of its own
    place = tl.arange(0, 256)
    tl.store(out + place, narrow(e4m3(tl.load(codes + place)), out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_without_a_scale_no_code_is_rounded(dtype: torch.dtype, device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    out = torch.empty(256, dtype=dtype, device=device)
    narrowed[(1,)](codes, out)
    torch.testing.assert_close(out, codes.view(E4M3).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_blocks_are_decoded_to_the_bit(device: str) -> None:
    weight = by_block(200, 1300)
    torch.testing.assert_close(
        fp8.decode_by_kernel(weight, torch.float16), dequantize(weight, torch.float16), rtol=0, atol=0
    )


def test_the_gradient_is_that_of_the_function() -> None:
    weight = by_channel(5, 7)
    x = torch.randn(3, 7, device=DEVICE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fp8_linear(x, weight, None, "dequantize"), (x,))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scales", MADE)
def test_nan_and_infinity_reach_the_row_and_no_other(scales: str, way: Way, device: str) -> None:
    weight = MADE[scales](64, 128)
    x = torch.ones(4, 128, device=device, dtype=torch.float16)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    out = fp8_linear(x, weight, None, way)
    assert bool(out[1].isnan().all())
    assert not bool(out[2].isfinite().any())
    assert bool(out[[0, 3]].isfinite().all())


@pytest.mark.parametrize("way", WAYS)
def test_a_nan_in_the_weight_reaches_its_channel_and_no_other(way: Way, device: str) -> None:
    weight = by_channel(70, 70)
    weight.codes.view(torch.uint8)[69, 69] = 0x7F
    out = fp8_linear(torch.ones(2, 70, device=device, dtype=torch.float16), weight, None, way)
    assert bool(out[:, 69].isnan().all())
    assert bool(out[:, :69].isfinite().all())
    d_x = fp8.product(torch.ones(2, 70, device=device).half(), weight, None, way, over_columns=False)
    assert bool(d_x[:, 69].isnan().all())
    assert bool(d_x[:, :69].isfinite().all())


def test_quantising_rounds_to_the_nearest_of_the_format(device: str) -> None:
    """Half a step of three bits of mantissa: 1/16 of a normal value, and of a channel's largest 2^-10 / 448 · 448."""
    matrix = torch.randn(64, 512, device=device) * torch.logspace(-6, 3, 64, device=device)[:, None]
    weight = quantize(matrix)
    error = (exact(weight) - matrix.cpu().double()).abs()
    step = weight.scale.cpu().double() * 2.0**-10
    assert bool((error <= torch.maximum(matrix.cpu().double().abs() / 16, step) * (1 + 1e-6)).all())
    largest = matrix.abs().amax(1)
    torch.testing.assert_close(exact(weight).abs().amax(1).float(), largest.cpu(), rtol=1e-6, atol=0)
    assert weight.nbytes == 64 * 512 + 64 * 4


def test_channels_of_zeros_and_of_what_is_not_finite(device: str) -> None:
    matrix = torch.ones(4, 8, device=device)
    matrix[0] = 0
    matrix[1, 2], matrix[2, 3] = float("inf"), float("nan")
    back = dequantize(quantize(matrix), torch.float32)
    assert bool((back[0] == 0).all()) and bool((back[3] == 1).all())
    assert bool(back[1:3].isnan().all())


def test_a_channel_of_subnormals_stays_finite(device: str) -> None:
    back = dequantize(quantize(torch.full((1, 8), 1e-43, device=device)), torch.float32)
    assert bool(back.isfinite().all())


def test_scaled_mm_rounds_activations_alone_and_only_on_the_way_forward(device: str) -> None:
    weight = by_channel(64, 128)
    x = torch.randn(32, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    out = fp8_linear(x, weight, None, "scaled_mm")
    d_out = torch.randn_like(out)
    (d_x,) = torch.autograd.grad(out, x, d_out)
    # Three bits of mantissa: an error of at most 1/16 of each activation, some 2.5 % in the mean square.
    assert 5e-3 < distance(out, x.detach().double().cpu() @ exact(weight).T) < 5e-2
    assert distance(d_x, d_out.double().cpu() @ exact(weight)) < LIMIT[torch.bfloat16]
    with pytest.raises(UsageError, match="scales by channel"):
        fp8_linear(x, by_block(64, 128), None, "scaled_mm")


def test_the_layer_keeps_its_weight_where_it_is_and_trains_what_is_below(device: str) -> None:
    layer = Fp8Linear(64, 32, bias=True, compute_dtype=torch.float16).to(device)
    layer.weight = torch.nn.Parameter(by_channel(32, 64).codes, requires_grad=False)
    assert layer.quantized.codes.data_ptr() == layer.weight.data_ptr()
    x = torch.randn(2, 3, 64, device=device, dtype=torch.float16, requires_grad=True)
    out = layer(x)
    assert out.shape == (2, 3, 32) and out.dtype == torch.float16
    out.sum().backward()
    assert x.grad is not None
    assert [parameter for parameter in layer.parameters() if parameter.requires_grad] == []


def test_under_autocast_it_computes_as_a_linear_layer_does(device: str) -> None:
    layer = Fp8Linear(64, 32, bias=False, compute_dtype=torch.bfloat16).to(device)
    with torch.autocast(device, torch.bfloat16):
        assert layer(torch.randn(3, 64, device=device)).dtype == torch.bfloat16


def test_nothing_is_kept_for_the_way_back(device: str) -> None:
    """Neither a 16-bit copy of the weight nor the input: a frozen layer's gradient needs neither."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    weight = by_channel(64, 64)
    x = torch.randn(8, 64, device=device, dtype=torch.float16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = fp8_linear(x, weight)
    assert kept == []
    assert out.requires_grad


def test_what_is_no_such_weight_is_refused(device: str) -> None:
    codes = torch.zeros(200, 64, device=device).to(E4M3)
    with pytest.raises(UsageError, match=r"scales \[2, 2\] of a weight \[200, 64\]"):
        Fp8Weight(codes, torch.ones(2, 2, device=device))
    with pytest.raises(UsageError, match=r"a weight in torch\.float16"):
        Fp8Weight(codes.half(), torch.ones(200, 1, device=device))
    with pytest.raises(UsageError, match=r"x is \(5, 32\), and the layer takes rows of 64"):
        fp8_linear(torch.randn(5, 32, device=device), Fp8Weight(codes, torch.ones(200, 1, device=device)))


@pytest.mark.skipif(not GPU, reason="needs a GPU: on a CPU 'auto' is 'dequantize'")
def test_many_rows_and_few_give_the_same(device: str) -> None:
    for rows in (8, 2048):
        check(torch.bfloat16, rows, by_channel(256, 512), "auto")
