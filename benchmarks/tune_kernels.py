"""Times every tile that might serve, on the GPU that is here: what `kernels/configs.py` should have for it.

    PYTHONPATH=. python benchmarks/tune_kernels.py [--out FILE] [--only experts,linear] [--blocks 64,128]
        [--match REGEX] [--commit HASH] [--workers N]

Sizes are Qwen3-30B-A3B's experts (128 of 2048 × 768, top 8) and an 8B model's linear layers. Kernels are compiled
first, by several processes; then each candidate is timed without the host (a tile has nothing to do with it), medians.
The last lines are the choices; the JSON has every time. Choose by hand: a tile that wins by a hundredth here may lose
elsewhere.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # in the place of this folder: its file names are none of a library's business
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
import triton  # noqa: E402

from radeon_stack.kernels import grouped, linear, nf4, routing  # noqa: E402
from radeon_stack.kernels.configs import LINEAR, TILES, Kind, Tile, row_block  # noqa: E402

EXPERTS, WIDTH, INNER, TOP_K = 128, 2048, 768, 8
# Tokens whose experts fill a row block.
TOKENS: dict[int, tuple[int, ...]] = {16: (128,), 32: (256,), 64: (512,), 96: (1024,), 288: (2048,), 384: (4096,)}
KINDS: tuple[Kind, ...] = ("gated_forward", "forward", "gated_backward", "backward")
LINEARS = ((4096, 4096), (4096, 14336), (14336, 4096))  # (out, in)
ROWS: dict[int, tuple[int, ...]] = {16: (16,), 32: (32,), 64: (64,), 128: (128, 256, 512, 1024)}
DECODE: Literal["decode"] = "decode"  # both matrices once, which a step does twice
APART: Literal["gate_apart"] = "gate_apart"  # gated_backward in two launches: the tile is the product's
TORCH = Tile(0, 0, 0, 0, 0)  # in a tile's place: decoded once, and multiplied by torch
RANK = 64
REPEATS = 4
HELD = 4_000_000  # the device's cycles, some 2 ms: longer than the host takes for REPEATS calls
SAVED_EVERY = 20


# (accumulators' columns, k, warps, stages) that are tried
HIP = ((32, 64, 4, 2), (32, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2), (64, 64, 4, 1))
CUDA = (
    (64, 64, 4, 3),
    *((128, 64, warps, stages) for warps, stages in ((4, 3), (4, 4), (8, 3), (8, 4))),
    (256, 64, 8, 3),
)
CUDA_FEW = ((64, 128, 4, 3), (256, 64, 4, 3))  # for up to FEW rows too
FEW = 64
# (rows, tail) by row block. Whose rows are a little over a tile's, a tail spares the next one.
HEIGHTS = {
    16: ((16, 0),),
    32: ((16, 16), (32, 0)),
    64: ((32, 16), (64, 0)),
    96: ((64, 32), (128, 0)),
    288: ((128, 32),),
    384: ((128, 32), (256, 32)),
}
MOST = 160  # accumulators a thread: with more, registers are written to memory


def tiles(block: int, kind: Kind, *, nf4: bool) -> Iterator[Tile]:
    """Candidates for a row block."""
    gated, along = kind == "gated_forward", kind in ("gated_forward", "forward")
    if torch.version.hip:
        rows = row_block(block, TILES["hip", nf4, kind])
        yield TILES["hip", nf4, kind][rows]
        for columns, k, warps, stages in HIP:
            yield Tile(rows, columns // 2 if gated and columns > 32 else columns, k, warps, stages)
        return
    used = TILES["cuda", nf4, kind]
    yield used[row_block(block, used)]
    shapes = CUDA + CUDA_FEW if block <= FEW else CUDA
    for (m, tail), (columns, k, warps, stages) in itertools.product(HEIGHTS[block], shapes):
        if (m + tail) * columns <= MOST * 32 * warps:
            tile = Tile(m, columns // 2 if gated else columns, k, warps, stages, tail=tail, turned=nf4)
            yield tile
            if nf4 and along and m == 16:  # with more rows they were never the quickest
                yield replace(tile, pairs=True)
            if nf4 and not along and m >= 128:
                yield replace(tile, turned=False)


def linear_tiles(block: int, *, along: bool) -> Iterator[Tile]:
    """Candidates for a dense layer, after the one in use."""
    yield LINEAR["hip" if torch.version.hip else "cuda"][block]
    for columns, k, warps, stages in HIP if torch.version.hip else CUDA + CUDA_FEW:
        tile = Tile(block, columns, k, warps, stages)
        yield tile
        if not torch.version.hip and block * columns <= MOST * 32 * warps:
            yield replace(tile, turned=True)
            if along:
                yield replace(tile, turned=True, pairs=True)


def device_seconds(call: Callable[[], Any]) -> float:
    """Median device time of a call, of REPEATS that the host has queued while the device was kept waiting."""
    call()
    spent = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HELD)
        begin.record()
        for _ in range(REPEATS):
            call()
        end.record()
        torch.cuda.synchronize()
        spent.append(begin.elapsed_time(end))
    return float(statistics.median(spent)) / 1e3 / REPEATS


class Experts:
    """A layer's matrices, and a batch that is routed evenly."""

    def __init__(self, experts: int) -> None:
        up = torch.randn(experts, 2 * INNER, WIDTH, device="cuda", dtype=torch.bfloat16) * 0.02
        down = torch.randn(experts, WIDTH, INNER, device="cuda", dtype=torch.bfloat16) * 0.02
        packed = tuple(nf4.with_float_scales(nf4.quantize(matrix)) for matrix in (up, down))
        self.matrices: dict[bool, tuple[Any, Any]] = {False: (up, down), True: (packed[0], packed[1])}

    def batch(self, tokens: int, spread: int) -> None:
        torch.manual_seed(tokens)
        index = torch.stack([torch.randperm(spread, device="cuda")[:TOP_K] for _ in range(tokens)])
        half = {"device": "cuda", "dtype": torch.bfloat16}
        self.routing = routing.route(index, EXPERTS)
        self.x, self.weight = torch.randn(tokens, WIDTH, **half), torch.rand(tokens, TOP_K, **half)
        self.hidden = torch.randn(tokens * TOP_K, INNER, **half)
        self.gate_up = torch.randn(tokens * TOP_K, 2 * INNER, **half)

    def call(self, kind: Kind | Literal["decode", "gate_apart"], packed: bool, tile: Tile) -> Any:
        up, down = self.matrices[packed]
        if kind == DECODE:
            return nf4.decode(up, torch.bfloat16), nf4.decode(down, torch.bfloat16)
        if kind == "gated_forward":
            return grouped.gated_forward(self.x, up, self.routing, save=True, tile=tile)
        if kind == "forward":
            more = {"scatter": True, "slot_weight": self.weight}
            return grouped.matmul(self.hidden, down, self.routing, tile=tile, **more)
        if kind == APART:
            return grouped.gradients_apart(self.x, down, self.routing, self.weight, self.gate_up, tile=tile)
        if kind == "gated_backward":
            return grouped.gated_backward(self.x, down, self.routing, self.weight, self.gate_up, tile=tile)
        return grouped.matmul(self.gate_up, up, self.routing, over_columns=False, scatter=True, tile=tile)


