"""A frozen head: what is said of each token, and the way back, against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radeon_stack.kernels import head
from radeon_stack.kernels.head import TILE_ROWS, Scores, score, score_reference, tile_rows
from radeon_stack.kernels.launch import launch
from radeon_stack.launch import estimate
from tests.kernels.helpers import DEVICE, ULP, distance

WIDTH = 24


def drawn(rows: int, words: int, dtype: torch.dtype, *, spread: float = 1.0) -> dict[str, Any]:
    """Hidden states, a head, targets, and every second row to be learnt."""
    hidden = (torch.randn(rows, WIDTH) * spread).to(DEVICE, dtype)
    weight = (torch.randn(words, WIDTH) / WIDTH**0.5).to(DEVICE, dtype)
    targets = torch.randint(words, (rows,), device=DEVICE)
    return {"hidden": hidden, "weight": weight, "targets": targets, "index": torch.arange(0, rows, 2, device=DEVICE)}


def with_gradient(how: Any, given_: dict[str, Any], dtype: torch.dtype) -> tuple[Scores, torch.Tensor]:
    """The scores, and the gradient of Σ weight · log p to the hidden states, each token's weight being another."""
    floats = {name: one.detach().to(dtype) if one.is_floating_point() else one for name, one in given_.items()}
    hidden = floats.pop("hidden").requires_grad_()
    scores = how(hidden, **floats)
    weights = torch.linspace(-1, 2, len(floats["index"]), device=DEVICE)
    (weights * scores.log_probs).sum().backward()
    assert hidden.grad is not None
    return scores, hidden.grad


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(2, 300), st.floats(0.01, 30), st.integers(0, 9))
def test_scores_and_the_way_back_are_those_of_the_definition(rows: int, words: int, spread: float, seed: int) -> None:
    torch.manual_seed(seed)
    drawn_ = drawn(rows, words, torch.float32, spread=spread)
    found, gradient = with_gradient(score, drawn_, torch.float32)
    wanted, right = with_gradient(score_reference, drawn_, torch.float64)
    torch.testing.assert_close(found.log_probs.double(), wanted.log_probs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.entropy.double(), wanted.entropy, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.is_top1, wanted.is_top1)
    torch.testing.assert_close(gradient.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_is_no_further_from_the_definition_than_torch_is(dtype: torch.dtype) -> None:
    drawn_ = drawn(64, 5000, dtype)
    found, gradient = with_gradient(score, drawn_, dtype)
    torchs, torchs_gradient = with_gradient(score_reference, drawn_, dtype)
    wanted, right = with_gradient(score_reference, drawn_, torch.float64)
    assert distance(found.log_probs, wanted.log_probs) <= 1.1 * distance(torchs.log_probs, wanted.log_probs) + 1e-6
    assert distance(gradient, right) <= 1.5 * distance(torchs_gradient, right) + ULP[dtype]


def test_in_float16_the_words_that_hardly_count_do_count_together() -> None:
    words = 60_000  # of which each has p = 2⁻¹⁶ or so, and 2⁻²⁴ is the least that float16 has
    hidden = torch.full((2, WIDTH), 0.01, device=DEVICE, dtype=torch.float16)
    weight = torch.full((words, WIDTH), 1.0, device=DEVICE, dtype=torch.float16)
    weight[: words // 2] = 3.0
    drawn_ = {"hidden": hidden, "weight": weight, "targets": torch.tensor([7, words - 1], device=DEVICE)}
    drawn_["index"] = torch.arange(2, device=DEVICE)
    _, gradient = with_gradient(score, drawn_, torch.float16)
    _, right = with_gradient(score_reference, drawn_, torch.float64)
    assert distance(gradient, right) < 2e-3


def test_rows_that_are_not_to_be_learnt_have_no_gradient_and_cost_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_ = drawn(9, 50, torch.float32)
    drawn_["targets"][1::2] = -100
    seen: list[int] = []

    def seeing(kernel: Any, grid: tuple[int, int, int], *told: Any, **more: Any) -> None:
        seen.append(grid[0])
        launch(kernel, grid, *told, **more)

    monkeypatch.setattr(head, "launch", seeing)
    _, gradient = with_gradient(score, drawn_, torch.float32)
    assert seen == [5]
    assert not gradient[1::2].any() and gradient[::2].all()


def test_where_nothing_is_to_be_learnt_there_is_a_sum_of_nothing_and_a_way_back() -> None:
    drawn_ = drawn(4, 50, torch.float32) | {"index": torch.arange(0, device=DEVICE)}
    scores, gradient = with_gradient(score, drawn_, torch.float32)
    assert scores.log_probs.sum() == 0 and not gradient.any()


def test_logits_are_made_a_few_rows_at_a_time_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_ = drawn(4 * TILE_ROWS + 7, 40, torch.float32)
    whole, gradient = with_gradient(score, drawn_, torch.float32)
    monkeypatch.setattr(head, "TILE_BYTES", 1)
    assert tile_rows(2 * TILE_ROWS + 4, 160) == TILE_ROWS
    parts, again = with_gradient(score, drawn_, torch.float32)
    for one, other in ((whole.log_probs, parts.log_probs), (whole.entropy, parts.entropy), (gradient, again)):
        torch.testing.assert_close(one, other)
    assert torch.equal(whole.is_top1, parts.is_top1)


@given(st.integers(0, 1 << 20), st.integers(2, 1 << 21))
def test_pieces_are_whole_tiles_of_one_size_within_the_room(tokens: int, row_bytes: int) -> None:
    rows = tile_rows(tokens, row_bytes)
    assert rows >= 1 and rows * row_bytes <= max(head.TILE_BYTES, TILE_ROWS * row_bytes)
    assert not tokens or rows % TILE_ROWS == 0


def test_the_estimate_knows_how_many_bytes_of_logits_there_are_at_once() -> None:
    assert estimate.TILE_BYTES == head.TILE_BYTES


def test_without_a_gradient_the_scores_are_the_same() -> None:
    drawn_ = drawn(6, 50, torch.float32)
    wanted, _ = with_gradient(score, drawn_, torch.float32)
    drawn_["hidden"].requires_grad_()
    with torch.no_grad():
        found = score(**drawn_)
    assert torch.equal(found.log_probs, wanted.log_probs) and found.log_probs.grad_fn is None


def test_going_back_twice_gives_the_same_and_of_equal_words_the_first_is_the_likeliest() -> None:
    drawn_ = drawn(4, 30, torch.float32)
    drawn_["weight"][:] = drawn_["weight"][0]
    drawn_["targets"] = torch.tensor([0, 0, 5, 0], device=DEVICE)
    hidden = drawn_.pop("hidden").requires_grad_()
    scores = score(hidden, **drawn_)
    assert scores.is_top1.tolist() == [1, 0]
    first = torch.autograd.grad(scores.log_probs.sum(), hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(scores.log_probs.sum(), hidden)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_and_its_neighbours_stay_numbers(bad: float) -> None:
    drawn_ = drawn(6, 50, torch.float32)
    drawn_["hidden"][2, 0] = bad
    scores, gradient = with_gradient(score, drawn_, torch.float32)
    wanted = score_reference(**drawn_)
    assert torch.equal(scores.log_probs.isnan(), wanted.log_probs.isnan()) and scores.log_probs.isnan()[1]
    assert gradient[2].isnan().any() and gradient[[0, 4]].isfinite().all()


def test_a_word_that_is_forbidden_counts_for_nothing() -> None:
    drawn_ = drawn(4, 50, torch.float32)
    drawn_["hidden"] = drawn_["hidden"].abs()
    drawn_["weight"][3] = -float("inf")
    drawn_["targets"][:] = 1
    found, wanted = score(**drawn_), score_reference(**drawn_)
    torch.testing.assert_close(found.log_probs, wanted.log_probs.float(), rtol=1e-5, atol=1e-5)
    assert found.entropy.isfinite().all()
