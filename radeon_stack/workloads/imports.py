"""What trains is imported in seconds, of which a good part goes to what nobody asked for."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

NOT_COMPILED = "TORCHDYNAMO_DISABLE"


@contextmanager
def uncollected() -> Iterator[None]:
    """What is imported in here stays: the collector looks it through neither while it comes nor again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def bring_bitsandbytes() -> None:
    """Import it without torch's inductor, a fifth of what importing takes.

    It hands functions to `torch.compile` for devices that it has no kernels for (0.50.2, `backends/default/ops.py`).
    CPUs and GPUs have theirs.
    """
    before = os.environ.get(NOT_COMPILED)
    os.environ[NOT_COMPILED] = "1"
    try:
        import_module("bitsandbytes")
    finally:
        if before is None:
            del os.environ[NOT_COMPILED]
        else:
            os.environ[NOT_COMPILED] = before
