"""What these tests measure with."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the packages of the extra 'work'")
pytest.importorskip("bitsandbytes", reason="needs the packages of the extra 'work'")
pytest.importorskip("triton", reason="needs triton (the extra 'dev')")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Triton's interpreter multiplies bfloat16's bit patterns as integers: bf16 is held to the references on a GPU alone.
HALVES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def distance(found: Any, wanted: Any) -> float:
    """‖found − wanted‖ / ‖wanted‖, in float64; NaN where there is one."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
