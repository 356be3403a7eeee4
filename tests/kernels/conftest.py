"""The kernels' tests run through Triton's interpreter, or on a GPU where there is one.

Triton decides on its interpreter when it is imported: `make test` starts these in a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the packages of the extra 'work'")
pytest.importorskip("triton", reason="needs triton (the extra 'dev')")
GPU = torch.cuda.is_available()

if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 (make test sets it)", allow_module_level=True)


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a kernel does not write is NaN, or a number that is no row of anything."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
    torch.manual_seed(0)
    yield


def _poisoning(make: Any) -> Any:
    def made(*arguments: Any, **named: Any) -> Any:
        tensor = make(*arguments, **named)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor

    return made
