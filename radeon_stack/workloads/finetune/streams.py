"""Tensors read from safetensors files by plain reads, and given back as bytes."""

from __future__ import annotations

from typing import BinaryIO

import torch

from radeon_stack.errors import UsageError
from radeon_stack.safetensor_files import Place, fill, opened

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_tensor(place: Place) -> torch.Tensor:
    """A whole tensor of floats."""
    with opened(place) as stream:
        return next_values(stream, place, place.shape)


def next_values(stream: BinaryIO, place: Place, shape: tuple[int, ...]) -> torch.Tensor:
    """What comes next of a tensor, in this shape. UsageError when it is not in floats of 16 bit or more."""
    if place.dtype not in FLOATS:
        raise UsageError(f"{place.name} is in {place.dtype}, not in floats of 16 bit or more", where=str(place.file))
    made = torch.empty(shape, dtype=FLOATS[place.dtype])
    fill(stream, as_bytes(made), place.file)
    return made


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's own memory."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy())
