"""Audit Triton kernels for AMD GPUs on a machine that has none: compiled, not run.

  python -m radeon_stack.kernels.audit --target gfx1201
  python -m radeon_stack.kernels.audit --all-targets --json audit.json

Exit 7 when a dot has no matrix instructions, a default configuration spills, a workgroup needs more than 64 KiB of
LDS, or something does not compile; 3 when triton is missing. Marked °: not a default configuration, where spills are
told and no more.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from radeon_stack import atomic
from radeon_stack.errors import Exit
from radeon_stack.kernels.audit.auditing import Variants, audit_variants
from radeon_stack.kernels.audit.chips import CHIPS
from radeon_stack.kernels.audit.findings import Row
from radeon_stack.kernels.audit.table import text_table

KERNELS = "radeon_stack.kernels.variants"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    targets = list(CHIPS) if arguments.all_targets else arguments.target
    if not targets:
        return _fail(Exit.USAGE, "no target: --target gfx1201, or --all-targets")
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off"):
        return _fail(Exit.USAGE, "TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    try:
        import triton
    except ModuleNotFoundError:
        return _fail(Exit.MACHINE, "triton is not installed; pip install triton, no GPU is needed")
    try:
        variants: Variants = importlib.import_module(arguments.module).variants
    except ImportError as error:
        return _fail(Exit.USAGE, f"{arguments.module} cannot be imported: {error}; kernels may import triton alone")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = _run(arguments, variants, targets, arguments.cache or Path(folder))
    if not rows:
        return _fail(Exit.USAGE, f"no kernel's name contains or matches {arguments.only!r}")
    record = {
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(time.monotonic() - begun, 1),
        "targets": targets,
        "rows": [row.as_json() for row in rows],
    }
    if arguments.json:
        atomic.write_text(arguments.json, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2) if arguments.print_json else _table(record))
    return _verdict(record["rows"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m radeon_stack.kernels.audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", nargs="+", action="extend", choices=CHIPS, default=[], metavar="GFX")
    parser.add_argument("--all-targets", action="store_true", help=" ".join(CHIPS))
    parser.add_argument("--only", default="*", metavar="PATTERN", help="kernels whose name contains or matches it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write versions, date and rows there")
    parser.add_argument("--print-json", action="store_true", help="… or print them, instead of a table")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="Triton's cache; else a temporary one")
    parser.add_argument(
        "--from", dest="module", default=KERNELS, metavar="MODULE", help=f"of variants(arch); {KERNELS}"
    )
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="processes that compile (2)")
    return parser


def _run(arguments: argparse.Namespace, variants: Variants, targets: list[str], cache: Path) -> list[Row]:
    rows = []
    for row in audit_variants(
        variants,
        targets,
        cache,
        only=arguments.only,
        at_once=arguments.at_once,
    ):
        mark = "✗" if row.findings else "✓"
        print(f"{mark} {row.arch} {row.name} {row.seconds:.1f} s", file=sys.stderr, flush=True)
        rows.append(row)
    order = {arch: place for place, arch in enumerate(targets)}
    return sorted(rows, key=lambda row: (row.name, order[row.arch]))


def _table(record: dict[str, Any]) -> str:
    rows = record["rows"]
    told = f"triton {record['triton']}: {len(rows)} in {record['seconds']} s, compiled, not run"
    return f"{text_table(rows)}\n\n{told}"


def _verdict(rows: list[dict[str, Any]]) -> int:
    failed = [row for row in rows if row["findings"]]
    if not failed:
        return Exit.OK
    first = f"{failed[0]['arch']} {failed[0]['name']}: {failed[0]['findings'][0]}"
    return _fail(Exit.CHECK, f"{len(failed)} of {len(rows)} do not hold; {first}")


def _fail(code: Exit, what: str) -> int:
    print(f"radeon-stack: {what}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
