"""The compiled kernels that an image brings: where they are, and that Triton looks there before it compiles."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "RADEON_STACK_KERNELS"  # the environment variable that names the folder; an image for AMD GPUs sets it
MANAGER = "TRITON_CACHE_MANAGER"  # Triton's own: the class that it asks for what is compiled
HSACO = "*.hsaco"  # a code object as the HIP runtime loads it: one a kernel


def folder() -> Path | None:
    """The folder, None where there is none; it is read and never written."""
    named = os.environ.get(FOLDER)
    return Path(named) if named and Path(named).is_dir() else None


def count() -> int:
    """How many compiled kernels are there."""
    found = folder()
    return sum(1 for _ in found.glob(f"*/{HSACO}")) if found else 0


def use() -> None:
    """Have Triton look there, in this process and those it starts; a manager that somebody else asked for stays."""
    if count():
        os.environ.setdefault(MANAGER, "radeon_stack.kernels.cache:ShippedToo")
