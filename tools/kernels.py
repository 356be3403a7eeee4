"""Audits our Triton kernels for AMD GPUs, with no GPU: `python tools/kernels.py`. Compiled, not run.

Each triton that kernels must compile with (docker/locks/triton-VERSION.txt) is set up by itself, without torch. What is
in benchmarks/kernels_audit.json and has not changed since (kernel, arguments, target, triton, and what is demanded) is
taken from there; with each triton every other kernel, in every configuration for every target, is compiled, and one in
twenty of those that are recorded. Exit 7 when one does not hold, or the record is wrong. With --record the figures
are written there; docs/kernels.md is made from it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tritons import ROOT, TRITONS, python_with_triton, surroundings

from radeon_stack import atomic
from radeon_stack.errors import Exit, StackError
from radeon_stack.kernels.audit.chips import CHIPS
from radeon_stack.kernels.audit.known import recorded

RECORD = ROOT / "benchmarks/kernels_audit.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the environments are made, and found again; else a new one")
    parser.add_argument("--triton", nargs="+", choices=TRITONS, default=list(TRITONS))
    parser.add_argument("--target", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--only", default="*", metavar="PATTERN", help="kernels whose name contains or matches it")
    parser.add_argument("--from", dest="module", metavar="MODULE", help="another module of variants(arch)")
    parser.add_argument("--all", action="store_true", help="compile what is recorded too")
    parser.add_argument("--seed", help="of the sample of what is recorded; else the day")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}; of all, or not at all")
    arguments = parser.parse_args()
    chosen = (arguments.only, arguments.module, {*arguments.target}, {*arguments.triton})
    if arguments.record and chosen != ("*", None, {*CHIPS}, {*TRITONS}):
        parser.error("--record is for every kernel, triton and target")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            ended = [audit(arguments, version, Path(temporary)) for version in arguments.triton]
    except StackError as error:
        print(f"radeon-stack: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.record and any(record["untrue"] for _, record in ended if record):
        print("radeon-stack: nothing is recorded upon a record that is wrong; record all (ALL=1)", file=sys.stderr)
    elif arguments.record and not any(record is None for _, record in ended):
        write([record for _, record in ended if record])
    return max(code for code, _ in ended)


def audit(arguments: argparse.Namespace, version: str, temporary: Path) -> tuple[int, dict[str, Any] | None]:
    """The exit code of the audit with one triton, and its record, if it made one."""
    python = python_with_triton(arguments.folder or temporary, version)
    told = temporary / f"{version}.json"
    command = [str(python), "-m", "radeon_stack.kernels.audit", "--json", str(told), "--only", arguments.only]
    command += ["--target", *arguments.target]
    command += ["--from", arguments.module] if arguments.module else []
    command += ["--known", str(RECORD)] if RECORD.is_file() and not arguments.all else []
    command += ["--seed", arguments.seed] if arguments.seed else []
    code = subprocess.run(command, env=surroundings(), cwd=ROOT, check=False).returncode
    record = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else None
    return code if code >= 0 else Exit.WORKLOAD, record


def write(records: list[dict[str, Any]]) -> None:
    """One line for each row, so that a change shows as a line."""
    lines = ["{", f' "date": "{time.strftime("%Y-%m-%d", time.gmtime())}",', ' "triton": {']
    for place, record in enumerate(records):
        lines.append(f'  "{record["triton"]}": {{"rows": [')
        lines.append(",\n".join(f"   {json.dumps(recorded(row))}" for row in record["rows"]))
        lines.append("  ]}" + ("," if place + 1 < len(records) else ""))
    atomic.write_text(RECORD, "\n".join([*lines, " }", "}"]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
