"""Attention on the GPU that is here, by the workload's own code: the seed's grid and a few longer cases.

    python benchmarks/attention.py --out attention.json

The recipe `bench-attention` without the host side: needs torch and this folder's parent, nothing else. Takes about
three minutes on an H100. Each implementation proves itself in a process of its own, then those that are right are
timed interleaved; see radeon_stack/workloads/bench.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

from radeon_stack.figures import Case, case_label, figure_line  # noqa: E402
from radeon_stack.workloads.bench.attention import SUITE  # noqa: E402
from radeon_stack.workloads.bench.race import (  # noqa: E402
    Figure,
    Settings,
    as_record,
    chosen,
    look,
    race,
    with_clocks_after,
)

BUDGET = {"seconds": 0.2, "least": 7, "most": 50, "warmup": 3, "warmup_seconds": 0.05}
NAMES = ("dtype", "batch", "seq", "heads", "kv_heads", "head_dim", "causal", "varlen")
SMALL = (("float32", 1, 64, 4, 2, 32, True, False), ("bfloat16", 2, 96, 4, 4, 32, True, True))  # for a CPU
LONG = (
    ("bfloat16", 4, 2048, 32, 8, 128, True, False),  # Llama-8B's in benchmarks/train_speed.py
    ("bfloat16", 1, 4096, 32, 8, 128, True, False),
    ("bfloat16", 1, 16384, 32, 8, 128, True, False),
    ("bfloat16", 1, 4096, 32, 32, 64, True, False),
    ("bfloat16", 1, 4096, 16, 16, 256, True, False),
    ("bfloat16", 1, 8192, 32, 8, 128, True, True),
)


def seed_grid() -> Iterator[Case]:
    for dtype, batch, seq in product(("float16", "bfloat16"), (1, 4), (128, 2048)):
        yield case(dtype, batch, seq, 32, 32, 128, False, False)


def case(*values: str | int | bool) -> Case:
    return dict(zip(NAMES, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "attention.json")
    parser.add_argument("--cases", choices=["all", "seed", "long", "small"], default="all")
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--seconds", type=float, default=BUDGET["seconds"], help="of each implementation and phase")
    parser.add_argument("--commit", help="where this folder is no repository")
    arguments = parser.parse_args()
    cases: list[Case] = []
    if arguments.cases == "small":
        cases = [case(*values) for values in SMALL]
    if arguments.cases in ("all", "seed"):
        cases += seed_grid()
    if arguments.cases in ("all", "long"):
        cases += (case(*values) for values in LONG)

    begun = time.monotonic()
    settings = Settings(budget={**BUDGET, "seconds": arguments.seconds})
    names = chosen([SUITE], arguments.implementations)[SUITE.name]
    ground = look(settings, list(dict.fromkeys(SUITE.dtype(one) for one in cases)))

    def tell(figure: Figure) -> None:
        print(figure_line(figure.case, figure.implementation, figure.state, figure.values, figure.note), flush=True)

    def progress(stage: str, done: int, total: int, note: str) -> None:
        print(f"[{time.monotonic() - begun:5.0f} s] {stage} {done}/{total} {note}", file=sys.stderr, flush=True)

    figures = race(SUITE, cases, names, settings, ground, tell=tell, progress=progress)
    record = as_record(with_clocks_after(ground, settings), figures)
    record["card"]["commit"] = record["card"]["commit"] or arguments.commit
    record["settings"] = {"budget": dict(settings.budget), "flush": settings.flush, "graph": settings.graph}
    record["seconds"] = round(time.monotonic() - begun, 1)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print_table(figures)
    card, floor = record["card"], record["floor"]
    rates = ", ".join(f"{name} {rate / 1e12:.1f} TFLOP/s" for name, rate in floor["matrix"].items())
    print(f"\n{card['name']} ({card['arch']}), torch {card['torch']}, triton {card['triton']}, driver {card['driver']}")
    print(f"floor: {floor['bandwidth'] / 1e9:.0f} GB/s, {rates}; {record['seconds']} s; {arguments.out}")


def print_table(figures: list[Figure]) -> None:
    """The figures again, in the order of cases; what is not there last and short."""
    for figure in figures:
        if figure.state == "ok":
            print(figure_line(figure.case, figure.implementation, figure.state, figure.values))
    for figure in figures:
        if figure.state != "ok":
            print(f"{case_label(figure.case)} | {figure.implementation} | {figure.state}: {figure.note[:100]}")


if __name__ == "__main__":
    main()
