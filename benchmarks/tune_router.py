"""Times the router with its linear layer, and the sorting of slots, in every form that might serve, on this GPU: what
`kernels/configs.py` should have for it (GATE, GATE_BACK, FEW_SLOTS).

    PYTHONPATH=. python benchmarks/tune_router.py [--out FILE] [--commit HASH]

Sizes are Qwen3-30B-A3B's router: 128 experts of width 2048, top 8. Replays of captured graphs, so the host has nothing
to do with it; microseconds, medians. Beside them `apart`: torch's product and the rest in a launch of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # in the place of this folder: its file names are none of a library's business
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from radeon_stack.kernels import configs, routing  # noqa: E402
from radeon_stack.kernels.jit import router as kernels  # noqa: E402
from radeon_stack.kernels.launch import launch  # noqa: E402
from radeon_stack.kernels.router import _chosen, _d_logits  # noqa: E402
from radeon_stack.kernels.sizes import cdiv  # noqa: E402
from radeon_stack.workloads.bench.timing import Budget, measure  # noqa: E402

EXPERTS, WIDTH, TOP_K = 128, 2048, 8
TOKENS = (128, 512, 1024, 2048, 4096, 8192, 16384)
FORWARD = tuple(itertools.product((16, 32, 64), (64, 128, 256), ((2, 3), (2, 4), (4, 3), (4, 4), (8, 4))))
BACK = tuple(itertools.product((16, 32, 64), (64, 128), ((4, 1), (8, 1)), (128, 256, 512)))
CHUNKS = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 8), (8192, 16))
BUDGET = Budget(seconds=0.02, least=11, most=30, warmup=2, warmup_seconds=0.005)
SHARED = 220e3  # bytes, a little under Hopper's

Row = dict[str, Any]


def microseconds(call: Callable[[], Any]) -> float | None:
    found = measure({"it": call}, device="cuda", budget=BUDGET, graph=True)
    return None if found.failed else round(1e6 * found.times["it"].median, 1)


def forward(tokens: int) -> Row:
    x, matrix, weight, index, logits = tensors(tokens)
    sizes = {"EXPERTS": EXPERTS, "PADDED": EXPERTS, "TOP_K": TOP_K, "TOP_PADDED": 16, "NORMALISE": True}
    tried = []
    for block, step, (warps, stages) in FORWARD:
        if (block + EXPERTS) * step * 2 * stages > SHARED or (warps == 2 and block > 16):
            continue
        constants = {**sizes, "BLOCK_T": block, "BLOCK_K": step}
        arguments = (x, matrix, weight, index, logits, tokens, WIDTH)

        def call(
            constants: Any = constants, programs: int = cdiv(tokens, block), warps: int = warps, stages: int = stages
        ) -> None:
            launch(kernels.gate_forward, (programs, 1, 1), arguments, constants, warps=warps, stages=stages)  # noqa: B023

        tried.append((microseconds(call), block, step, warps, stages))
    apart = microseconds(lambda: _chosen(torch.nn.functional.linear(x, matrix), TOP_K, True))
    return told("forward", tokens, apart, tried)


def back(tokens: int) -> Row:
    x, matrix, weight, index, logits = tensors(tokens)
    d_x = torch.empty_like(x)
    sizes = {"EXPERTS": EXPERTS, "PADDED": EXPERTS, "TOP_K": TOP_K, "NORMALISE": True, "SAVE": False}
    tried = []
    for block, columns, (warps, stages), programs in BACK:
        blocks = cdiv(tokens, block)
        many = columns * cdiv(cdiv(WIDTH, columns), cdiv(programs, blocks))
        constants = {**sizes, "BLOCK_T": block, "BLOCK_N": columns}
        arguments = (logits, index, weight, matrix, d_x, d_x, tokens, WIDTH, many)
        grid = (blocks, cdiv(WIDTH, many), 1)

        def call(
            constants: Any = constants,
            arguments: Any = arguments,
            grid: Any = grid,
            warps: int = warps,
            s: int = stages,
        ) -> None:
            launch(kernels.gate_backward, grid, arguments, constants, warps=warps, stages=s)

        tried.append((microseconds(call), block, columns, warps, stages, programs))
    apart = microseconds(lambda: _d_logits(logits, index, weight, True) @ matrix)
    return told("back", tokens, apart, tried)


def sort(tokens: int) -> Row:
    index = torch.stack([torch.randperm(EXPERTS, device="cuda")[:TOP_K] for _ in range(tokens)])
    own, tried = dict(configs.FEW_SLOTS["cuda"]), []
    for chunk, warps in CHUNKS:
        configs.FEW_SLOTS["cuda"] = {index.numel(): (chunk, warps)}
        tried.append((microseconds(lambda: routing.route(index, EXPERTS)), chunk, warps))
    configs.FEW_SLOTS["cuda"] = {}
    apart = microseconds(lambda: routing.route(index, EXPERTS))
    configs.FEW_SLOTS["cuda"] = own
    return told("sort", tokens, apart, tried)


def tensors(tokens: int) -> tuple[torch.Tensor, ...]:
    half: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x, matrix = torch.randn(tokens, WIDTH, **half), torch.randn(EXPERTS, WIDTH, **half) * WIDTH**-0.5
    logits = torch.nn.functional.linear(x, matrix)
    return x, matrix, *_chosen(logits, TOP_K, True), logits


def told(what: str, tokens: int, apart: float | None, tried: list[tuple[Any, ...]]) -> Row:
    best = sorted((one for one in tried if one[0] is not None), key=lambda one: one[0])
    print(f"{what:<8} {tokens:>6} tokens: apart {apart} µs; {best[:5]}", flush=True)
    return {"what": what, "tokens": tokens, "apart": apart, "tried": best}


def rows() -> Iterator[Row]:
    for kind in (forward, back, sort):
        for tokens in TOKENS:
            yield kind(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="", help="of the tree, where it is no repository")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("a GPU is needed: a CPU has no graphs to replay")
    record: dict[str, Any] = {
        "card": torch.cuda.get_device_name(0),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": arguments.commit,
        "versions": {name: version(name) for name in ("torch", "triton")},
        "columns": {
            "forward": ["µs", "tokens a program", "columns a step", "warps", "stages"],
            "back": ["µs", "tokens a program", "columns at a time", "warps", "stages", "programs at least"],
            "sort": ["µs", "slots at a time", "warps"],
        },
        "rows": list(rows()),
    }
    if arguments.out:
        lines = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in record.pop("rows"))
        head = json.dumps(record, indent=1, ensure_ascii=False)[:-2]
        arguments.out.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
