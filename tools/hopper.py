"""Looks at packed products as NVIDIA's assembler makes them for Hopper: `python tools/hopper.py`. Compiled, not run.

Decoded values go from registers to the matrix units (kernels/jit/turned.py). Exit 7 when a loop writes such a register
before the product that reads it has ended: its sums would be wrong where a multiprocessor has more to do than it had
when they were looked at. Compiled are those without adapters, with scales in float32.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from sass import products_of_registers, written_while_read
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from radeon_stack.errors import Exit
from radeon_stack.kernels.configs import TILES, Kind, Tile
from radeon_stack.kernels.jit import turned, weights
from radeon_stack.kernels.nf4 import NF4, decoding
from radeon_stack.kernels.variant import Variant
from radeon_stack.kernels.variants import packed_product

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
K = 768  # of Qwen3-30B-A3B's experts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="of names, as the table has them")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--unawaited", action="store_true", help="let products run on into the next step, as a trial")
    arguments = parser.parse_args()
    if arguments.unawaited:
        turned._awaited = running_on
    rows = []
    for name, variant in products():
        if re.search(arguments.only, name):
            rows.append({"name": name, **look(variant)})
            if not arguments.json:
                print("{name:<34} {registers:>4} registers {stack:>4} bytes spilled".format(**rows[-1]), end="  ")
                print(*rows[-1]["overwritten"][:1] or ["nothing overwritten"], flush=True)
    if arguments.json:
        print(json.dumps({"triton": triton.__version__, "rows": rows}))
    return Exit.CHECK if any(row["overwritten"] for row in rows) else 0


@triton.jit
def running_on(acc, NF4: triton.language.constexpr):  # noqa: N803
    return acc


def products() -> Iterator[tuple[str, Variant]]:
    """Of experts, with all tiles that CUDA's launches use: (name, what is compiled)."""
    for (family, nf4, kind), tiles in TILES.items():
        for rows, tile in tiles.items():
            if (family, nf4, tile.turned) == ("cuda", True, True):
                yield f"experts {kind} nf4 rows {rows}", hoppers(kind, tile)


def hoppers(kind: Kind, tile: Tile) -> Variant:
    """A product as launches on CUDA have it."""
    variant = packed_product(kind, tile)
    packed = NF4(*(torch.empty(16, dtype=torch.uint8),) * 3, torch.Size((1, 1)), torch.bfloat16)
    width = 2 * tile.n if kind == "gated_forward" else tile.n
    constants = decoding(packed, tile, K, width, over_columns=kind in ("gated_forward", "forward"))
    return replace(variant, constexprs={**variant.constexprs, "NF4": weights.SHUFFLE.value, **constants})


def look(variant: Variant) -> dict[str, Any]:
    """Its registers, bytes that it spills, products that read registers, and what is overwritten of these."""
    place = {parameter: number for number, parameter in enumerate(variant.kernel.arg_names)}
    source = ASTSource(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs={(place[name],): value for name, value in variant.constexprs.items()},
        attrs={(place[name],): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": variant.fp_fusion}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(triton.compile(source, target=HOPPER, options=options).asm["cubin"])
        cubin.flush()
        resources = _told("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _told("nvdisasm", "-c", cubin.name)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", resources)[0]
    told = {"registers": int(registers), "stack": int(stack), "products": products_of_registers(sass)}
    return {**told, "overwritten": written_while_read(sass)}


def _told(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
