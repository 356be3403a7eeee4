"""Tile sizes: which configuration a kernel is launched with, by rule and never by search at run time.

A rule gives the same answer for the same shapes, so results repeat to the bit, nothing waits for a tuner, and the audit
can compile all that will ever run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from radeon_stack.kernels.sizes import SIZES


@dataclass(frozen=True)
class Tile:
    """A block of [m, n] outputs, reduced k at a time; `group` row tiles share their weights' way through the cache.

    turned: NF4 goes from registers to the matrix units, where nf4.decoding says so (jit.turned; CUDA's).
    pairs: and, over columns, x is loaded by pairs.
    tail: over experts' rows, the last tile of an expert takes up to so many rows more, in place of one for them alone.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    turned: bool = False
    pairs: bool = False
    tail: int = 0


Kind = Literal["gated_forward", "forward", "gated_backward", "backward"]


@lru_cache(SIZES)
def grouped_tile(family: str, kind: Kind, *, mean_rows: float, nf4: bool, shared: int | None = None) -> Tile:
    """For products over experts' rows; mean_rows: slots over experts. family: 'cuda' or 'hip'.

    shared: bytes of shared memory that a program may have, where less than what the tiles were chosen for.
    """
    tiles = TILES[family, nf4, kind]
    block = row_block(1.5 * mean_rows, tiles)  # routing is uneven: most experts' rows in one tile
    if family == "cuda" and shared is not None and shared < HOPPERS_SHARED:
        return replace(tiles[min(block, SMALL_BLOCK)], stages=2)
    return tiles[block]


def full_precision_tile() -> Tile:
    """For float32 operands, which take twice the room and are there to be right, not quick."""
    return Tile(32, 32, 32, 4, 1)


def fp8_tile(family: str, rows: int, *, scaled: bool) -> Tile:
    """For a dense layer in 8-bit floats. Its n and k divide 128, a block of scales.

    scaled: the scales lie along the reduction, so that the weight itself is scaled and rounded, which takes registers.
    """
    tiles = FP8[family, scaled]
    return tiles[row_block(rows, tiles)]


def row_block(rows: float, blocks: Iterable[int]) -> int:
    """The first of the blocks, which ascend, that holds `rows`; the largest, if none does."""
    return next((block for block in blocks if rows <= block), max(blocks))


def linear_tile(family: str, rows: int) -> Tile:
    """For a dense layer."""
    tiles = LINEAR[family]
    return tiles[row_block(rows, tiles)]


def gate_tile(family: str, tokens: int, experts: int, *, shared: int | None = None) -> Tile | None:
    """For a router with its linear layer in one launch, of 16 bit; `experts` padded. None: two launches.

    shared: bytes of shared memory that a program may have, where less than what the tiles were chosen for.
    """
    tile = GATE[family][row_block(tokens, GATE[family])]
    room = LDS if family == "hip" else min(shared or HOPPERS_SHARED, HOPPERS_SHARED)
    step = 2 * (tile.m + experts) * tile.k
    if experts > GATE_EXPERTS or 2 * step > room:
        return None
    return replace(tile, stages=min(tile.stages, room // step))


def gate_back_tile(family: str, tokens: int, experts: int) -> Tile | None:
    """For the way back through it in one launch; m: tokens, n: columns of d_x at a time. None: two launches."""
    fitting = (tile for most, tile in GATE_BACK[family].items() if tokens <= most)
    return next(fitting, None) if experts <= GATE_EXPERTS else None


def low_rank_split(rows: int) -> int:
    """Parts of the reduction in x·aᵀ: at few rows one program a row tile would leave the card idle."""
    return 16 if rows <= 128 else 8 if rows <= 512 else 4


def low_rank_step(rank: int) -> int:
    """Values of the reduction at a time in x·aᵀ: its factor is in float32, and two steps of a large rank are in LDS."""
    return 64 if rank <= 64 else 32


def decode_experts_once(family: str, mean_rows: float) -> bool:
    """Whether packed experts are decoded to 16 bit before a product, since many tiles would each decode them again.

    One matrix of the layer is then in 16 bit for the time of one product. Measured on an H200 with 128 experts of
    2048 × 768 (benchmarks/tune_awaited_h200.json, tune_gate_h200.json): to decode both matrices takes 0.39 ms. At 256
    rows an expert the products over columns take 0.90 ms packed and 0.67 in 16 bit, those down the rows 1.04 and 0.74.
    Growing with the rows, these win decoding back from 460 and from 340 rows on: counted, not timed, and one bound
    between them. On AMD there is nothing to go by: never.
    """
    return mean_rows > DECODE_EXPERTS_ONCE_ROWS[family]


def gate_apart(family: str, mean_rows: float) -> bool:
    """Whether the way back through experts makes d_hidden first, and goes through the gate in a launch of its own.

    The product's end needs the registers of its loop. Measured on an H200 with 128 experts of 2048 × 768
    (benchmarks/tune_gate_h200.json): at 256 rows an expert both launches take 0.30 ms in 16 bit and 0.37 packed, where
    the one takes 0.37 and 0.51; at 128 rows 0.17 and 0.21 for 0.20 and 0.28. Fewer rows were not timed: the bound is
    set between these and what a step of 512 tokens has, which waits for the host. On AMD there is nothing to go by:
    never.
    """
    return mean_rows > GATE_APART_ROWS[family]


def decode_once(family: str, rows: int) -> bool:
    """Whether a dense layer is decoded to 16 bit first: from here on every tile row would decode it again."""
    return rows > DECODE_ONCE_ROWS[family]


def adapter_by_torch(rows: int) -> bool:
    """Whether the small products of a dense layer's adapter are torch's: of more rows than where launches count."""
    return rows > ADAPTER_BY_TORCH_ROWS


LDS = 64 << 10  # bytes, of a workgroup on AMD
HOPPERS_SHARED = 227 << 10  # bytes; older and smaller CUDA cards have 99 KiB and more, on which nothing was timed
SMALL_BLOCK = 64  # the largest row block there
MAX_RANK = 128  # of adapters in a product's tile; at 64 rows the experts' way back spills a few registers on gfx11
ADAPTER_STAGES = 2  # of the adapters' own small products
LOW_RANK_WARPS = 8
LOW_RANK_TILE = 64, 64  # of an adapter's product, where the layer's is torch's; wider, gfx1100 spills at MAX_RANK
NF4_DECODE_BLOCK = 4096  # values that a program decodes
FP8_DECODE_BLOCK = 1024  # columns of a row that a program decodes
# Up to so many slots an expert's program looks at all of them: (at a time, warps). Beyond, they are counted first.
# On an H200 one launch takes less than both even at 131,072 (tune_router_h200.json); of more nothing was timed.
FEW_SLOTS = {
    "cuda": {1024: (1024, 4), 131072: (8192, 8)},
    "hip": {1024: (1024, 4), 131072: (4096, 8)},  # of 8192 Triton 3.5 spills on RDNA
}
HEAD_BLOCK, HEAD_WARPS = 2048, 8  # words at once, of a row of logits
GATE_BLOCK = (8, 256)  # rows and columns at once, of the gate alone; no others were tried
GATE_APART_ROWS = {"cuda": 96.0, "hip": float("inf")}
DECODE_EXPERTS_ONCE_ROWS = {"cuda": 384.0, "hip": float("inf")}
# From here torch's products. They take twice as many launches, and until here a step waits for the host, not for the
# device: at 300 rows an H200 takes 0.17 ms for a packed product of Llama-8B (benchmarks/train_speed_llama.json: 1280 in
# a step, of whose 816 ms under the profiler 555 are idle), where a decoded one takes 0.05 to 0.11 at 256 rows
# (tune_linear_h200.json).
DECODE_ONCE_ROWS = {"cuda": 512, "hip": 512}
# From here what adapters do is torch's: of a layer whose matrix is decoded, with float32 factors, 14 launches forward
# and back where ours are 7, and at fewer rows a step waits for the host. Counted, not timed.
ADAPTER_BY_TORCH_ROWS = 2048
LINEAR = {
    "cuda": {
        16: Tile(16, 64, 128, 4, 3),
        32: Tile(32, 64, 128, 4, 3),
        64: Tile(64, 64, 64, 4, 3),
        128: Tile(128, 64, 64, 8, 3),
    },
    "hip": {
        16: Tile(16, 64, 64, 4, 2),
        32: Tile(32, 64, 64, 8, 2),
        64: Tile(64, 64, 64, 8, 2),
        128: Tile(64, 64, 64, 8, 2),
    },
}
# A router with its linear layer: up to so many tokens. CUDA's are timed (tune_router_h200.json).
GATE = {
    "cuda": {
        2048: Tile(16, 128, 128, 4, 4),
        4096: Tile(32, 128, 128, 4, 4),
        8192: Tile(64, 128, 128, 8, 4),
        16384: Tile(64, 128, 64, 4, 4),
    },
    "hip": {16384: Tile(16, 128, 64, 4, 2)},  # others spill
}
# Of more tokens the way back is two launches: an H200 takes 58 µs for the one and 24 for both at 8192 tokens. At 4096
# that is 35 and 15, at 512 12 and 9, and yet a router there and back takes less with the one: it waits for the host
# (kernel_speed_h200.json). A step that waits for the device loses these 20 µs a layer at 4096 tokens.
GATE_BACK = {
    "cuda": {256: Tile(16, 128, 128, 8, 1), 4096: Tile(32, 64, 128, 4, 1)},
    "hip": {4096: Tile(32, 64, 128, 8, 1)},
}
GATE_EXPERTS = 128  # padded; of more nothing was compiled for AMD, or timed
GATE_BACK_PROGRAMS = 256  # at least, where there are so many columns: what a program does first is the same for each
FP8 = {  # compiled and audited, not timed yet
    ("cuda", False): {
        16: Tile(16, 64, 128, 4, 3),
        32: Tile(32, 64, 128, 4, 3),
        64: Tile(64, 64, 64, 4, 3),
        128: Tile(128, 128, 64, 8, 3),
    },
    ("cuda", True): {
        16: Tile(16, 64, 64, 4, 3),
        32: Tile(32, 64, 64, 4, 3),
        64: Tile(64, 64, 64, 4, 3),
        128: Tile(128, 64, 64, 8, 3),
    },
    ("hip", False): {
        16: Tile(16, 64, 64, 4, 2),
        32: Tile(32, 64, 64, 4, 2),
        64: Tile(64, 64, 64, 8, 2),
        128: Tile(128, 64, 64, 8, 2),
    },
    ("hip", True): {  # with k 64, gfx1100 spills
        16: Tile(16, 64, 32, 4, 2),
        32: Tile(32, 64, 32, 4, 2),
        64: Tile(64, 64, 32, 8, 2),
        128: Tile(128, 64, 32, 8, 2),
    },
}
# CUDA's: as an H200 timed them with 128 experts of 2048 × 768: packed ones in benchmarks/tune_awaited_h200.json, those
# in 16 bit in tune_*_h200.json (from 64 rows on tune_rows and tune_512, from 288 on tune_gate; those below 288 before
# the ends of products went by halves, `jit/grouped.py`).
TILES: dict[tuple[str, bool, Kind], dict[int, Tile]] = {
    ("cuda", False, "gated_forward"): {
        16: Tile(16, 32, 128, 4, 2),
        32: Tile(32, 64, 128, 4, 3),
        64: Tile(64, 64, 64, 4, 4),
        96: Tile(64, 64, 64, 4, 4, tail=32),
        288: Tile(128, 64, 64, 4, 3, tail=32),
        384: Tile(128, 128, 64, 8, 3, tail=32),
    },
    ("cuda", False, "forward"): {
        16: Tile(16, 128, 128, 4, 2),
        32: Tile(32, 128, 128, 4, 2),
        64: Tile(64, 128, 64, 4, 4),
        96: Tile(64, 128, 64, 4, 4, tail=32),
        288: Tile(128, 256, 64, 8, 3, tail=32),
    },
    ("cuda", False, "gated_backward"): {
        16: Tile(16, 64, 64, 4, 3),
        32: Tile(32, 128, 64, 4, 4),
        64: Tile(32, 128, 64, 4, 3, tail=16),
        288: Tile(64, 128, 64, 4, 4, tail=32),
    },
    ("cuda", False, "backward"): {
        16: Tile(16, 128, 64, 8, 3),
        32: Tile(32, 128, 64, 4, 3),
        64: Tile(64, 128, 64, 4, 4),
        96: Tile(64, 128, 64, 4, 4, tail=32),
        288: Tile(128, 128, 64, 4, 3, tail=32),
        384: Tile(128, 256, 64, 8, 3, tail=32),
    },
    ("cuda", True, "gated_forward"): {
        16: Tile(16, 64, 128, 4, 3, turned=True, pairs=True),
        32: Tile(32, 64, 64, 4, 3, turned=True),
        64: Tile(32, 64, 64, 4, 3, turned=True, tail=16),
        96: Tile(64, 64, 64, 4, 3, turned=True, tail=32),
        288: Tile(128, 64, 64, 4, 3, turned=True, tail=32),
        384: Tile(256, 64, 64, 8, 4, turned=True, tail=32),
    },
    ("cuda", True, "forward"): {
        16: Tile(16, 128, 64, 4, 3, turned=True),
        32: Tile(32, 128, 64, 4, 3, turned=True),
        64: Tile(32, 128, 64, 4, 3, turned=True, tail=16),
        96: Tile(64, 128, 64, 4, 3, turned=True, tail=32),
        288: Tile(128, 128, 64, 4, 3, turned=True, tail=32),
        384: Tile(256, 64, 64, 4, 3, turned=True, tail=32),
    },
    ("cuda", True, "gated_backward"): {
        16: Tile(16, 128, 64, 4, 3, turned=True),
        32: Tile(32, 128, 64, 4, 3, turned=True),
        64: Tile(32, 128, 64, 4, 3, turned=True, tail=16),
        96: Tile(64, 128, 64, 4, 3, turned=True, tail=32),
        288: Tile(128, 64, 64, 4, 3, tail=32),
    },
    ("cuda", True, "backward"): {
        16: Tile(16, 256, 64, 4, 3, turned=True),
        32: Tile(32, 256, 64, 4, 3, turned=True),
        64: Tile(32, 256, 64, 4, 3, turned=True, tail=16),
        96: Tile(64, 128, 64, 4, 3, turned=True, tail=32),
        288: Tile(128, 128, 64, 4, 3, turned=True, tail=32),
        384: Tile(256, 128, 64, 8, 4, turned=True, tail=32),
    },
}
# For AMD: chosen by what the compiler makes of them (no spills, 64 KiB of LDS), never timed.
TILES |= {
    ("hip", nf4, "gated_forward"): {
        16: Tile(16, 32, 64, 4, 2),
        32: Tile(32, 32, 64, 4, 2),
        64: Tile(64, 32, 64, 8, 2),
        128: Tile(128, 32, 64, 8, 2),
    }
    for nf4 in (False, True)
}
TILES |= {
    ("hip", nf4, kind): {
        16: Tile(16, 64, 64, 4, 2),
        32: Tile(32, 64, 64, 4, 2),
        64: Tile(64, 64, 64, 8, 2),
        128: Tile(128, 64, 64, 8, 2),
    }
    for nf4 in (False, True)
    for kind in ("forward", "gated_backward", "backward")
}
