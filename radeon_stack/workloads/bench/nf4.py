"""What the suites share that have weights in bitsandbytes' NF4, and kernels of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from radeon_stack.workloads.bench.suite import Missing
from radeon_stack.workloads.bench.timing import first_line

if TYPE_CHECKING:
    from radeon_stack.kernels.nf4 import NF4

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
BLOCK = 64
# Units in the last place of the dtype. Right implementations were seen at one or less; a lost expert is far above.
LIMIT_ULPS = 4
INTERPRETED = "Triton's interpreter on a CPU: interpreted, not timed against the others"


def ulp(dtype: str) -> float:
    """The unit in the last place of one, of torch's dtype by name; float32 may be computed in TF32: float16's."""
    return float(torch.finfo(torch.float16 if dtype == "float32" else getattr(torch, dtype)).eps)


def quantised(matrix: torch.Tensor) -> tuple[NF4, torch.Tensor]:
    """A matrix in NF4, doubly quantised, for our kernels, and decoded again by bitsandbytes. Missing where it is not
    there, or rows are no whole blocks."""
    from radeon_stack.kernels.nf4 import from_bitsandbytes, with_float_scales

    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError as error:
        raise Missing(f"bitsandbytes cannot be imported: {first_line(error)}") from error
    whole_blocks(matrix)
    packed, state = quantize_4bit(matrix, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    return with_float_scales(from_bitsandbytes(packed, state)), dequantize_4bit(packed, state)


def whole_blocks(matrix: torch.Tensor) -> None:
    """Missing unless rows are whole blocks of NF4."""
    if matrix.shape[-1] % BLOCK:
        raise Missing(f"rows of {matrix.shape[-1]} values are no whole blocks of {BLOCK}")


def kernels_run_on(device: torch.device, dtype: str) -> str:
    """ "" where our kernels are compiled; else a note. Missing for what the interpreter cannot compute."""
    if device.type != "cpu":
        return ""
    if dtype == "bfloat16":
        raise Missing("Triton's interpreter has no bfloat16")
    return INTERPRETED
