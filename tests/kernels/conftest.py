"""The kernels' tests run through Triton's interpreter, or on a GPU where there is one.

Triton decides on its interpreter when it is imported: `make test` starts these in a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tests.kernels.helpers import GPU

    if GPU or os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if "tests/kernels/" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1 (make test sets it)"))


@pytest.fixture
def device() -> str:
    from tests.kernels.helpers import DEVICE

    return DEVICE


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a kernel does not write is NaN, or a number that is no row of anything."""
    import torch

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty))
    torch.manual_seed(0)
    yield


def _poisoning(make: Any) -> Any:
    import torch

    def made(*arguments: Any, **named: Any) -> Any:
        tensor = make(*arguments, **named)
        with torch.no_grad():
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor

    return made
