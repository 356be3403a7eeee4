from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from radeon_stack.errors import UsageError
from radeon_stack.kernels.nf4 import decode, decode_reference, from_bitsandbytes, quantize, with_float_scales
from tests.kernels.helpers import HALVES


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_decoded_values_are_bitsandbytes_to_the_bit(dtype: torch.dtype, double: bool, device: str) -> None:
    matrix = torch.randn(3, 32, 192, device=device).to(dtype)
    packed, state = quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=double)
    wanted = dequantize_4bit(packed, state)
    ours = from_bitsandbytes(packed, state)
    assert torch.equal(decode_reference(ours), wanted)
    assert torch.equal(decode(ours), wanted)
    assert torch.equal(decode(with_float_scales(ours)), wanted)


def test_every_nibble_decodes_to_its_entry_of_the_table(device: str) -> None:
    matrix = quantize(torch.randn(1, 64, device=device), double=False)
    every = torch.arange(256, dtype=torch.uint8, device=device)
    ours = replace(matrix, packed=every, absmax=torch.ones(8, device=device), shape=torch.Size((8, 64)))
    wanted = matrix.code[torch.stack((every >> 4, every & 15), -1).flatten().long()].view(8, 64)
    assert torch.equal(decode(ours, torch.float32), wanted)


def test_a_scale_that_is_nan_or_infinite_is_kept(device: str) -> None:
    matrix = quantize(torch.randn(2, 64, device=device), double=False)
    matrix.absmax.copy_(torch.tensor([float("nan"), float("inf")]))
    found = decode(matrix, torch.float32)
    assert found[0].isnan().all()
    assert (found[1].isinf() | found[1].isnan()).all()  # the table's zero times infinity is NaN


def test_packed_weights_are_a_quarter_and_say_so(device: str) -> None:
    matrix = torch.randn(4, 256, 512, device=device, dtype=torch.float16)
    assert quantize(matrix).nbytes < 0.27 * matrix.nbytes
    assert with_float_scales(quantize(matrix)).nbytes < 0.29 * matrix.nbytes


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_that_bitsandbytes_keeps_as_numbers_are_read_as_bytes(storage: torch.dtype, device: str) -> None:
    matrix = torch.randn(8, 128, device=device).half()
    packed, state = quantize_4bit(matrix, blocksize=64, quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage
    assert torch.equal(decode(from_bitsandbytes(packed, state)), dequantize_4bit(packed, state))


def test_a_scale_that_is_nan_spoils_its_own_row_alone_in_a_product(device: str) -> None:
    from radeon_stack.kernels.linear import nf4_linear

    weight = quantize(torch.randn(64, 192, device=device).half(), double=False)
    weight.absmax[0] = float("nan")
    out = nf4_linear(torch.randn(3, 192, device=device).half(), weight)
    assert out[:, 0].isnan().all()
    assert out[:, 1:].isfinite().all()


def test_what_the_kernels_cannot_read_is_refused_by_name() -> None:
    matrix = torch.randn(4, 128)
    with pytest.raises(UsageError, match="fp4 in blocks of 64"):
        from_bitsandbytes(*quantize_4bit(matrix, blocksize=64, quant_type="fp4"))
    with pytest.raises(UsageError, match="nf4 in blocks of 128"):
        from_bitsandbytes(*quantize_4bit(matrix, blocksize=128, quant_type="nf4"))
    with pytest.raises(UsageError, match="rows of 96 values"):
        quantize(torch.randn(2, 96))
