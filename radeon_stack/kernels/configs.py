"""Tile sizes: which configuration a kernel is launched with, by rule and never by search at run time.

A rule gives the same answer for the same shapes, so results repeat to the bit, nothing waits for a tuner, and the audit
can compile all that will ever run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A block of [m, n] outputs, reduced k at a time; `group` row tiles share their weights' way through the cache."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8


def grouped_tile(family: str, *, mean_rows: float, nf4: bool, gated: bool) -> Tile:
    """For products over experts' rows; mean_rows: slots over experts. family: 'cuda' or 'hip'."""
    m = 16
    while m < 128 and m < mean_rows:
        m *= 2
    return TILES[(family, nf4, gated)][m]


TILES: dict[tuple[str, bool, bool], dict[int, Tile]] = {
    ("cuda", False, False): {
        16: Tile(16, 128, 128, 4, 4),
        32: Tile(32, 128, 128, 4, 4),
        64: Tile(64, 128, 64, 4, 4),
        128: Tile(128, 128, 64, 8, 4),
    },
    ("cuda", False, True): {
        16: Tile(16, 64, 128, 4, 4),
        32: Tile(32, 64, 128, 4, 4),
        64: Tile(64, 64, 64, 4, 4),
        128: Tile(128, 64, 64, 8, 4),
    },
    ("cuda", True, False): {
        16: Tile(16, 128, 128, 4, 3),
        32: Tile(32, 128, 128, 4, 3),
        64: Tile(64, 128, 64, 4, 3),
        128: Tile(128, 128, 64, 8, 3),
    },
    ("cuda", True, True): {
        16: Tile(16, 64, 128, 4, 3),
        32: Tile(32, 64, 128, 4, 3),
        64: Tile(64, 64, 64, 4, 3),
        128: Tile(128, 64, 64, 8, 3),
    },
}
TILES |= {
    ("hip", nf4, gated): {
        16: Tile(16, 64, 64, 4, 1),
        32: Tile(32, 64, 64, 4, 1),
        64: Tile(64, 64, 64, 4, 1),
        128: Tile(128, 64, 64, 8, 1),
    }
    for nf4 in (False, True)
    for gated in (False, True)
}
