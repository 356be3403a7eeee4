"""Sizes of grids and blocks."""

from __future__ import annotations

SIZES = 4096  # of batches whose launches' grids and constants are remembered: a step waits for the host


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def padded_rank(rank: int) -> int:
    """An adapter's rank as kernels reduce over it: 16 is the least a matrix instruction takes. 0: no adapter."""
    return max(16, next_power(rank)) if rank else 0
