"""Compiles variants for AMD GPUs that are not here, each in a process of its own, and judges every binary."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from radeon_stack.kernels.audit.apart import NoResultError, call_apart
from radeon_stack.kernels.audit.findings import Row, judge
from radeon_stack.kernels.audit.launcher import compile_variant
from radeon_stack.kernels.variant import Variant
from radeon_stack.text import one_line

Variants = Callable[[str], tuple[Variant, ...]]


def audit_variants(
    variants: Variants,
    targets: Sequence[str],
    cache: Path,
    *,
    only: str = "*",
    at_once: int = 2,
    seconds: float = 300.0,
) -> Iterator[Row]:
    """A row for each variant of each target whose name contains or matches `only`, as they are ready.

    `cache` becomes TRITON_CACHE_DIR of the processes that compile. One that ends without a binary gives a row with a
    finding that says how.
    """
    load_compiler()
    pairs = [
        (variant, arch)
        for arch in targets
        for variant in variants(arch)
        if only in variant.name or fnmatchcase(variant.name, only)
    ]
    calls = [partial(_audit_one, variant, arch, cache) for variant, arch in pairs]
    for index, result in call_apart(calls, at_once=at_once, seconds=seconds):
        if isinstance(result, NoResultError):
            variant, arch = pairs[index]
            yield Row(variant.name, arch, variant.default, (f"compiler {one_line(str(result), 400)}",))
        else:
            yield result


def _audit_one(variant: Variant, arch: str, cache: Path) -> Row:
    os.environ["TRITON_CACHE_DIR"] = str(cache)  # of this process, which does nothing else
    begun = time.perf_counter()
    compiled = compile_variant(variant, arch)
    return judge(variant, arch, compiled, time.perf_counter() - begun)


def load_compiler() -> None:
    """Load what each child would load anew, and hash Triton's own files once: two seconds of every compile.

    Triton itself looks whether torch is there, to know a tensor when it is given one. The audit does not need it.
    """
    with suppress(ImportError):
        importlib.import_module("torch")
    importlib.import_module("triton.compiler.code_generator")
    with suppress(AttributeError):  # 3.3 has it elsewhere
        importlib.import_module("triton.runtime.cache").triton_key()
