"""What flash-attn's Triton kernels for AMD compile to for gfx1201: `python tools/flash_attn_audit.py SDIST`.

SDIST is the unpacked source package (flash_attn-2.8.3.post2). Its own host code is called at the shape of a benchmark
(batch 4, 2048 tokens, 32 heads of 128, bf16; not causal and causal) with tensors that have no memory, under each
triton of docker/locks. Every kernel that it would launch is compiled with the blocks and options it chose, and none is
run. Writes benchmarks/flash_attn_audit.json, which docs/kernels.md is made from. Needs torch in this environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from radeon_stack import atomic
from radeon_stack.errors import StackError
from radeon_stack.kernels.audit.apart import NoResultError, call_apart
from radeon_stack.kernels.audit.assembly import inner_loops
from radeon_stack.kernels.audit.findings import judge
from radeon_stack.kernels.audit.recorded import Launch, recorded
from radeon_stack.kernels.variant import Variant

ROOT = Path(__file__).resolve().parent.parent
ARCH = "gfx1201"
BATCH, TOKENS, HEADS, DIM = 4, 2048, 32, 128
PACKAGE = "flash_attn_triton_amd"
FORWARD, SPLIT = "forward", "backward, split"
AUTOTUNE = {"FLASH_ATTENTION_TRITON_AMD_AUTOTUNE": "1"}
# What is called, for which GPU, in which environment, and what is changed of flash-attn's own choice.
CASES: tuple[tuple[str, str, Mapping[str, str], Mapping[str, Any]], ...] = (
    (FORWARD, ARCH, {}, {}),
    ("forward, autotuned", ARCH, AUTOTUNE, {}),
    (SPLIT, ARCH, {}, {}),
    ("backward, fused", ARCH, {}, {}),
    ("backward, one kernel", ARCH, {}, {}),
    ("backward, older", ARCH, {}, {}),
    (SPLIT, ARCH, {}, {"num_warps": 8}),
    (SPLIT, ARCH, {}, {"num_warps": 16}),
    (SPLIT, "gfx942", {}, {}),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path)
    parser.add_argument("--folder", type=Path, help="where the environments with triton are made, and found again")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.sdist / "flash_attn" / PACKAGE).is_dir():
        sys.exit(f"radeon-stack: {arguments.sdist} has no flash_attn/{PACKAGE}")
    if arguments.inside:
        print(json.dumps(list(rows(arguments.sdist))))
        return 0
    from tritons import in_each_triton

    site = Path(importlib.import_module("torch").__file__ or "").parent.parent
    try:
        found = in_each_triton(arguments.folder, site, [__file__, str(arguments.sdist), "--inside"])
    except StackError as error:
        print(f"radeon-stack: {error}", file=sys.stderr)
        return error.exit_code
    record = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "flash_attn": _version(arguments.sdist),
        "shape": {"batch": BATCH, "tokens": TOKENS, "heads": HEADS, "head_dim": DIM, "dtype": "bf16"},
        "triton": found,
    }
    atomic.write_text(ROOT / "benchmarks/flash_attn_audit.json", json.dumps(record, indent=1) + "\n")
    return 0


def rows(sdist: Path) -> Iterator[dict[str, Any]]:
    """One for each kernel of each case, in the triton that is imported here."""
    cases = [(*case, causal) for case in CASES for causal in (False, True)]
    with tempfile.TemporaryDirectory() as cache:
        calls = [partial(_case, sdist, cache, *case) for case in cases]
        results = dict(call_apart(calls, at_once=2, seconds=600))
    for index, (name, arch, _, change, causal) in enumerate(cases):
        told = {"case": name, "gfx": arch, "causal": causal, "changed": dict(change)}
        result = results[index]
        if isinstance(result, NoResultError):
            yield told | {"error": str(result)[:600]}
        else:
            yield from (told | row for row in result)


def _case(
    sdist: Path,
    cache: str,
    name: str,
    arch: str,
    environment: Mapping[str, str],
    change: Mapping[str, Any],
    causal: bool,
) -> list[dict[str, Any]]:
    os.environ.update(environment, TRITON_CACHE_DIR=cache)  # of this process, which does nothing else
    sys.path.insert(0, str(sdist / "flash_attn"))
    with recorded(arch, change) as launches:
        _calls()[name](causal)
    return [_row(launch, arch) for launch in launches]


def _row(launch: Launch, arch: str) -> dict[str, Any]:
    dot = "tt.dot" in launch.compiled.ttgir
    row = judge(Variant(launch.kernel, None, {}, {}, 0, 0, dot=dot, default=True), arch, launch.compiled).as_json()
    kept = ("matrix", "vgprs", "sgprs", "vgpr_spills", "sgpr_spills", "scratch", "lds", "waves_per_simd", "dots")
    return {
        "kernel": launch.kernel,
        "options": dict(launch.options),
        "blocks": {name: size for name, size in launch.sizes.items() if "BLOCK_" in name and "DMODEL" not in name},
        "workgroups": list(launch.grid),
        **{name: row[name] for name in kept},
        "atomics": row["atomics"],
        "loops": [dataclasses.asdict(loop) for loop in inner_loops(launch.compiled.assembly)],
        "findings": list(row["findings"]),
    }


def _calls() -> dict[str, Callable[[bool], Any]]:
    """flash-attn's own functions as its interface calls them, without memory behind the tensors."""
    torch = importlib.import_module("torch")
    shape = (BATCH, TOKENS, HEADS, DIM)
    q, k, v, out, dout, dq, dk, dv = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(8))
    lse = torch.empty((BATCH, HEADS, TOKENS), dtype=torch.float32, device="meta")
    gradients = (dout, q, k, v, out, lse, dq, dk, dv, DIM**-0.5, None)
    lengths = (TOKENS, TOKENS)
    none = (None, None)

    def forward(causal: bool) -> Any:
        told = (DIM**-0.5, None, causal, None, "bshd", None, None, *lengths, None, None, 0.0, None, None, False, False)
        call = _module("fwd_prefill").attention_prefill_forward_triton_impl
        return call(q, k, v, out, *told, *none, *none)

    def split(causal: bool) -> Any:
        call = _module("bwd_prefill_split").attention_prefill_backward_triton_split_impl
        return call(*gradients, causal, "bshd", *none, *none, 0.0, *none, False, *none, *none, *none, *none)

    def fused(causal: bool) -> Any:
        call = _module("bwd_prefill_fused")._flash_attn_backward
        return call(*gradients, causal, *none, *lengths, 0.0, *none, *none, *none, True)

    def one(causal: bool) -> Any:
        call = _module("bwd_prefill_onekernel").attention_prefill_backward_triton_split_oneKernel_impl
        return call(*gradients, causal, "bshd", *none, *none, 0.0, *none, False)

    def older(causal: bool) -> Any:
        call = _module("bwd_prefill").attention_prefill_backward_triton_impl
        return call(*gradients, causal, "bshd", *none, *lengths, 0.0, *none, False)

    return {
        FORWARD: forward,
        "forward, autotuned": forward,
        SPLIT: split,
        "backward, fused": fused,
        "backward, one kernel": one,
        "backward, older": older,
    }


def _module(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{name}")


def _version(sdist: Path) -> str:
    found = re.search(r"^Version: (\S+)$", (sdist / "PKG-INFO").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "unknown"


if __name__ == "__main__":
    sys.exit(main())
