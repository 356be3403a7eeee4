"""What Liger's Triton kernels compile to for AMD GPUs: `python tools/liger_audit.py`. Compiled, not run.

liger-kernel (the extra `dev`) is called as it is for a batch of 4 × 2048 tokens in bf16, at sizes of Llama 3 and
Gemma 2, with tensors that have no memory, under each triton of docker/locks. Every kernel that it would launch is
compiled with the block and warps that it chose. Writes benchmarks/liger_audit.json, which docs/kernels.md is made from.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from radeon_stack import atomic
from radeon_stack.errors import StackError
from radeon_stack.kernels.audit.apart import NoResultError, call_apart
from radeon_stack.kernels.audit.findings import judge
from radeon_stack.kernels.audit.recorded import Launch, recorded
from radeon_stack.kernels.variant import Variant

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("gfx1201", "gfx1100")
TOKENS, HEAD, KV_HEADS = 4 * 2048, 128, 8
# Hidden size → intermediate size: of Llama 3.2 1B, 3.1 8B, Gemma 2 27B (the widest MLP of its hidden size), 3.1 70B.
MLP = {2048: 8192, 4096: 14336, 4608: 36864, 8192: 28672}
PASSES = ("forward", "backward")
KEPT = ("vgprs", "sgprs", "vgpr_spills", "sgpr_spills", "scratch", "lds", "waves_per_simd")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the environments with triton are made, and found again")
    parser.add_argument("--inside", type=Path, metavar="PACKAGES", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        sys.path.append(str(arguments.inside))
        print(json.dumps(list(rows())))
        return 0
    from tritons import in_each_triton

    script = [__file__, "--inside", str(_packages("liger_kernel"))]
    try:
        found = in_each_triton(arguments.folder, _packages("torch"), script)
    except StackError as error:
        print(f"radeon-stack: {error}", file=sys.stderr)
        return error.exit_code
    record = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "liger_kernel": version("liger-kernel"),
        "shape": {"tokens": TOKENS, "head_dim": HEAD, "key_value_heads": KV_HEADS, "dtype": "bf16"},
        "triton": found,
    }
    atomic.write_text(ROOT / "benchmarks/liger_audit.json", _by_rows(record))
    return 0


def _by_rows(record: dict[str, Any]) -> str:
    """JSON with one line for each row, so that a change shows as a line."""
    head = json.dumps({name: value for name, value in record.items() if name != "triton"}, indent=1)
    found = [
        f'  "{one}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
        for one, rows in record["triton"].items()
    ]
    return head.removesuffix("\n}") + ',\n "triton": {\n' + ",\n".join(found) + "\n }\n}\n"


def _packages(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"radeon-stack: {name} is not installed: make setup")
    return Path(spec.origin).parent.parent


def rows() -> Iterator[dict[str, Any]]:
    """One for each kernel of each call, in the triton that is imported here."""
    cases = [(arch, hidden, name) for arch in ARCHS for hidden in MLP for name in _calls(hidden)]
    with tempfile.TemporaryDirectory() as cache:
        results = dict(call_apart([partial(_case, cache, *case) for case in cases], at_once=2, seconds=300))
    for index, (arch, hidden, name) in enumerate(cases):
        told = {"call": name, "gfx": arch, "hidden": hidden, "columns": MLP[hidden]}
        result = results[index]
        if isinstance(result, NoResultError):
            yield told | {"error": str(result)[:600]}
        else:
            yield from (told | row for row in result)


def _case(cache: str, arch: str, hidden: int, name: str) -> list[dict[str, Any]]:
    os.environ["TRITON_CACHE_DIR"] = cache  # of this process, which does nothing else
    with recorded(arch) as launches:
        _calls(hidden)[name]()
    return [{"pass": which} | _row(launch, arch) for which, launch in zip(PASSES, launches, strict=True)]


def _row(launch: Launch, arch: str) -> dict[str, Any]:
    row = judge(Variant(launch.kernel, None, {}, {}, 0, 0, dot=False, default=True), arch, launch.compiled).as_json()
    return {
        "kernel": launch.kernel,
        "warps": launch.options["num_warps"],
        "block": launch.sizes["BLOCK_SIZE"],
        **{name: row[name] for name in KEPT},
        "findings": list(row["findings"]),
    }


def _calls(hidden: int) -> dict[str, Callable[[], Any]]:
    """What a layer of this hidden size launches, forward and backward; its weights are frozen, as under LoRA."""
    import torch
    from liger_kernel.ops import geglu, rms_norm, rope, swiglu, utils

    # Warps of the widest rows depend on it, and torch is a CPU's here.
    for module in (utils, rms_norm):
        vars(module).update(is_hip=lambda: True)
    like = partial(torch.empty, dtype=torch.bfloat16, device="meta")

    def norm(tokens: int, width: int, casting: str, offset: float) -> None:
        x, weight = like(tokens, width), like(width)
        _, x, scales, block, warps, mode = rms_norm.rms_norm_forward(x, weight, 1e-6, offset, casting, None)
        told = (weight, scales, offset, mode, block, warps, casting == "llama", None)
        rms_norm.rms_norm_backward(like(tokens, width), x, *told, needs_dw=False)

    def rotate() -> None:
        batch, heads = 4, hidden // HEAD
        q, k = (like(batch, TOKENS // batch, count, HEAD).transpose(1, 2) for count in (heads, KV_HEADS))
        angles = like(1, TOKENS // batch, HEAD)
        rope.rope_forward(q, k, angles, angles)
        rope.rope_backward(q, k, angles, angles)

    def gate(forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        a, b, out = (like(TOKENS, MLP[hidden]) for _ in range(3))
        forward(a, b)
        backward(a, b, out)

    return {
        "RMSNorm": lambda: norm(TOKENS, hidden, "llama", 0.0),
        "RMSNorm, Gemma's": lambda: norm(TOKENS, hidden, "gemma", 1.0),
        "RMSNorm of heads": lambda: norm(TOKENS * hidden // HEAD, HEAD, "llama", 0.0),
        "RoPE": rotate,
        "SwiGLU": lambda: gate(swiglu.swiglu_forward, swiglu.swiglu_backward),
        "GeGLU": lambda: gate(geglu.geglu_forward, geglu.geglu_backward),
    }


if __name__ == "__main__":
    sys.exit(main())