class Layer:
    """A dense layer in NF4 with its adapter."""

    def __init__(self, out: int, wide: int) -> None:
        matrix = torch.randn(out, wide, device="cuda", dtype=torch.bfloat16) * 0.02
        self.weight = nf4.with_float_scales(nf4.quantize(matrix))
        self.a = torch.randn(RANK, wide, device="cuda") * 0.02
        self.b = torch.randn(out, RANK, device="cuda") * 0.02

    def batch(self, rows: int) -> None:
        out, wide = self.weight.shape
        self.x = torch.randn(rows, wide, device="cuda", dtype=torch.bfloat16)
        self.d_out = torch.randn(rows, out, device="cuda", dtype=torch.bfloat16)

    def call(self, forward: bool, tile: Tile) -> Any:
        x, first, second = (self.x, self.a, self.b) if forward else (self.d_out, self.b, self.a)
        if tile == TORCH:
            return linear.by_torch(x, self.weight, first, second, 1.0, None, over_columns=forward)
        return linear.product(x, self.weight, first, second, 1.0, None, over_columns=forward, tile=tile)


def jobs(parts: list[str], blocks: list[int]) -> Iterator[tuple[Any, ...]]:
    """(part, what, packed, row block, tile)"""
    for block in blocks:
        if "experts" in parts and block in TOKENS:
            yield "experts", DECODE, True, block, TORCH
            for packed, kind in itertools.product((True, False), KINDS):
                for tile in dict.fromkeys(tiles(block, kind, nf4=packed)):
                    yield "experts", kind, packed, block, tile
                    if kind == "backward" and block > FEW:
                        yield "experts", APART, packed, block, tile
        if "linear" in parts and block in ROWS:
            for forward in (True, False):
                for tile in (*dict.fromkeys(linear_tiles(block, along=forward)), TORCH):
                    yield "linear", forward, True, block, tile


def named(part: str, what: Any, packed: bool, block: int, tile: Tile) -> str:
    """`experts backward nf4 384 (128,64,64,4,3,turned,tail 32)`"""
    way = what if isinstance(what, str) else "forward" if what else "backward"
    return f"{part} {way} {'nf4' if packed else '16 bit'} {block} {_tile(asdict(tile))}"


