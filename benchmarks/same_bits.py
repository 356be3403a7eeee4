"""Do packed products of experts give the same bits each time, and are all of them written? On the GPU that is here.

    PYTHONPATH=. python benchmarks/same_bits.py [--out FILE] [--commit HASH]

Tiles in use, and three that were tried before (same_bits_before_h200.json): the one of 64 columns gave other sums in
each call, as products read registers that were written over meanwhile (`jit/turned.py`); the other two did so with
their registers bounded to 128, which tiles cannot have any more, and are run here without.

What a call writes is first filled with NaN. Exit 7 where bits differ.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # in the place of this folder: its file names are none of a library's business
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks.tune_kernels import APART, EXPERTS, TOKENS, TOP_K, Experts, compile_share, named  # noqa: E402
from radeon_stack.kernels.configs import TILES, Tile, row_block  # noqa: E402

TRIED = (
    Tile(128, 64, 64, 4, 3, turned=True, tail=32),
    Tile(128, 128, 64, 8, 3, turned=True, tail=32),
    Tile(128, 128, 64, 8, 4, turned=True, tail=32),
)
REPEATS = 40


def jobs() -> Iterator[tuple[str, Any, bool, int, Tile]]:
    """As tune_kernels.py has them: (part, what, packed, row block, tile)."""
    for block in TOKENS:
        for (family, packed, kind), tiles in TILES.items():
            if (family, packed) == ("cuda", True):
                yield "experts", kind, True, block, tiles[row_block(block, tiles)]
                if kind == "backward" and block > 96:
                    yield "experts", APART, True, block, tiles[row_block(block, tiles)]
                    for tile in TRIED:
                        yield "experts", kind, True, block, tile


def results(made: Any) -> list[torch.Tensor]:
    return [one for one in ((made,) if torch.is_tensor(made) else made) if one.numel()]


def different(experts: Experts, kind: Any, tile: Tile) -> tuple[int, int]:
    """(calls of REPEATS that gave other bits than the first, those that left or made NaN)"""
    first = [one.clone() for one in results(experts.call(kind, True, tile))]
    other = undone = 0
    for _ in range(REPEATS):
        poisoned = [one.fill_(float("nan")) for one in results(experts.call(kind, True, tile))]
        del poisoned  # the next call is given the same memory
        again = results(experts.call(kind, True, tile))
        other += not all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
        undone += any(one.isnan().any().item() for one in again)
    return other, undone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="", help="of the tree, where it is no repository")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("a GPU is needed: what is looked at are its bits")
    planned = list(jobs())
    context = multiprocessing.get_context("spawn")
    shares = [planned[first :: arguments.workers] for first in range(arguments.workers)]
    workers = [context.Process(target=compile_share, args=(share,)) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    experts, rows = Experts(EXPERTS), []
    for block, (tokens, *_) in TOKENS.items():
        experts.batch(tokens, EXPERTS)
        for job in planned:
            if job[3] == block:
                other, undone = different(experts, job[1], job[4])
                told = {"different": other, "nan": undone}
                rows.append({"kind": job[1], "tokens": tokens, "tile": asdict(job[4]), **told})
                print(f"{named(*job):<70} {other} of {REPEATS} different, {undone} with NaN")
    record = {
        "card": torch.cuda.get_device_name(0),
        "versions": {name: version(name) for name in ("torch", "triton")},
        "commit": arguments.commit,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "shape": {"experts": EXPERTS, "top_k": TOP_K},
        "repeats": REPEATS,
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 7 if any(row["different"] or row["nan"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
