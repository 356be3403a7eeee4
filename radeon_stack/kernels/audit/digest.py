"""A short name for all that decides a variant's binary and what is found of it: in any folder, by any Python.

Not Triton's own: that has line numbers, and before 3.6 depends on what was compiled before it (`kernels.keys`).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import sys
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from types import ModuleType
from typing import Any

from radeon_stack.kernels.audit import assembly, chips, findings, launcher
from radeon_stack.kernels.variant import Variant

JUDGES = (assembly, chips, findings, launcher)  # what makes a row of a variant
STABLE = {"triton", *sys.stdlib_module_names}  # whose functions are what their names and versions say
UNREAD = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)
MARKS = {tokenize.NEWLINE: ";", tokenize.INDENT: "{", tokenize.DEDENT: "}"}


def digest(variant: Variant, arch: str, compiler: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits, or none of a kernel that cannot be told from others. compiler: `this_compiler()`."""
    told = {field.name: getattr(variant, field.name) for field in fields(variant) if field.name != "kernel"}
    try:
        everything = [told, sources(variant.kernel.fn), arch, compiler, _judges()]
        text = json.dumps(everything, sort_keys=True, default=_plain)
    except (OSError, TypeError):  # no source, or a value that the next process may tell otherwise
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def this_compiler() -> dict[str, Any]:
    """Triton's version, and those variables of the environment that change what it makes."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return {"triton": triton.__version__, "variables": get_cache_invalidating_env_vars()}


@cache
def sources(kernel: Any) -> tuple[Any, ...]:
    """The code of a kernel's Python function and of all that it calls, and what else these name, in order."""
    found: list[Any] = []
    seen: set[Any] = set()
    waiting = [kernel]
    while waiting:
        function = waiting.pop(0)
        if function in seen:
            continue
        seen.add(function)
        source = textwrap.dedent(inspect.getsource(function))
        found.append(code(source))
        names = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
        for name, value in _named(ast.parse(source), names):
            called = getattr(value, "fn", value)  # of a triton.JITFunction
            if inspect.isfunction(called) and not _is_stable(called):
                waiting.append(called)
                called = f"{called.__module__}.{called.__qualname__}"  # which one a name means, where two are called
            found.append((name, called))
    return tuple(found)


def code(source: str) -> str:
    """Python without what decides nothing: comments, docstrings, and where lines end within a statement."""
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in UNREAD]
    types = [tokenize.NEWLINE, *(token.type for token in tokens), tokenize.NEWLINE]
    return " ".join(
        MARKS.get(token.type, token.string)
        for token, before, after in zip(tokens, types, types[2:], strict=False)
        if not (token.type == tokenize.STRING and before in MARKS and after == tokenize.NEWLINE)
    )


def _named(tree: ast.AST, names: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a function's code names that is not its own: by itself, or as a module's."""
    for node in ast.walk(tree):
        value = _meant(node, names)
        if value is not None and not isinstance(value, ModuleType):
            yield ast.unparse(node), value


def _meant(node: ast.AST, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    module = _meant(node.value, names)
    return getattr(module, node.attr, None) if isinstance(module, ModuleType) else None


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if hasattr(value, "value"):  # a tl.constexpr
        return value.value
    if isinstance(value, Mapping):
        return dict(value)
    if callable(value) and _is_stable(value):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__name__ == "dtype":
        return str(value)
    raise TypeError(f"{value!r} is not what a kernel computes with")


def _is_stable(function: Any) -> bool:
    return str(function.__module__).partition(".")[0] in STABLE


@cache
def _judges() -> tuple[str, ...]:
    return tuple(code(inspect.getsource(module)) for module in JUDGES)
