from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radeon_stack.errors import UsageError
from radeon_stack.kernels import grouped
from radeon_stack.kernels.experts import Adapter, gated_experts, gated_experts_reference
from radeon_stack.kernels.nf4 import NF4, decoding, quantize
from radeon_stack.kernels.routing import route
from tests.kernels.helpers import DEVICE, HALVES, distance

LIMIT = {torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2, torch.float32: 1e-5}


class Layer:
    """A layer of random experts, its input and the tensors that have gradients."""

    def __init__(
        self, dtype: torch.dtype, *, nf4: str = "", rank: int = 0, tokens: int = 11, top_k: int = 2, experts: int = 4,
        width: int = 64, inner: int = 64, spread: int | None = None,
    ) -> None:  # fmt: skip
        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)

        self.x = random(tokens, width).requires_grad_()
        choices = torch.stack([torch.randperm(spread or experts)[:top_k] for _ in range(tokens)])
        self.index = choices.to(DEVICE)
        self.weight = torch.rand(tokens, top_k, device=DEVICE).to(dtype).requires_grad_()
        up, down = (
            random(experts, 2 * inner, width, scale=width**-0.5),
            random(experts, width, inner, scale=inner**-0.5),
        )
        self.trained: list[torch.Tensor] = [self.x, self.weight]
        self.matrices: list[Any] = [up.requires_grad_(), down.requires_grad_()]
        if nf4:
            self.matrices = [quantize(matrix.detach(), double=nf4 == "double") for matrix in (up, down)]
        else:
            self.trained += [up, down]
        self.adapters: list[Adapter] = []
        if rank:
            for rows, columns in ((2 * inner, width), (width, inner)):
                a = (torch.randn(experts, rank, columns, device=DEVICE) * columns**-0.5).requires_grad_()
                b = (torch.randn(experts, rows, rank, device=DEVICE) * rank**-0.5).requires_grad_()
                self.adapters.append(Adapter(a, b, 0.5))
                self.trained += [a, b]

    def run(self) -> list[torch.Tensor]:
        """[output, gradients …]"""
        out = gated_experts(self.x, self.index, self.weight, *self.matrices, *self.adapters)
        self.d_out = torch.randn_like(out)
        return [out, *torch.autograd.grad(out, self.trained, self.d_out)]

    def torchs(self) -> list[torch.Tensor]:
        """The same by the definition in the layer's own precision: what torch's rounding costs."""
        out = gated_experts_reference(self.x, self.index, self.weight, *self.matrices, *self.adapters)
        return [out, *torch.autograd.grad(out, self.trained, self.d_out, materialize_grads=True)]

    def truth(self) -> list[torch.Tensor]:
        """The same in float64, by the definition."""
        exact = {id(tensor): tensor.detach().double().requires_grad_() for tensor in self.trained}
        matrices: list[Any] = [m if isinstance(m, NF4) else exact[id(m)] for m in self.matrices]
        adapters = [Adapter(exact[id(one.a)], exact[id(one.b)], one.scale) for one in self.adapters]
        x, weight = exact[id(self.x)], exact[id(self.weight)]
        out = gated_experts_reference(x, self.index, weight, *matrices, *adapters)
        return [out, *torch.autograd.grad(out, list(exact.values()), self.d_out.double(), materialize_grads=True)]


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("nf4", ["", "flat", "double"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_output_and_every_gradient_are_the_definitions(dtype: torch.dtype, nf4: str, rank: int) -> None:
    layer = Layer(dtype, nf4=nf4, rank=rank)
    for found, wanted in zip(layer.run(), layer.truth(), strict=True):
        assert distance(found, wanted) < LIMIT[dtype]


FEW_NUMBERS, SEVERAL = 16, 8


@settings(max_examples=12)
@given(st.data())
def test_any_shape_and_any_routing_is_right(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    experts = data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, min(3, experts)))
    spread = data.draw(st.integers(top_k, experts))  # experts without a token; one with all of them
    layer = Layer(
        torch.float16,
        nf4=data.draw(st.sampled_from(["", "flat", "double"])),
        rank=data.draw(st.sampled_from([0, 4, 16])),
        tokens=data.draw(st.integers(1, 70)),
        top_k=top_k,
        experts=experts,
        width=64 * data.draw(st.integers(1, 3)),
        inner=64 * data.draw(st.integers(1, 2)),
        spread=spread,
    )
    # A single gradient may be a difference of large numbers, and its rounding large beside it, torch's own too. Where
    # they are few, those of several ways back are taken together: no chance makes all of them small.
    times = SEVERAL if layer.weight.numel() <= FEW_NUMBERS else 1
    runs = [(layer.run(), layer.torchs(), layer.truth()) for _ in range(times)]
    for results in zip(*(zip(*run, strict=True) for run in runs), strict=True):
        found, torchs, wanted = (torch.stack(one) for one in zip(*results, strict=True))
        assert distance(found, wanted) < max(LIMIT[torch.float16], 2 * distance(torchs, wanted))


def test_sixteen_bit_widths_need_not_be_multiples_of_anything() -> None:
    layer = Layer(torch.float16, width=40, inner=24, tokens=9)
    for found, wanted in zip(layer.run(), layer.truth(), strict=True):
        assert distance(found, wanted) < LIMIT[torch.float16]


def test_twice_is_the_same_to_the_bit() -> None:
    layer = Layer(torch.float16, nf4="flat", rank=8, tokens=40)
    first = gated_experts(layer.x, layer.index, layer.weight, *layer.matrices, *layer.adapters)
    d_out = torch.randn_like(first)
    gradients = torch.autograd.grad(first, layer.trained, d_out)
    second = gated_experts(layer.x, layer.index, layer.weight, *layer.matrices, *layer.adapters)
    assert torch.equal(first, second)
    for one, other in zip(gradients, torch.autograd.grad(second, layer.trained, d_out), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_stays_so_and_spoils_no_other(bad: float) -> None:
    layer = Layer(torch.float16, nf4="flat")
    x = layer.x.detach().clone()
    clean = gated_experts(x, layer.index, layer.weight.detach(), *layer.matrices)
    x[3, 5] = bad
    spoilt = gated_experts(x, layer.index, layer.weight.detach(), *layer.matrices)
    assert not spoilt[3].isfinite().any()
    others = [row for row in range(11) if row != 3]
    assert torch.equal(spoilt[others], clean[others])


def test_gradcheck_by_differences() -> None:
    layer = Layer(torch.float32, tokens=3, experts=2, width=16, inner=16, rank=2)

    def layer_of(*trained: torch.Tensor) -> torch.Tensor:
        x, weight, up, down, up_a, up_b, down_a, down_b = trained
        adapters = Adapter(up_a, up_b, 0.5), Adapter(down_a, down_b, 0.5)
        return gated_experts(x, layer.index, weight, up, down, *adapters)

    # float32: differences are good to three digits. fast_mode: along random directions, not by single elements.
    assert torch.autograd.gradcheck(layer_of, layer.trained, eps=1e-2, atol=1e-2, rtol=1e-2, fast_mode=True)


@pytest.mark.parametrize("apart", [False, True])
def test_slots_of_another_ranks_experts_count_as_nothing(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "gate_apart", lambda *_: apart)
    layer = Layer(torch.float16)
    index = layer.index.clone()
    index[2, 1] = index[4, 0] = index[5] = 4
    out = gated_experts(layer.x, index, layer.weight, *layer.matrices, partial=True)
    found = torch.autograd.grad(out, [layer.x, layer.weight], torch.ones_like(out))
    weight = layer.weight.detach().clone().double()
    weight[index == 4] = 0
    weight.requires_grad_()
    x, matrices = layer.x.detach().double().requires_grad_(), [m.detach().double() for m in layer.matrices]
    wanted = gated_experts_reference(x, index, weight, *matrices)
    assert distance(out, wanted) < LIMIT[torch.float16]
    gradients = torch.autograd.grad(wanted, [x, weight], torch.ones_like(wanted))
    for one, other in zip(found, gradients, strict=True):
        assert distance(one, other) < LIMIT[torch.float16]


def test_an_error_no_larger_than_torchs_own() -> None:
    layer = Layer(torch.float16, tokens=60, width=128, inner=128)
    for ours, theirs, exact in zip(layer.run(), layer.torchs(), layer.truth(), strict=True):
        assert distance(ours, exact) <= 1.05 * distance(theirs, exact)


@pytest.mark.parametrize("over_columns", [True, False])
def test_a_tall_group_and_an_empty_one_through_every_tile(over_columns: bool) -> None:
    index = torch.cat((torch.zeros(150, 1), torch.full((3, 1), 2))).long().to(DEVICE)
    routing = route(index, 3)
    x, matrix = torch.randn(153, 64, device=DEVICE).half(), torch.randn(3, 64, 64, device=DEVICE).half() / 8
    exact = matrix.double()[index[:, 0]]
    product = "tk,tnk->tn" if over_columns else "tk,tkn->tn"
    wanted = torch.einsum(product, x.double(), exact)
    from radeon_stack.kernels.configs import Tile

    for m in (16, 32, 64, 128):
        tile = Tile(m, 64, 32, 4, 1)
        found = grouped.matmul(x, matrix, routing, over_columns=over_columns, gather=1, scatter=True, tile=tile)
        assert distance(found, wanted) < LIMIT[torch.float16]


@pytest.mark.parametrize(
    ("nf4", "pairs", "k", "warps"), [("flat", False, 64, 4), ("flat", True, 128, 4), ("double", True, 64, 8)]
)
def test_the_product_turned_round_is_the_same_product(nf4: str, pairs: bool, k: int, warps: int) -> None:
    from radeon_stack.kernels.configs import Tile

    layer = Layer(torch.float16, nf4=nf4, tokens=9, experts=2, width=384, inner=128)
    up, down = layer.matrices
    routing, x = route(layer.index, 2), layer.x.detach()
    gate_up = torch.randn(18, 256, device=DEVICE).half()
    hidden = gate_up[:, :128].contiguous()

    def products(along: Tile, down_rows: Tile) -> list[torch.Tensor]:
        return [
            *grouped.gated_forward(x, up, routing, save=True, tile=along),
            grouped.matmul(hidden, down, routing, scatter=True, tile=along),
            *grouped.gated_backward(x, down, routing, layer.weight.detach(), gate_up, tile=down_rows)[:1],
            grouped.matmul(gate_up, up, routing, over_columns=False, tile=down_rows),
        ]

    tile = Tile(16, 128, k, warps, 1)
    turned = replace(tile, turned=True, pairs=pairs)
    wanted = products(tile, tile)
    for each in (1, 2, 4):  # of 384 columns the last tile of the widest has fewer than it is wide
        found = products(turned, replace(turned, n=16 * each * warps))
        for one, other in zip(found, wanted, strict=True):
            assert distance(one, other) < LIMIT[torch.float16]


TAILED_ROWS = (16, 17, 32, 0, 33, 1, 49)  # an expert: at, and a row past, whole tiles of 16 and their tails


@pytest.mark.parametrize(
    ("nf4", "turned", "rank"), [("", False, 0), ("", False, 8), ("flat", False, 8), ("flat", True, 8)]
)
def test_rows_past_whole_tiles_are_taken_by_the_last_one(nf4: str, turned: bool, rank: int) -> None:
    from radeon_stack.kernels.configs import Tile

    experts, size = len(TAILED_ROWS), sum(TAILED_ROWS)
    index = torch.repeat_interleave(torch.arange(experts), torch.tensor(TAILED_ROWS))
    index = index[torch.randperm(size)].view(size // 2, 2).to(DEVICE)  # of two slots a token, perhaps one expert's
    layer = Layer(torch.float16, nf4=nf4, tokens=size // 2, experts=experts, width=128, inner=64)
    up, down = layer.matrices
    routing, x = route(index, experts), layer.x.detach()
    weight, gate_up = layer.weight.detach(), torch.randn(size, 128, device=DEVICE).half()
    hidden, bias = gate_up[:, :64].contiguous(), torch.randn(experts, 128, device=DEVICE).half()

    def adapter(columns: int, *, over_columns: bool) -> grouped.LowRank | None:
        u, v = torch.randn(size, rank, device=DEVICE).half(), torch.randn(experts, columns, rank, device=DEVICE)
        return grouped.LowRank(u, v if over_columns else v.mT.contiguous(), 0.5, rank) if rank else None

    low = [adapter(128, over_columns=True) for _ in range(2)]
    low += [adapter(columns, over_columns=False) for columns in (64, 128)]

    def products(along: Tile, down_rows: Tile) -> list[torch.Tensor]:
        more = {"scatter": True, "slot_weight": weight, "bias": bias}
        return [
            *grouped.gated_forward(x, up, routing, save=True, low_rank=low[0], tile=along),
            grouped.matmul(hidden, down, routing, low_rank=low[1], tile=along, **more),
            *grouped.gated_backward(x, down, routing, weight, gate_up, save=True, low_rank=low[2], tile=down_rows),
            grouped.matmul(x, up, routing, gather=2, tile=along),
            grouped.matmul(gate_up, up, routing, over_columns=False, low_rank=low[3], tile=down_rows),
        ]

    tile = Tile(16, 64, 64, 4, 1)
    tailed = replace(tile, tail=16, turned=turned)
    assert grouped.row_tiles(routing.size, experts, tailed) < grouped.row_tiles(routing.size, experts, tile)
    wanted = products(tile, tile)
    found = products(tailed, replace(tailed, n=256) if turned else tailed)
    if turned:  # d_slot_weight comes in as many parts as there are column tiles
        found[4], wanted[4] = found[4].sum(1), wanted[4].sum(1)
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        assert distance(one, other) < LIMIT[torch.float16]


@pytest.mark.parametrize(("m", "tail"), [(4, 0), (4, 2), (4, 4), (2, 4)])
def test_no_more_tiles_than_are_launched(m: int, tail: int) -> None:
    from radeon_stack.kernels.configs import Tile

    most: dict[int, int] = {}
    for rows in itertools.product(range(18), repeat=2):
        tiles = sum(min(n, max(1, -(-(n - tail) // m))) for n in rows)
        most[sum(rows)] = max(most.get(sum(rows), 0), tiles)
    for size in range(18):
        assert grouped.row_tiles(size, 2, Tile(m, 64, 64, 4, 1, tail=tail)) == most[size]


@pytest.mark.parametrize("mean_rows", [1, 30, 64, 128, 256, 2000])
def test_cards_with_less_shared_memory_have_tiles_that_fit(mean_rows: float) -> None:
    from radeon_stack.kernels.configs import TILES, grouped_tile

    for family, nf4, kind in TILES:
        if family != "cuda":
            continue
        tile = grouped_tile("cuda", kind, mean_rows=mean_rows, nf4=nf4, shared=99 << 10)
        columns = tile.n * (2 if kind == "gated_forward" else 1)
        assert (tile.m + tile.tail + columns) * tile.k * 2 * tile.stages <= 99 << 10
        assert tile.m * columns * 4 <= 99 << 10, "accumulators on their way to another order"
        assert grouped_tile("cuda", kind, mean_rows=mean_rows, nf4=nf4, shared=227 << 10).m >= tile.m


def test_turned_tiles_are_for_what_fits_them() -> None:
    from radeon_stack.kernels.configs import Tile

    matrix = quantize(torch.randn(64, 64, device=DEVICE).half())
    tile = Tile(16, 64, 64, 4, 1, turned=True, pairs=True)
    assert decoding(matrix, tile, 192, 64, over_columns=True) == {"TURNED": 64, "PAIRS": True}
    for wide in (64, 128, 256):
        assert decoding(matrix, tile, 192, wide, over_columns=False)["TURNED"] == 64
    plain = {"TURNED": 0, "PAIRS": False}
    assert decoding(matrix, tile, 96, 64, over_columns=True) == plain  # no whole steps
    assert decoding(matrix, tile, 192, 32, over_columns=False) == plain  # a warp has less than 16 columns


def test_experts_with_many_rows_are_decoded_once_and_give_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[float] = []

    def always(_: str, mean: float) -> bool:
        decoded.append(mean)
        return True

    monkeypatch.setattr(grouped, "decode_experts_once", always)
    layer = Layer(torch.float16, nf4="double", rank=8)
    for found, wanted in zip(layer.run(), layer.truth(), strict=True):
        assert distance(found, wanted) < LIMIT[torch.float16]
    assert decoded == [11 * 2 / 4] * 4


@pytest.mark.parametrize(("nf4", "rank", "inner"), [("", 0, 64), ("", 8, 320), ("flat", 0, 64)])
def test_experts_with_many_rows_go_back_through_their_gate_by_itself_and_give_the_same_function(
    monkeypatch: pytest.MonkeyPatch, nf4: str, rank: int, inner: int
) -> None:
    apart, taken = grouped.gradients_apart, []

    def watched(*arguments: Any, **more: Any) -> Any:
        taken.append(more["save"])
        return apart(*arguments, **more)

    monkeypatch.setattr(grouped, "gate_apart", lambda _, mean: mean == 11 * 2 / 4)
    monkeypatch.setattr(grouped, "gradients_apart", watched)
    layer = Layer(torch.float16, nf4=nf4, rank=rank, inner=inner)
    for found, wanted in zip(layer.run(), layer.truth(), strict=True):
        assert distance(found, wanted) < LIMIT[torch.float16]
    assert taken == [not nf4]


def test_no_tokens_are_no_work_and_give_gradients_of_zero() -> None:
    layer = Layer(torch.float16, rank=4)
    out = gated_experts(layer.x[:0], layer.index[:0], layer.weight[:0], *layer.matrices, *layer.adapters)
    assert out.shape == (0, 64)
    trained = layer.trained[2:]
    for gradient in torch.autograd.grad(out.sum(), trained):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_inputs_may_be_views_and_weights_may_not() -> None:
    layer = Layer(torch.float16)
    up, down = (matrix.detach() for matrix in layer.matrices)
    wide = torch.randn(11, 128, device=DEVICE).half()
    view = gated_experts(wide[:, ::2], layer.index.T.contiguous().T, layer.weight.detach(), up, down)
    assert torch.equal(view, gated_experts(wide[:, ::2].contiguous(), layer.index, layer.weight.detach(), up, down))
    turned = up.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(UsageError, match="with strides"):
        gated_experts(layer.x, layer.index, layer.weight, turned, down)


def test_nothing_is_kept_for_a_way_back_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, forward = Layer(torch.float16), grouped.gated_forward
    kept: list[bool] = []

    def watched(*arguments: Any, save: bool, **more: Any) -> Any:
        kept.append(save)
        return forward(*arguments, save=save, **more)

    monkeypatch.setattr(grouped, "gated_forward", watched)
    with torch.no_grad():
        gated_experts(layer.x, layer.index, layer.weight, *layer.matrices)
    gated_experts(layer.x, layer.index, layer.weight, *layer.matrices)
    assert kept == [False, True]


def test_a_weight_that_is_changed_before_the_way_back_is_noticed() -> None:
    layer = Layer(torch.float16)
    out = gated_experts(layer.x, layer.index, layer.weight, *layer.matrices)
    with torch.no_grad():
        layer.matrices[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_second_derivative_is_refused_and_not_wrong() -> None:
    layer = Layer(torch.float32)
    out = gated_experts(layer.x, layer.index, layer.weight, *layer.matrices)
    (gradient,) = torch.autograd.grad(out.square().sum(), layer.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_it_gives_the_same_gradients_to_the_bit(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = Layer(torch.float16, nf4="flat", rank=4)
    plain = gated_experts(layer.x, layer.index, layer.weight, *layer.matrices, *layer.adapters)
    d_out = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, layer.trained, d_out)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gated_experts(x, layer.index, weight, *layer.matrices, *layer.adapters)

    for tensor in layer.trained:
        tensor.grad = None
    checkpoint(run, layer.x, layer.weight, use_reentrant=reentrant).backward(d_out)
    for tensor, gradient in zip(layer.trained, wanted, strict=True):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, gradient)


def test_what_does_not_belong_together_is_refused_by_name() -> None:
    layer = Layer(torch.float16, rank=4)
    up, down = (matrix.detach() for matrix in layer.matrices)
    first, second = layer.adapters
    with pytest.raises(UsageError, match=r"x is \(11, 32\), where \(11, 64\) belongs"):
        gated_experts(layer.x[:, :32], layer.index, layer.weight, up, down)
    with pytest.raises(UsageError, match=r"slot_weight is \(11, 1\)"):
        gated_experts(layer.x, layer.index, layer.weight[:, :1], up, down)
    with pytest.raises(UsageError, match=r"down is \(4, 32, 64\)"):
        gated_experts(layer.x, layer.index, layer.weight, up, down[:, :32].contiguous())
    with pytest.raises(UsageError, match=r"gate_up_adapter.a is \(2, 4, 64\)"):
        gated_experts(layer.x, layer.index, layer.weight, up, down, replace(first, a=second.a[:2]), second)
    wide = Adapter(torch.zeros(4, 129, 64, device=DEVICE), torch.zeros(4, 128, 129, device=DEVICE), 1.0)
    with pytest.raises(UsageError, match="rank 129"):
        gated_experts(layer.x, layer.index, layer.weight, up, down, wide)
