"""Layers that read one tensor: they add up its gradient in their own products, and it is the same gradient."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from radeon_stack.kernels import linear, low_rank, nf4, siblings
from tests.kernels.helpers import DEVICE, Adds, distance

ROWS, WIDTH, OUT, RANK = 6, 128, 64, 4
SHAPE: tuple[int, ...] = (ROWS,)  # of what the layers read, besides its columns


class Layer:
    """A frozen matrix with an adapter, if it has a rank."""

    def __init__(self, rank: int = RANK, scale: float = 0.5) -> None:
        self.weight, self.scale = nf4.quantize(torch.randn(OUT, WIDTH, device=DEVICE)), scale
        self.a = torch.randn(rank, WIDTH, device=DEVICE, requires_grad=True) if rank else None
        self.b = torch.randn(OUT, rank, device=DEVICE, requires_grad=True) if rank else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear.nf4_linear(x, self.weight, self.a, self.b, self.scale)

    @property
    def trained(self) -> list[torch.Tensor]:
        return [one for one in (self.a, self.b) if one is not None]


@pytest.fixture(autouse=True, params=[linear.BY_TORCH, linear.DECODED], ids=["by torch", "adapters in launches"])
def many_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are multiplied by torch, of a matrix decoded by its definition; in float32, to see what is added."""
    torch.manual_seed(7)
    monkeypatch.setattr(linear, "decode_once", lambda *_: True)
    monkeypatch.setattr(linear, "adapter_by_torch", lambda _: True)
    monkeypatch.setattr(linear, "BY_TORCH", request.param)
    monkeypatch.setattr(linear, "decode", lambda matrix, dtype: nf4.decode_reference(matrix, dtype))


