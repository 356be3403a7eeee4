from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radeon_stack.errors import UsageError
from radeon_stack.kernels import linear
from radeon_stack.kernels.linear import nf4_linear, nf4_linear_reference
from radeon_stack.kernels.nf4 import quantize
from tests.kernels.helpers import DEVICE, HALVES, distance

LIMIT = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def check(dtype: torch.dtype, rows: int, n: int, k: int, rank: int, *, double: bool, bias: bool) -> None:
    x = torch.randn(rows, k, device=DEVICE).to(dtype).requires_grad_()
    weight = quantize((torch.randn(n, k, device=DEVICE) * k**-0.5).to(dtype), double=double)
    added = torch.randn(n, device=DEVICE).to(dtype) if bias else None
    a = (torch.randn(rank, k, device=DEVICE) * k**-0.5).requires_grad_() if rank else None
    b = (torch.randn(n, rank, device=DEVICE) * rank**-0.5).requires_grad_() if rank else None
    trained = [tensor for tensor in (x, a, b) if tensor is not None]
    out = nf4_linear(x, weight, a, b, 0.5, added)
    d_out = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, trained, d_out)]
    exact = [tensor.detach().double().requires_grad_() for tensor in trained]
    exact_a, exact_b = exact[1:] if rank else (None, None)
    wanted = nf4_linear_reference(exact[0], weight, exact_a, exact_b, 0.5, added)
    truth = [wanted, *torch.autograd.grad(wanted, exact, d_out.double())]
    for one, other in zip(found, truth, strict=True):
        assert distance(one, other) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("rows", [1, 17, 40, 100])
def test_a_layer_and_its_gradients_are_the_definitions(dtype: torch.dtype, rank: int, rows: int) -> None:
    check(dtype, rows, 128, 192, rank, double=True, bias=True)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_any_shape_is_right(data: st.DataObject) -> None:
    check(
        torch.float16,
        data.draw(st.integers(1, 130)),
        64 * data.draw(st.integers(1, 3)),
        64 * data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([0, 3, 8, 33])),
        double=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
    )


@pytest.mark.parametrize("by_torch", [0, 1 << 20], ids=["gradients too", "gradients in a launch"])
def test_decoding_once_gives_the_same_function(monkeypatch: pytest.MonkeyPatch, by_torch: int) -> None:
    monkeypatch.setattr(linear, "decode_once", lambda *_: True)
    monkeypatch.setattr(linear, "GRADIENTS_BY_TORCH_ROWS", by_torch)
    check(torch.float16, 33, 128, 128, 8, double=True, bias=True)


def test_leading_dimensions_are_kept(device: str) -> None:
    weight = quantize(torch.randn(64, 128, device=device).half())
    assert nf4_linear(torch.randn(2, 3, 128, device=device).half(), weight).shape == (2, 3, 64)


def test_an_input_without_a_gradient_still_trains_the_adapter(device: str) -> None:
    x, weight = torch.randn(5, 64, device=device).half(), quantize(torch.randn(64, 64, device=device).half() / 8)
    a, b = torch.randn(8, 64, device=device).requires_grad_(), torch.randn(64, 8, device=device).requires_grad_()
    nf4_linear(x, weight, a, b).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.isfinite().all()


def test_a_long_reduction_is_split_and_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "low_rank_split", lambda _: 2)
    check(torch.float16, 9, 64, 448, 8, double=False, bias=False)  # 7 blocks in two parts: 4 and 3


def test_a_rank_that_fits_no_tile_is_added_beside(device: str) -> None:
    check(torch.float16, 5, 64, 64, 130, double=True, bias=False)


def test_a_row_of_another_width_is_refused(device: str) -> None:
    weight = quantize(torch.randn(64, 128, device=device).half())
    with pytest.raises(UsageError, match=r"x is \(5, 64\), and the layer takes rows of 128"):
        nf4_linear(torch.randn(5, 64, device=device).half(), weight)