def compile_share(share: list[tuple[Any, ...]]) -> None:
    """Fill Triton's cache: small weights and batches, the same specialisation. What does not compile is met again."""
    experts, layer = Experts(TOP_K), Layer(128, 256)
    experts.batch(8, TOP_K)
    for part, what, flag, rows, tile in share:
        try:
            if part == "experts":
                experts.call(what, flag, tile)
            else:
                layer.batch(rows)
                layer.call(what, tile)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{part} {what} {tile}: {str(error)[:80]}", file=sys.stderr)


def measure(parts: list[str], planned: list[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """A row a candidate and size."""
    if "experts" in parts:
        experts = Experts(EXPERTS)
        for rows in dict.fromkeys(job[3] for job in planned if job[0] == "experts"):
            for tokens in TOKENS[rows]:
                experts.batch(tokens, EXPERTS)
                for part, what, flag, block, tile in planned:
                    if (part, block) == ("experts", rows):
                        yield _row(part, what, flag, tokens, tile, partial(experts.call, what, flag, tile))
        del experts
    for out, wide in LINEARS if "linear" in parts else ():
        layer = Layer(out, wide)
        for rows, batches in ROWS.items():
            for tokens in batches:
                layer.batch(tokens)
                for part, what, flag, block, tile in planned:
                    if (part, block) == ("linear", rows):
                        found = _row(part, what, flag, tokens, tile, partial(layer.call, what, tile))
                        yield {**found, "shape": [out, wide]}


def _row(part: str, what: Any, flag: bool, tokens: int, tile: Tile, call: Callable[[], Any]) -> dict[str, Any]:
    name = what if part == "experts" else "forward" if what else "backward"
    row = {
        "part": part,
        "kind": name,
        "nf4": flag,
        "rows": tokens,
        "tile": asdict(tile),
    }
    try:
        return {**row, "seconds": device_seconds(call)}
    except Exception as error:
        torch.cuda.synchronize()
        return {**row, "seconds": None, "error": str(error)[:120]}


def choices(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The best tiles of each size, beside how much worse the next are."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["seconds"]:
            key = (row["part"], row["kind"], "nf4" if row["nf4"] else "16 bit", *row.get("shape", ()), row["rows"])
            groups.setdefault(key, []).append(row)
    for key, group in groups.items():
        best = sorted(group, key=lambda row: float(row["seconds"]))[:3]
        told = " | ".join(f"{1e3 * row['seconds']:.3f} {_tile(row['tile'])}" for row in best)
        yield f"{' '.join(map(str, key)):<44} {told}"


def _tile(tile: dict[str, Any]) -> str:
    if tile == asdict(TORCH):
        return "(decoded once, torch)"
    sizes = ",".join(str(tile[name]) for name in ("m", "n", "k", "warps", "stages"))
    more = [name for name in ("turned", "pairs") if tile[name]]
    more += [f"tail {tile['tail']}"] if tile["tail"] else []
    return f"({','.join([sizes, *more])})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="experts,linear")
    parser.add_argument("--blocks", default="16,32,64,96,128,288,384", help="row blocks")
    parser.add_argument("--commit", default="", help="of the tree, where it is no repository")
    parser.add_argument("--match", default="", metavar="REGEX", help="of candidates as the choices name them")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("a GPU is needed: what is timed here is the device alone")
    parts, begun = arguments.only.split(","), time.monotonic()
    blocks = [int(block) for block in arguments.blocks.split(",")]
    todo = [job for job in jobs(parts, blocks) if re.search(arguments.match, named(*job))]
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=compile_share, args=(todo[first :: arguments.workers],))
        for first in range(arguments.workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"{len(todo)} kernels compiled in {time.monotonic() - begun:.0f} s", file=sys.stderr)
    card = torch.cuda.get_device_properties(0)
    rows: list[dict[str, Any]] = []
    again: list[str] = []

    def told(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            again.append(src.name)

    triton.knobs.compilation.listener = told
    record = {
        "card": {"name": card.name, "arch": getattr(card, "gcnArchName", f"sm_{card.major}{card.minor}")},
        "versions": {name: version(name) for name in ("torch", "triton")},
        "commit": arguments.commit,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": rows,
    }
    for row in measure(parts, todo):
        rows.append(row)
        if arguments.out and len(rows) % SAVED_EVERY == 0:  # it takes minutes, and may be ended before
            arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            spent = time.monotonic() - begun
            print(f"{len(rows)} of {len(todo)} after {spent:.0f} s; {len(again)} compiled again", file=sys.stderr)
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(*choices(rows), sep="\n")
    print(f"{card.name}: {len(rows)} timed in {time.monotonic() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