@pytest.fixture(autouse=True, params=[(2, ROWS // 2), (ROWS,)], ids=["of sequences", "of rows"])
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SHAPE", request.param)


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def given() -> tuple[torch.Tensor, torch.Tensor]:
    """A leaf, and what the layers read: […, columns], made of it."""
    leaf = torch.randn(*SHAPE, WIDTH, device=DEVICE, requires_grad=True)
    return leaf, leaf * 3


def loss_of(*outs: torch.Tensor) -> torch.Tensor:
    """To which each value of each counts differently."""
    losses = [(out * torch.linspace(-1, n, OUT, device=DEVICE)).square().sum() for n, out in enumerate(outs)]
    return torch.stack(losses).sum()


def itself(x: torch.Tensor) -> torch.Tensor:
    return x


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same, which nobody has read before."""
    return x.view_as(x)


def are_near(found: Any, wanted: Any) -> bool:
    return all(distance(one, other) < 1e-6 for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("ranks", [(RANK, RANK, RANK), (0, RANK, 0), (RANK, 0, RANK)])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_gradients_are_those_of_layers_that_read_copies(ranks: tuple[int, ...], scale: float) -> None:
    layers = [Layer(rank, scale) for rank in ranks]
    leaf, x = given()
    inputs = [leaf, *(one for layer in layers for one in layer.trained)]
    found = torch.autograd.grad(loss_of(*(layer(x) for layer in layers)), inputs)
    wanted = torch.autograd.grad(loss_of(*(layer(leaf * 3) for layer in layers)), inputs)
    assert are_near(found, wanted)


def test_nothing_is_added_up_beside_the_products() -> None:
    layers = [Layer(), Layer(), Layer()]
    counts = []
    for read in (itself, apart):
        _, x = given()
        loss = loss_of(*(layer(read(x)) for layer in layers))
        with Adds(x.shape) as adds:
            loss.backward()
        counts.append(adds.count)
    assert counts == [0, 2]


def test_a_reader_besides_gets_its_gradient_added() -> None:
    first, second = Layer(), Layer()
    leaf, x = given()
    (found,) = torch.autograd.grad(loss_of(first(x), x[..., :OUT].sin(), second(x)), leaf)
    x = leaf * 3
    (wanted,) = torch.autograd.grad(loss_of(first(apart(x)), x[..., :OUT].sin(), second(apart(x))), leaf)
    assert are_near([found], [wanted])


@pytest.mark.parametrize("reached", [0, 1, 2])
def test_a_layer_that_is_not_reached_hands_the_gradient_through(reached: int) -> None:
    layers = [Layer(), Layer(), Layer()]
    leaf, x = given()
    outs = [layer(x) for layer in layers]
    loss_of(outs[reached]).backward()
    found, leaf.grad = leaf.grad, None
    (wanted,) = torch.autograd.grad(loss_of(layers[reached](leaf * 3)), leaf)
    assert torch.equal(found, wanted)
    assert [all(one.grad is not None for one in layer.trained) for layer in layers] == [n == reached for n in range(3)]


def test_a_gradient_of_one_adapter_alone_leaves_nothing_behind() -> None:
    first, second = Layer(), Layer()
    leaf, x = given()
    loss = loss_of(first(x), second(x))
    (wanted,) = torch.autograd.grad(loss_of(first(leaf * 3), second(leaf * 3)), leaf)
    torch.autograd.grad(loss, second.a, retain_graph=True)
    (found,) = torch.autograd.grad(loss, leaf)
    assert are_near([found], [wanted])


def test_a_graph_that_is_gone_through_twice_gives_the_same_bits_twice() -> None:
    layers = [Layer(), Layer(), Layer()]
    leaf, x = given()
    loss = loss_of(*(layer(x) for layer in layers))
    inputs = [leaf, *(one for layer in layers for one in layer.trained)]
    once, again = torch.autograd.grad(loss, inputs, retain_graph=True), torch.autograd.grad(loss, inputs)
    assert all(map(torch.equal, once, again))


def test_gradients_that_are_not_contiguous_are_added_too() -> None:
    first, second = Layer(), Layer()
    leaf, x = given()
    d_outs = [torch.randn(OUT, *reversed(SHAPE), device=DEVICE).permute(*range(len(SHAPE), -1, -1)) for _ in range(2)]
    (found,) = torch.autograd.grad([first(x), second(x)], leaf, d_outs)
    (wanted,) = torch.autograd.grad([first(leaf * 3), second(leaf * 3)], leaf, d_outs)
    assert are_near([found], [wanted])


def test_what_was_written_over_is_read_anew() -> None:
    first, second = Layer(rank=0), Layer(rank=0)
    leaf, x = given()
    before = first(x)
    after = second(x.mul_(2))
    (found,) = torch.autograd.grad(loss_of(before, after), leaf)
    (wanted,) = torch.autograd.grad(loss_of(first(leaf * 3), second(leaf * 6)), leaf)
    assert are_near([found], [wanted])


def test_second_derivatives_are_refused_as_before() -> None:
    first, second = Layer(), Layer()
    leaf, x = given()
    (gradient,) = torch.autograd.grad(loss_of(first(x), second(x)), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("why", ["few rows", "no gradient", "a leaf"])
def test_where_there_is_nothing_to_add_up_nothing_is_handed_on(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "decode_once", lambda *_: why != "few rows")
    leaf, x = given()
    x = {"few rows": x, "no gradient": x.detach(), "a leaf": leaf}[why]
    Layer()(x)
    assert siblings.HANDED not in vars(x)


@pytest.mark.parametrize("goes_back", [True, False])
def test_the_tensor_is_gone_with_its_last_reader(
    goes_back: bool, uncollected: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (linear, low_rank):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)  # Triton's interpreter has circles of its own
    layers = [Layer(), Layer(), Layer()]
    _, x = given()
    outs = [layer(x) for layer in layers]
    assert siblings.HANDED in vars(x)
    alive = [weakref.ref(x), weakref.ref(x.untyped_storage())]
    if goes_back:
        loss_of(*outs).backward()
    else:
        outs.clear()
    del x
    assert [one() for one in alive] == [None, None]
