"""Audit Triton kernels for AMD GPUs on a machine that has none: compiled, not run.

  python -m radeon_stack.kernels.audit --target gfx1201
  python -m radeon_stack.kernels.audit --all-targets --json audit.json
  python -m radeon_stack.kernels.audit --target gfx1201 --warm FOLDER   # then TRITON_CACHE_DIR=FOLDER

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
    begun = time.monotonic()
    if arguments.warm:
        arguments.warm.mkdir(parents=True, exist_ok=True)
        rows = _run(arguments, targets, arguments.warm)
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = _run(arguments, targets, arguments.cache or Path(folder))
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
    return _tell(record)


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
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="Triton's cache; else a temporary one")
    parser.add_argument("--warm", type=Path, metavar="FOLDER", help="compile the defaults alone, into this cache")
    parser.add_argument(
        "--from", dest="module", default=KERNELS, metavar="MODULE", help=f"of variants(arch); {KERNELS}"
    )
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="processes that compile (2)")
    return parser


def _run(arguments: argparse.Namespace, targets: list[str], cache: Path) -> list[Row]:
    from radeon_stack.kernels.audit.auditing import audit_variants

    rows = []
    for row in audit_variants(
        importlib.import_module(arguments.module).variants,
        targets,
        cache,
        only=arguments.only,
        keep=(lambda variant: variant.default) if arguments.warm else (lambda variant: True),
        at_once=arguments.at_once,
    ):
        mark = "✗" if row.findings else "✓"
        print(f"{mark} {row.arch} {row.name} {row.seconds:.1f} s", file=sys.stderr, flush=True)
        rows.append(row)
    order = {arch: place for place, arch in enumerate(targets)}
    return sorted(rows, key=lambda row: (row.name, order[row.arch]))


def _tell(record: dict[str, Any]) -> int:
    rows = record["rows"]
    failed = [row for row in rows if row["findings"]]
    print(text_table(rows))
    print(f"\ntriton {record['triton']}: {len(rows)} in {record['seconds']} s, compiled, not run")
    if failed:
        first = failed[0]
        what = f"{first['arch']} {first['name']}: {first['findings'][0]}"
        return _fail(Exit.CHECK, f"{len(failed)} of {len(rows)} do not hold; {what}")
    return Exit.OK


def _fail(code: Exit, what: str) -> int:
    print(f"radeon-stack: {what}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
