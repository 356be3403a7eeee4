from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radeon_stack.errors import UsageError
from radeon_stack.kernels import linear, low_rank
from radeon_stack.kernels.linear import Given, nf4_linear, nf4_linear_reference
from radeon_stack.kernels.nf4 import decode_reference, quantize
from tests.kernels.helpers import DEVICE, HALVES, Operations, distance

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


@settings(max_examples=10)
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


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("by_torch", [True, False], ids=["the adapter by torch", "the adapter in launches"])
@pytest.mark.parametrize(("rows", "n", "k", "rank"), [(1, 64, 64, 16), (33, 128, 192, 8), (130, 192, 128, 40)])
def test_decoding_once_gives_the_same_function(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, by_torch: bool, rows: int, n: int, k: int, rank: int
) -> None:
    monkeypatch.setattr(linear, "decode_once", lambda *_: True)
    monkeypatch.setattr(linear, "adapter_by_torch", lambda _: by_torch)
    for double in (True, False):
        check(dtype, rows, n, k, rank, double=double, bias=double)


@pytest.mark.parametrize("over_columns", [True, False], ids=["forward", "back"])
@pytest.mark.parametrize("stored", [torch.float32, None], ids=["masters", "factors in 16 bit"])
@pytest.mark.parametrize("dtype", HALVES)
def test_an_adapters_products_in_launches_are_torchs(
    dtype: torch.dtype, stored: torch.dtype | None, over_columns: bool
) -> None:
    rows, n, k, rank, scale = 67, 192, 320, 12, 0.3
    weight = quantize(torch.randn(n, k, device=DEVICE).to(dtype) * k**-0.5)
    a, b = (torch.randn(rank, k, device=DEVICE) * k**-0.5), torch.randn(n, rank, device=DEVICE)
    a, b = a.to(stored or dtype), b.to(stored or dtype)
    first, second = (a, b) if over_columns else (b, a)
    x = torch.randn(rows, k if over_columns else n, device=DEVICE).to(dtype)
    wide = n if over_columns else k
    bias, onto = torch.randn(wide, device=DEVICE).to(dtype), torch.randn(rows, wide, device=DEVICE).to(dtype)
    down, up = (one.to(dtype).double() for one in ((a.T, b.T) if over_columns else (b, a)))
    matrix = decode_reference(weight, dtype).double()
    low = x.double() @ down
    exact = x.double() @ (matrix.T if over_columns else matrix) + scale * low @ up
    for beside, added in ((None, 0.0), ("bias", bias), ("onto", onto)):
        for known in (None, low.to(dtype)):
            into = onto.clone()
            more: dict[str, Any] = {"u": known, "onto": into} if beside == "onto" else {"u": known}
            arguments = (x, weight, first, second, scale, bias if beside == "bias" else None)
            out, u = linear.decoded(*arguments, over_columns=over_columns, **more)
            assert u is not None
            assert (out.dtype, u.dtype, out.shape, u.shape) == (dtype, dtype, (rows, wide), (rows, rank))
            assert distance(out, exact + added) < LIMIT[dtype]
            assert distance(u, low) < LIMIT[dtype]
            assert (out is into) == (beside == "onto")


@pytest.mark.parametrize(
    ("rows", "ours", "torchs"),
    [(512, 5, 0), (513, 5, 2), (2048, 5, 2), (2049, 2, 12)],
    ids=["few", "more", "the most", "many"],
)
def test_launches_of_a_layer_there_and_back_are_few_while_the_host_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, rows: int, ours: int, torchs: int
) -> None:
    launched = []
    for module in (linear, low_rank):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel))
    monkeypatch.setattr("radeon_stack.kernels.launch.launch", lambda kernel, *_, **__: launched.append(kernel))
    x = torch.zeros(rows, 64, device=DEVICE, dtype=torch.float16, requires_grad=True)
    weight = quantize(torch.randn(64, 64, device=DEVICE).half())
    a, b = (torch.zeros(shape, device=DEVICE, requires_grad=True) for shape in ((8, 64), (64, 8)))
    with Operations() as operations:
        out = nf4_linear(x, weight, a, b, 0.5)
        torch.autograd.grad(out, (x, a, b), torch.zeros_like(out))
    assert len(launched) == ours
    assert sum(name in ("mm", "addmm", "addmm_", "_to_copy") for name in operations.names) == torchs


@pytest.mark.parametrize("by_torch", [True, False], ids=["the adapter by torch", "the adapter in launches"])
def test_with_what_a_first_pass_kept_the_second_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, by_torch: bool
) -> None:
    monkeypatch.setattr(linear, "decode_once", lambda *_: True)
    monkeypatch.setattr(linear, "adapter_by_torch", lambda _: by_torch)
    weight = quantize(torch.randn(64, 128, device=DEVICE).half() / 8)
    x = torch.randn(2, 35, 128, device=DEVICE).half().requires_grad_()
    a, b = (torch.randn(shape, device=DEVICE).div_(8).requires_grad_() for shape in ((8, 128), (64, 8)))
    kept: list[Any] = []
    with torch.no_grad():
        nf4_linear(x, weight, a, b, 0.5, keep=lambda *both: kept.extend(both))
    out, u = kept
    assert (out.shape, u.shape, u.dtype) == ((70, 64), (70, 8), torch.float16)
    d_out = torch.randn(2, 35, 64, device=DEVICE).half()
    plain = nf4_linear(x, weight, a, b, 0.5)
    wanted = torch.autograd.grad(plain, (x, a, b), d_out)
    for known in product((out, None), (u, None)):
        again = nf4_linear(x, weight, a, b, 0.5, given=Given(*known))
        assert torch.equal(again, plain)
        for found, right in zip(torch.autograd.grad(again, (x, a, b), d_out), wanted, strict=True):
            assert found.dtype == right.dtype
            assert torch.equal(found, right)


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
