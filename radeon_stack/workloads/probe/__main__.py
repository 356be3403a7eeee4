"""`python -m radeon_stack.workloads.probe ACTION FOLDER`, where FOLDER is /etc/radeon-stack.

`verify` runs every check, writes `verify.json` and `build.json`, and ends with 7 when one does not hold; with --print
it writes nothing and prints what it found. `trim` removes what other archs need.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from radeon_stack.errors import Exit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["verify", "trim"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--on-gpu", action="store_true", help="verify: what needs a GPU too")
    parser.add_argument("--print", action="store_true", help="verify: one JSON object on stdout, nothing written")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if arguments.action == "trim":
        from radeon_stack.workloads.probe.trimming import trim_image

        return trim_image(folder)
    return verify(folder, on_gpu=arguments.on_gpu, printing=arguments.print)


def verify(folder: Path, *, on_gpu: bool, printing: bool) -> int:
    """Run the checks; the outcome of each is told on stderr."""
    from radeon_stack.workloads.probe.checks import run_checks
    from radeon_stack.workloads.probe.record import build_record

    description: dict[str, Any] = json.loads((folder / "image.json").read_text(encoding="utf-8"))
    description["base"] = json.loads((folder / "base.json").read_text(encoding="utf-8"))
    description["on_gpu"] = on_gpu
    outcomes = []
    for outcome in run_checks(description, on_gpu=on_gpu):
        mark = {"ok": "✓", "failed": "✗", "not run": "·"}[outcome.state]
        print(f"verify: {mark} {outcome.name}: {outcome.detail}", file=sys.stderr, flush=True)
        outcomes.append(outcome)
    found = {"on_gpu": on_gpu, "checks": [vars(outcome) for outcome in outcomes]}
    if printing:
        print(json.dumps(found))
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed:
        names = ", ".join(outcome.name for outcome in failed)
        print(f"verify: {len(failed)} of {len(outcomes)} checks failed ({names}): {failed[0].detail}", file=sys.stderr)
        return Exit.CHECK
    if not printing:
        _write(folder / "verify.json", found)
        _write(folder / "build.json", build_record(description, folder))
    return Exit.OK


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
