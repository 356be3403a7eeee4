"""What these tests measure with."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the packages of the extra 'work'")
pytest.importorskip("bitsandbytes", reason="needs the packages of the extra 'work'")
pytest.importorskip("triton", reason="needs triton (the extra 'dev')")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Triton's interpreter multiplies bfloat16's bit patterns as integers: bf16 is held to the references on a GPU alone.
HALVES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def distance(found: Any, wanted: Any) -> float:
    """‖found − wanted‖ / ‖wanted‖, in float64; NaN where there is one."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


class Operations(TorchDispatchMode):
    """The names of torch's operations, in their order: those that launch, and views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class Adds(TorchDispatchMode):
    """Counts tensors of one shape that are added up."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.count += function in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and out.shape == self._shape
        return out
