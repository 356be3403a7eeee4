"""Compiles variants for AMD GPUs that are not here, each in a process of its own, and judges every binary."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from radeon_stack.kernels.audit.apart import NoResultError, call_apart
from radeon_stack.kernels.audit.digest import digest, this_compiler
from radeon_stack.kernels.audit.findings import Row, judge
from radeon_stack.kernels.audit.launcher import compile_variant
from radeon_stack.kernels.variant import Variant
from radeon_stack.text import one_line

Variants = Callable[[str], tuple[Variant, ...]]


@dataclass(frozen=True)
class Pair:
    """A variant, and the target that it is for."""

    variant: Variant
    arch: str
    digest: str


def chosen(variants: Variants, targets: Sequence[str], only: str = "*") -> list[Pair]:
    """Those of each target whose name contains or matches `only`."""
    compiler = this_compiler()
    return [
        Pair(variant, arch, digest(variant, arch, compiler))
        for arch in targets
        for variant in variants(arch)
        if only in variant.name or fnmatchcase(variant.name, only)
    ]


def audit_pairs(pairs: Sequence[Pair], cache: Path, *, at_once: int = 2, seconds: float = 300.0) -> Iterator[Row]:
    """A row for each of them, as they are ready.

    `cache` becomes TRITON_CACHE_DIR of the processes that compile. One that ends without a binary gives a row with a
    finding that says how.
    """
    load_compiler()
    calls = [partial(_audit_one, pair, cache) for pair in pairs]
    for index, result in call_apart(calls, at_once=at_once, seconds=seconds):
        if isinstance(result, NoResultError):
            variant, finding = pairs[index].variant, f"compiler {one_line(str(result), 400)}"
            result = Row(variant.name, pairs[index].arch, variant.default, (finding,))
        yield replace(result, digest=pairs[index].digest)


def _audit_one(pair: Pair, cache: Path) -> Row:
    os.environ["TRITON_CACHE_DIR"] = str(cache)  # of this process, which does nothing else
    begun = time.perf_counter()
    compiled = compile_variant(pair.variant, pair.arch)
    return judge(pair.variant, pair.arch, compiled, time.perf_counter() - begun)


def load_compiler() -> None:
    """Load what each child would load anew, and hash Triton's own files once: two seconds of every compile.

    Triton itself looks whether torch is there, to know a tensor when it is given one. The audit does not need it.
    """
    with suppress(ImportError):
        importlib.import_module("torch")
    importlib.import_module("triton.compiler.code_generator")
    with suppress(AttributeError):  # 3.3 has it elsewhere
        importlib.import_module("triton.runtime.cache").triton_key()
