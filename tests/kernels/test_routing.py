from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radeon_stack.errors import UsageError
from radeon_stack.kernels import configs
from radeon_stack.kernels.configs import FEW_SLOTS, GATE_BACK, Tile
from radeon_stack.kernels.router import _back_sizes, _gate_sizes, gate, router, router_reference
from radeon_stack.kernels.routing import combine, combine_reference, route, route_reference
from tests.kernels.helpers import DEVICE, HALVES, ULP, distance


@settings(max_examples=30)
@given(st.data())
def test_slots_are_sorted_by_expert_and_stay_in_order_within_one(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 40))
    top_k = data.draw(st.integers(1, min(experts, 8)))
    tokens = data.draw(st.integers(1, 90))
    few = data.draw(st.integers(1, experts))  # some experts get nothing, or one gets all
    index = torch.randint(0, few, (tokens, top_k), device=DEVICE)
    found, wanted = route(index, experts), route_reference(index, experts)
    assert torch.equal(found.offsets, wanted.offsets)
    assert torch.equal(found.slots, wanted.slots)


@pytest.mark.parametrize("few", [FEW_SLOTS["cuda"], {}], ids=["at once", "in blocks"])
@pytest.mark.parametrize("tokens", [1, 5, 300, 1024, 1025, 2100])
def test_few_slots_are_sorted_in_one_launch_and_many_over_several_blocks(
    device: str, tokens: int, few: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FEW_SLOTS, "cuda", few)
    index = torch.randint(0, 128, (tokens, 8), device=device)
    found, wanted = route(index, 128), route_reference(index, 128)
    assert torch.equal(found.slots, wanted.slots)
    assert torch.equal(found.offsets, wanted.offsets)


def test_no_slots_are_no_experts(device: str) -> None:
    found = route(torch.empty((0, 2), dtype=torch.int64, device=device), 3)
    assert found.offsets.tolist() == [0, 0, 0, 0] and not len(found.slots)


@pytest.mark.parametrize("few", [FEW_SLOTS["cuda"], {}], ids=["at once", "in blocks"])
def test_slots_of_no_expert_are_left_out(
    device: str, few: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FEW_SLOTS, "cuda", few)
    index = torch.tensor([[0, 3], [3, 1], [3, 3]], device=device)  # 3: an expert of another rank
    found = route(index, 3, partial=True)
    assert found.offsets.tolist() == [0, 1, 2, 2]
    assert found.slots[:2].tolist() == [0, 3]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_combine_adds_a_tokens_slots_and_the_parts_beside_them(dtype: torch.dtype, device: str) -> None:
    y, parts = torch.randn(13 * 3, 700, device=device).to(dtype), torch.randn(13 * 3, 5, device=device)
    found, sums = combine(y, 3, parts, dtype)
    assert distance(found, combine_reference(y, 3)) <= ULP[dtype]
    assert sums is not None
    assert distance(sums, parts.sum(1)) <= 2 * ULP[dtype]


@settings(max_examples=25)
@given(st.data())
def test_the_router_chooses_weighs_and_gives_gradients_as_its_definition(data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 70))
    top_k = data.draw(st.integers(1, min(experts, 8)))
    tokens, normalise = data.draw(st.integers(1, 20)), data.draw(st.booleans())
    # All different, so that there is one right choice.
    order = torch.rand(tokens, experts, device=DEVICE).argsort(-1)
    logits = ((order - experts / 2) * 0.1).requires_grad_()
    weight, index = router(logits, top_k, normalise=normalise)
    exact = logits.detach().double().requires_grad_()
    wanted, wanted_index = router_reference(exact, top_k, normalise=normalise)
    assert torch.equal(index, wanted_index)
    assert distance(weight, wanted) < 1e-6
    d_weight = torch.randn_like(weight)
    (found,) = torch.autograd.grad(weight, logits, d_weight)
    (gradient,) = torch.autograd.grad(wanted, exact, d_weight.double())
    assert float((found.double() - gradient).abs().max()) < 1e-5


def test_of_equal_experts_the_first_are_taken(device: str) -> None:
    weight, index = router(torch.zeros(3, 6, device=device), 2)
    assert index.tolist() == [[0, 1]] * 3
    assert weight.tolist() == [[0.5, 0.5]] * 3


def test_a_token_without_sense_spoils_no_other(device: str) -> None:
    logits = torch.randn(5, 8, device=device)
    logits[2, 3] = float("nan")
    weight, index = router(logits, 2)
    wanted, wanted_index = router_reference(logits, 2)
    others = [0, 1, 3, 4]
    assert weight[2].isnan().all()
    assert torch.equal(index[others], wanted_index[others])
    assert distance(weight[others], wanted[others]) < 1e-6
    assert ((index >= 0) & (index < 8)).all()


