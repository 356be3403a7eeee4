"""Audit Triton kernels for AMD GPUs on a machine that has none: compiled, not run.

  python -m radeon_stack.kernels.audit --target gfx1201
  python -m radeon_stack.kernels.audit --all-targets --json audit.json
  python -m radeon_stack.kernels.audit --all-targets --known benchmarks/kernels_audit.json

With --known only what that record has not yet is compiled, and of what it has a sample, to see whether it tells true.

Exit 7 when a dot has no matrix instructions, a default configuration spills, a workgroup needs more than 64 KiB of
LDS, something does not compile, or the record is wrong; 3 when triton is missing. Marked °: not a default
configuration, where spills are told and no more.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from radeon_stack import atomic
from radeon_stack.errors import Exit
from radeon_stack.kernels.audit.auditing import Pair, Variants, audit_pairs, chosen
from radeon_stack.kernels.audit.chips import CHIPS
from radeon_stack.kernels.audit.known import sample, taken, trusted, untrue
from radeon_stack.kernels.audit.table import text_table

KERNELS = "radeon_stack.kernels.variants"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    targets = list(CHIPS) if arguments.all_targets else arguments.target
    if not targets:
        return _fail(Exit.USAGE, "no target: --target gfx1201, or --all-targets")
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off"):
        return _fail(Exit.USAGE, "TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default, said: it counts in a digest
    try:
        import triton
    except ModuleNotFoundError:
        return _fail(Exit.MACHINE, "triton is not installed; pip install triton, no GPU is needed")
    try:
        variants: Variants = importlib.import_module(arguments.module).variants
    except ImportError as error:
        return _fail(Exit.USAGE, f"{arguments.module} cannot be imported: {error}; kernels may import triton alone")
    begun = time.monotonic()
    pairs = chosen(variants, targets, arguments.only)
    if not pairs:
        return _fail(Exit.USAGE, f"no kernel's name contains or matches {arguments.only!r}")
    try:
        known = _known(arguments.known, triton.__version__)
    except (OSError, ValueError, KeyError) as error:
        return _fail(Exit.USAGE, f"{arguments.known} is no record of an audit: {type(error).__name__}: {error}")
    again = sample(known.keys() & {pair.digest for pair in pairs}, arguments.seed)
    held = known.keys() - again
    new = [pair for pair in pairs if pair.digest not in held]
    with tempfile.TemporaryDirectory() as folder:
        compiled = _compile(new, arguments.cache or Path(folder), arguments.at_once)
    wrong = [
        f"{row['arch']} {row['name']}: {'; '.join(differences)}"
        for row in compiled
        if row["digest"] in again and (differences := untrue(known[row["digest"]], row))
    ]
    old = [taken(known[pair.digest]) for pair in pairs if pair.digest in held]
    record = {
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(time.monotonic() - begun, 1),
        "targets": targets,
        "taken": len(old),
        "compiled": len(compiled),
        "untrue": wrong,
        "rows": _in_order([*compiled, *old], targets),
    }
    if arguments.json:
        atomic.write_text(arguments.json, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2) if arguments.print_json else _told(record, _in_order(compiled, targets)))
    return _verdict(record)


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
    parser.add_argument("--known", type=Path, metavar="FILE", help="a record, from which is taken what has not changed")
    parser.add_argument(
        "--seed", default=time.strftime("%Y-%m-%d", time.gmtime()), help="of the sample; the day, so that it moves"
    )
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="Triton's cache; else a temporary one")
    parser.add_argument(
        "--from", dest="module", default=KERNELS, metavar="MODULE", help=f"of variants(arch); {KERNELS}"
    )
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="processes that compile (2)")
    return parser


def _known(file: Path | None, version: str) -> dict[str, Mapping[str, Any]]:
    """Of a record of tools/kernels.py, what it has of this triton and can be taken, by digest."""
    tritons = json.loads(file.read_text(encoding="utf-8"))["triton"] if file else {}
    return trusted(tritons[version]["rows"]) if version in tritons else {}


def _compile(pairs: Sequence[Pair], cache: Path, at_once: int) -> list[dict[str, Any]]:
    rows = []
    for row in audit_pairs(pairs, cache, at_once=at_once):
        mark = "✗" if row.findings else "✓"
        print(f"{mark} {row.arch} {row.name} {row.seconds:.1f} s", file=sys.stderr, flush=True)
        rows.append(row.as_json())
    return rows


def _in_order(rows: Sequence[dict[str, Any]], targets: Sequence[str]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["name"], targets.index(row["arch"])))


def _told(record: Mapping[str, Any], compiled: Sequence[dict[str, Any]]) -> str:
    """What was compiled now, as a table."""
    taken = f"taken from the record: {record['taken']}, " if record["taken"] else ""
    told = f"triton {record['triton']}: {taken}compiled, not run: {record['compiled']}, in {record['seconds']} s"
    return f"{text_table(compiled)}\n\n{told}"


def _verdict(record: Mapping[str, Any]) -> int:
    rows, untrue = record["rows"], record["untrue"]
    failed = [row for row in rows if row["findings"]]
    code: int = Exit.OK
    if failed:
        first = f"{failed[0]['arch']} {failed[0]['name']}: {failed[0]['findings'][0]}"
        code = _fail(Exit.CHECK, f"{len(failed)} of {len(rows)} do not hold; {first}")
    if untrue:
        told = "".join(f"\n  {line}" for line in untrue)
        code = _fail(Exit.CHECK, f"the record is wrong in {len(untrue)} that were compiled again:{told}")
    return code


def _fail(code: Exit, what: str) -> int:
    print(f"radeon-stack: {what}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
