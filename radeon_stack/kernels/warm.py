"""Compile our kernels for an AMD GPU that is not here, into a folder for images: `--target gfx1201 FOLDER`.

The folder is of the kind that TRITON_CACHE_DIR names; with RADEON_STACK_KERNELS=FOLDER a run finds in it what it would
compile else. Nothing here fails a build: a run compiles what is missing. The image's checks say how much there is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from radeon_stack.errors import Exit
from radeon_stack.kernels.audit.apart import NoResultError, call_apart
from radeon_stack.kernels.variant import Variant

KERNELS = "radeon_stack.kernels.variants"
SECONDS = 300.0  # for one kernel
KEPT = (".hsaco", ".json")  # what a launch reads, without the texts on the way there


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m radeon_stack.kernels.warm", description=__doc__)
    parser.add_argument("--target", required=True, metavar="GFX")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="kernels whose name matches it")
    parser.add_argument("--at-once", type=int, default=min(8, len(os.sched_getaffinity(0))), metavar="N")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        from radeon_stack.kernels.audit.auditing import load_compiler

        load_compiler()
        every = importlib.import_module(KERNELS).variants(arguments.target)
    except Exception as error:  # no Triton, or one that lacks what ours are written in
        return _end(f"no kernel is compiled ahead: {type(error).__name__}: {error}")
    named = [one for one in every if fnmatchcase(one.name, arguments.only)]
    begun = time.monotonic()
    os.environ |= {"TRITON_CACHE_DIR": str(folder)}
    calls = [partial(_compile, one, arguments.target) for one in named]
    launchers = failed = 0
    for index, result in call_apart(calls, at_once=arguments.at_once, seconds=SECONDS):
        if isinstance(result, NoResultError):
            failed += 1
            print(f"✗ {named[index].name}: {result}"[:400], file=sys.stderr, flush=True)
        else:
            has_launcher, seconds = result
            launchers += has_launcher
            print(f"✓ {named[index].name} {seconds:.1f} s", file=sys.stderr, flush=True)
    _thin(folder)
    told = f"{len(named) - failed} of {len(named)} kernels compiled for {arguments.target}, {launchers} with what calls"
    return _end(f"{told} them, in {time.monotonic() - begun:.0f} s; not run")


def _compile(variant: Variant, arch: str) -> tuple[bool, float]:
    """Compile a kernel, and the C by which Triton calls it: whether that could be had, and how many seconds it took.

    Triton 3.5 and 3.6 build a module for each signature, 3.9 one for all.
    """
    from triton.backends.amd.driver import HIPLauncher, HIPUtils

    from radeon_stack.kernels.audit.launcher import compile_kernel

    begun = time.perf_counter()
    made = compile_kernel(variant, arch)
    has_launcher = True
    try:
        HIPUtils()
        HIPLauncher(made.src, made.metadata)
    except Exception:  # HIP's library is not here, or no C compiler: the kernel is there all the same
        has_launcher = False
    return has_launcher, time.perf_counter() - begun


def _thin(folder: Path) -> None:
    """Leave of each kernel what a launch reads, and its list of files telling of nothing else."""
    for listing in folder.glob("*/__grp__*.json"):
        group = json.loads(listing.read_text(encoding="utf-8"))["child_paths"]
        for name, path in group.items():
            if not name.endswith(KEPT):
                Path(path).unlink(missing_ok=True)
        kept = {name: path for name, path in group.items() if name.endswith(KEPT)}
        listing.write_text(json.dumps({"child_paths": kept}), encoding="utf-8")


def _end(told: str) -> int:
    print(told)
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
