"""By what Triton knows a compiled kernel, whatever the process launched before."""

from __future__ import annotations

import ast
from typing import Any


def settle(kernel: Any) -> None:
    """Have the keys of all that a kernel calls made before its own; once a process and kernel.

    Triton takes a function's key from those it calls and from their global constants. Up to 3.6 it looks at the
    constants before it has found them: they count where the called function's key was already made for another kernel
    and else they do not. A kernel compiled first in one process is then not found by a process that launches it second.
    """
    if getattr(kernel, "hash", "none under the interpreter") is not None:
        return
    for node in ast.walk(kernel.parse()):
        called = kernel.fn.__globals__.get(node.id) if isinstance(node, ast.Name) else None
        if called is not kernel and hasattr(called, "used_global_vals"):
            settle(called)
    kernel.cache_key  # noqa: B018  # a property that keeps what it finds
