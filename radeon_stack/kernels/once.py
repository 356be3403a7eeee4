"""Our operations in autograd, as little of the host as there can be."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable as guarded_by_torch


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's, whose guard is entered only where gradients of gradients are recorded: elsewhere it does nothing, and
    at every layer of a step it takes some of the time that the host has for it.
    """
    guarded = guarded_by_torch(backward)

    @wraps(backward)
    def gradient(ctx: Any, *gradients: Any) -> Any:
        return guarded(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return gradient


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply` without its look for functorch's wrappers, one at each argument: kernels read addresses, which
    wrapped tensors do not have.
    """
    if torch.compiler.is_compiling():  # which knows `apply` itself
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)
