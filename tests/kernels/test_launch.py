"""What a compiled kernel is kept under: all that Triton compiles differently for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.kernels.launch import _specialised


def key(argument: torch.Tensor | int) -> object:
    return _specialised(argument, argument.data_ptr() if isinstance(argument, torch.Tensor) else argument)


def test_a_pointers_type_alignment_and_range_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.1")  # the range is AMD's
    base = torch.zeros(64, dtype=torch.float16)
    keys = [
        key(base),
        key(base.bfloat16()),
        key(base[1:]),
        key(torch.zeros(3 << 30, dtype=torch.float16, device="meta")),
    ]
    assert len(set(keys)) == len(keys)
    assert key(base) == key(torch.ones(7, 8, dtype=torch.float16))


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_numbers_share_a_kernel_only_where_triton_would_share_it(one: int, other: int) -> None:
    def kind(number: int) -> tuple[bool, bool, bool]:
        return number == 1, number % 16 == 0, number < 1 << 31

    assert (key(one) == key(other)) == (kind(one) == kind(other))
