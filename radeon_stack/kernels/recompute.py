"""Activation checkpointing of decoder layers, with less to compute and less to do for the host.

transformers hands each layer's forward to a function of torch's, whose first pass notes every tensor that autograd
would save and whose second is compared with it. Here the first pass makes no graph at all, as torch's reentrant form
does, and of the second the last product is left out: a layer ends with `residual + product(…)`, whose value nobody
reads again, and whose way back asks for the product's inputs alone. In a Llama layer that is 27 % of the products.

Which product that is, is not guessed: the first time that a layer is computed again, it is the one after which autograd
saved nothing more. Where a norm follows (Gemma), there is none. Other products may have been kept meanwhile
(`kept.py`), and are not computed again either; nor is the last layer, where all of it was. A layer that this does not
fit (dropout, more inputs with gradients than the hidden states, a result that is not one tensor, router logits that a
loss wants) is torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from radeon_stack.kernels.kept import Keeper, Pass, count_rows
from radeon_stack.kernels.once import once_differentiable

SPARES = "radeon_spares"  # a layer's attribute: [the module whose values its second pass does without, or None]
SPARED = "radeon_spared"  # that module's, meanwhile
FUNCTION = "_gradient_checkpointing_func"  # transformers' name for what a layer calls

Checkpoint = Callable[..., Any]


def is_needed(module: nn.Module) -> bool:
    """Whether anybody reads what this module is about to compute."""
    return SPARED not in module.__dict__


def checkpointed(model: Any) -> list[nn.Module]:
    """The layers that transformers was told to compute again, in their order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    return [layer for layer in layers if layer.gradient_checkpointing]


def use_recompute(model: Any, can_spare: Callable[[nn.Module], bool], keeper: Keeper | None = None) -> bool:
    """Have the model's checkpointed layers computed again this way; after transformers' own was switched on.

    can_spare: whether a module heeds `is_needed`. keeper: has some of their products wait, and be taken from there.
    Returns whether anything was changed.
    """
    layers = checkpointed(model)
    if not layers or getattr(model.config, "output_router_logits", False) or _drops(model):
        return False
    ours: dict[Checkpoint, Checkpoint] = {}
    for layer in layers:
        plain = getattr(layer, FUNCTION)
        setattr(layer, FUNCTION, ours.setdefault(plain, _instead_of(plain, can_spare, keeper)))
    return True


def _drops(model: Any) -> bool:
    """Whether chance has a part in it: the second pass would have to repeat the first one's."""
    rates = (value for name, value in vars(model.config).items() if "drop" in name and isinstance(value, float))
    return any(rates) or any(isinstance(module, nn.Dropout) and module.p for module in model.modules())


def _instead_of(plain: Checkpoint, can_spare: Callable[[nn.Module], bool], keeper: Keeper | None) -> Checkpoint:
    one_tensor: dict[type, bool] = {}  # by kind of layer, once one has run

    def checkpoint(run: Any, *arguments: Any) -> Any:
        if not isinstance(run, partial) or not run.args:  # a model that calls it by an older way
            return plain(run, *arguments)
        layer = run.args[0]
        kind = type(layer)
        if kind not in one_tensor:
            out = plain(run, *arguments)
            one_tensor[kind] = isinstance(out, Tensor)
            return out
        if not one_tensor[kind] or not _fits(run, arguments):
            return plain(run, *arguments)
        if keeper is not None and keeper.keeps_all(layer, arguments[0]):
            with keeper.first_pass(layer, arguments[0]):
                return run(*arguments)
        return _Recomputed.apply(arguments[0], _Pass(layer, run, arguments[1:], can_spare, keeper))

    return checkpoint


def _fits(run: Any, arguments: tuple[Any, ...]) -> bool:
    first, *others = arguments or (None,)
    if not (isinstance(first, Tensor) and first.requires_grad and torch.is_grad_enabled()):
        return False
    return not any(map(_has_gradient, (*others, *run.keywords.values())))


def _has_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, (tuple, list)):
        return any(map(_has_gradient, value))
    return isinstance(value, dict) and any(map(_has_gradient, value.values()))


class _Pass:
    """A layer's forward with all that it takes but the hidden states, under the autocast of the first time."""

    def __init__(
        self,
        layer: nn.Module,
        run: Any,
        others: tuple[Any, ...],
        can_spare: Callable[[nn.Module], bool],
        keeper: Keeper | None,
    ) -> None:
        self._layer, self._run, self._others, self._can_spare = layer, run, others, can_spare
        self._keeper = keeper
        self._kept: Pass = {}

    def first(self, hidden: Tensor) -> Any:
        kind = hidden.device.type
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        if self._keeper is None:
            return self._run(hidden, *self._others)
        with self._keeper.first_pass(self._layer, hidden) as self._kept:
            return self._run(hidden, *self._others)

    def again(self, hidden: Tensor) -> Any:
        with torch.enable_grad(), torch.autocast(*self._autocast, cache_enabled=torch.is_autocast_cache_enabled()):
            found = self._layer.__dict__.get(SPARES)
            if found is None:
                self._kept.clear()
                return self._and_find(hidden)
            with _without(found[0]), self._keeper.second_pass(self._kept) if self._keeper else nullcontext():
                return self._run(hidden, *self._others)

    def _and_find(self, hidden: Tensor) -> Any:
        """The same, and note which module autograd saves nothing after, and how much it saves."""
        order: list[nn.Module | None] = []
        sizes: dict[int, int] = {}  # by storage
        weights = {weight.untyped_storage().data_ptr() for weight in self._layer.parameters()}

        def saved(tensor: Tensor) -> Tensor:
            order.append(None)
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # itself would be a circle, where an operation saves its own result

        def left(module: nn.Module, *_: Any) -> None:
            order.append(module)

        hooks = [module.register_forward_hook(left) for module in self._layer.modules() if self._can_spare(module)]
        try:
            with saved_tensors_hooks(saved, _itself):
                out = self._run(hidden, *self._others)
        finally:
            for hook in hooks:
                hook.remove()
        self._layer.__dict__[SPARES] = [order[-1] if order else None]
        if self._keeper is not None:
            self._keeper.notice(self._layer, sum(sizes.values()) / count_rows(hidden))
        return out


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _without(spared: nn.Module | None) -> Iterator[None]:
    """While nobody reads that module's values."""
    if spared is None:
        yield
        return
    spared.__dict__[SPARED] = True
    try:
        yield
    finally:
        del spared.__dict__[SPARED]


class _Recomputed(torch.autograd.Function):
    """A layer of which only the hidden states before it are kept. Its parameters' gradients are added on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: _Pass) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(hidden)
        out: Tensor = layer.first(hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, None]:
        (kept,) = ctx.saved_tensors
        hidden = kept.detach().requires_grad_()
        torch.autograd.backward(ctx.layer.again(hidden), d_out)
        return hidden.grad, None
