"""What the host takes of a router's and an NF4 layer's step, on the GPU that is here: why so little is the device's.

    PYTHONPATH=. python benchmarks/host_time.py [--out FILE] [--commit HASH]

Wall time of a call, the device being idle before it and not waited for: microseconds, median and least of many.
`nothing` is an autograd function that hands its input on: what a way back costs before it does anything. torch goes
back in a thread of its own; `here` is the same in the calling one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # in the place of this folder: its file names are none of a library's business
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from radeon_stack.kernels import nf4  # noqa: E402
from radeon_stack.kernels.linear import nf4_linear  # noqa: E402
from radeon_stack.kernels.router import gate  # noqa: E402

TOKENS, WIDTH, EXPERTS, TOP_K, RANK = 512, 2048, 128, 8, 64
LAYERS = ((4096, 4096), (4096, 14336), (14336, 4096))  # (out, in)
ROWS = (512, 1024)
WARM_UP, SAMPLES = 20, 200


class Nothing(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        return d_out


def transformers_router(x: Tensor, matrix: Tensor) -> Tensor:
    """As its Qwen3-MoE has it."""
    logits = torch.nn.functional.linear(x, matrix)
    weight, _ = torch.topk(torch.softmax(logits, -1, dtype=torch.float32), TOP_K, -1)
    return (weight / weight.sum(-1, keepdim=True)).to(logits.dtype)


def there_and_back(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], d_out: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(forward(), leaves, d_out)


def microseconds(call: Callable[[], Any]) -> dict[str, float]:
    for _ in range(WARM_UP):
        call()
    spent = []
    for _ in range(SAMPLES):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        spent.append(1e6 * (time.perf_counter() - begun))
    return {"median": statistics.median(spent), "least": min(spent)}


def calls() -> dict[str, Callable[[], Any]]:
    half: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x, matrix = torch.randn(TOKENS, WIDTH, **half, requires_grad=True), torch.randn(EXPERTS, WIDTH, **half)
    d_x, d_weight = torch.randn(TOKENS, WIDTH, **half), torch.randn(TOKENS, TOP_K, **half)
    found = {
        "nothing": there_and_back(lambda: Nothing.apply(x), (x,), d_x),
        "router, ours": there_and_back(lambda: gate(x, matrix, TOP_K)[0], (x,), d_weight),
        "router, transformers": there_and_back(lambda: transformers_router(x, matrix), (x,), d_weight),
    }
    for out, wide in LAYERS:
        weight = nf4.with_float_scales(nf4.quantize(torch.randn(out, wide, **half) * 0.02))
        a = torch.randn(RANK, wide, device="cuda", requires_grad=True)
        b = torch.randn(out, RANK, device="cuda", requires_grad=True)
        for rows in ROWS:
            y, d_y = torch.randn(rows, wide, **half, requires_grad=True), torch.randn(rows, out, **half)
            layer = partial(nf4_linear, y, weight, a, b)
            found[f"NF4 layer {out} × {wide}, {rows} rows"] = there_and_back(layer, (y, a, b), d_y)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="", help="of the tree, where it is no repository")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("a GPU is needed: a CPU computes while it is timed")
    rows: list[dict[str, Any]] = []
    for name, call in calls().items():
        with torch.autograd.set_multithreading_enabled(True):
            apart = microseconds(call)
        with torch.autograd.set_multithreading_enabled(False):
            here = microseconds(call)
        rows.append({"what": name, "thread": apart, "here": here})
        print(f"{name:<36} {apart['median']:7.1f} µs, here {here['median']:7.1f} µs")
    record = {
        "card": torch.cuda.get_device_name(0),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": arguments.commit,
        "versions": {name: version(name) for name in ("torch", "triton")},
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