@pytest.mark.parametrize("back", [GATE_BACK, {"cuda": {}}], ids=["one launch back", "two"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_with_its_linear_layer_the_router_gives_what_both_give_apart(
    back: dict[str, dict[int, Tile]], monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.setattr(configs, "GATE_BACK", back)
    _back_sizes.cache_clear()
    experts = data.draw(st.integers(2, 70))
    top_k = data.draw(st.integers(1, min(experts, 8)))
    tokens, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 150))
    normalise, which = data.draw(st.booleans()), data.draw(st.sampled_from(["x", "matrix", "both"]))
    dtype = data.draw(st.sampled_from([*HALVES, torch.float32]))
    # Small whole numbers: their products are exact in any order, and of equal experts both take the first.
    x = torch.randint(-2, 3, (tokens, width), device=DEVICE).to(dtype)
    matrix = torch.randint(-2, 3, (experts, width), device=DEVICE).to(dtype)
    d_weight = torch.randn(tokens, top_k, device=DEVICE).to(dtype)

    def results(one: bool) -> list[torch.Tensor]:
        leaves = x.clone().requires_grad_(which != "matrix"), matrix.clone().requires_grad_(which != "x")
        made = torch.nn.functional.linear(*leaves) * 1.0
        weight, index = gate(*leaves, top_k, normalise=normalise) if one else router(made, top_k, normalise=normalise)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        return [weight.detach(), index, *torch.autograd.grad(weight, asked, d_weight)]

    for found, wanted in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gates_token_without_sense_spoils_no_other(device: str, wrong: float) -> None:
    x, matrix = torch.randn(20, 32, device=device).half(), torch.randn(128, 32, device=device).half()
    assert _gate_sizes(torch.device(device), 20, 128, 4, True, torch.float16) is not None

    def results() -> tuple[torch.Tensor, ...]:
        leaf = x.clone().requires_grad_()
        weight, index = gate(leaf, matrix, 4)
        return weight.detach(), index, *torch.autograd.grad(weight, leaf, torch.ones_like(weight).cumsum(1))

    wanted = results()
    x[7, 3] = wrong
    others = [row for row in range(20) if row != 7]
    for found, before in zip(results(), wanted, strict=True):
        assert torch.equal(found[others], before[others])
    weight, index, d_x = results()
    assert weight[7].isnan().all() and d_x[7].isnan().all() and ((index >= 0) & (index < 128)).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_has_no_sense_forward_has_none_back(device: str, wrong: float) -> None:
    """The expert whose logit it is may not be among the chosen: then NaN has no order."""
    logits = torch.randn(3, 6, device=device)
    logits[1, 5] = wrong
    logits.requires_grad_()
    weight, _ = router(logits, 2)
    (found,) = torch.autograd.grad(weight, logits, torch.randn(3, 2, device=device))
    assert found[1].isnan().all() and not found[[0, 2]].isnan().any()


@pytest.mark.parametrize(("experts", "dtype"), [(200, torch.bfloat16), (24, torch.float32)])
def test_of_more_experts_and_of_float32_the_gate_is_torchs_product_and_our_router(
    device: str, experts: int, dtype: torch.dtype
) -> None:
    assert _gate_sizes(torch.device(device), 5, experts, 4, True, dtype) is None
    x = torch.randn(5, 32, device=device).to(dtype).requires_grad_()
    matrix = torch.randn(experts, 32, device=device).to(dtype)
    weight, index = gate(x, matrix, 4)
    wanted, wanted_index = router(torch.nn.functional.linear(x, matrix), 4)
    d_weight = torch.randn_like(weight)
    assert torch.equal(index, wanted_index) and torch.equal(weight, wanted)
    for found, true in zip(*(torch.autograd.grad(one, x, d_weight) for one in (weight, wanted)), strict=True):
        torch.testing.assert_close(found, true)


@given(
    st.sampled_from([16, 32, 64, 128, 256, 512]), st.integers(1, 70000), st.sampled_from([None, 99 << 10, 227 << 10])
)
def test_a_gates_tile_fits_what_a_program_may_have(experts: int, tokens: int, shared: int | None) -> None:
    for family, room in (("cuda", shared or 227 << 10), ("hip", 64 << 10)):
        tile = configs.gate_tile(family, tokens, experts, shared=shared)
        assert (tile is None) == (experts > 128)
        if tile is not None:
            assert tile.stages >= 2 and 2 * (tile.m + experts) * tile.k * tile.stages <= room


def test_matrices_that_do_not_fit_and_more_choices_than_experts_are_refused(device: str) -> None:
    x = torch.randn(3, 24, device=device).half()
    with pytest.raises(RuntimeError, match="shapes"):
        gate(x, torch.randn(4, 16, device=device).half(), 2)
    for top_k in (0, 5):
        with pytest.raises(UsageError, match=f"top_k is {top_k} of 4 experts"):
            gate(x, torch.randn(4, 24, device=device).half(), top_k)
        with pytest.raises(UsageError, match=f"top_k is {top_k} of 4 experts"):
            router(torch.randn(3, 4, device=device), top_k)


def test_torchs_compiler_is_handed_what_it_knows() -> None:
    """Else its error is of its own inside, and not a break in the graph."""
    from radeon_stack.kernels.once import apply

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, d_out: torch.Tensor) -> torch.Tensor:
            return d_out * 2

    compiled = torch.compile(lambda x: apply(Doubled, x) + 1, backend="eager")
    x = torch.ones(2, requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.0, 2.0]
