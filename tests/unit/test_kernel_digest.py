"""By what the audit knows a kernel again: all that decides its binary, and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.kernels.audit import digest as module
from radeon_stack.kernels.audit.digest import code, digest
from radeon_stack.kernels.variant import Variant
from tests.conftest import ROOT

KERNEL = """\
import shared
from shared import helper, jit

# Of a block.
SIZE = 64


@jit
def kernel(a, n, BLOCK):
    '''What it does.'''
    # How it does it.
    return helper(a, n) + SIZE * shared.SCALE + kernel.later(BLOCK)
"""
SHARED = """\
from types import SimpleNamespace as Kernel

SCALE, STEPS, UNUSED = 2, 3, 4


def jit(function):
    return Kernel(fn=function)


@jit
def helper(a, n):
    return deeper(a) + n


@jit
def deeper(a):
    return a * STEPS
"""
COMPILER = {"triton": "3.5.1", "variables": {}}
NUMBERS = count()


def variant(kernel: Any) -> Variant:
    types = {"a": "*bf16", "n": "i32", "BLOCK": "constexpr"}
    return Variant("named", kernel, types, {"BLOCK": 32}, 4, 2, dot=True, default=True, aligned=("a",))


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """The digest of a kernel that is written so, each time in another folder."""

    def write(kernel: str = KERNEL, shared: str = SHARED) -> str:
        folder = tmp_path / f"checkout {next(NUMBERS)}"
        folder.mkdir()
        for name, text in (("shared", shared), ("kernels", kernel)):
            (folder / f"{name}.py").write_text(text)
            spec = spec_from_file_location(name, folder / f"{name}.py")
            assert spec and spec.loader
            loaded = module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, loaded)
            spec.loader.exec_module(loaded)
        return digest(variant(loaded.kernel), "gfx1201", COMPILER)

    return write


def test_another_folder_comments_and_docstrings_decide_nothing(told: Callable[..., str]) -> None:
    first = told()
    assert len(first) == 16 and told() == first
    assert told(KERNEL.replace("# Of a block.", "# Of a block,\n# in bytes.\n\n")) == first
    assert told(KERNEL.replace("# How it does it.", "")) == first
    assert told(KERNEL.replace("What it does.", "Something else.")) == first
    assert told(KERNEL.replace("helper(a, n)", "helper(\n        a,  # first\n        n\n    )")) == first
    assert told(shared=SHARED.replace("UNUSED = 2, 3, 4", "UNUSED = 2, 3, 5")) == first


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("helper(a, n)", "helper(n, a)"),
        ("SIZE = 64", "SIZE = 65"),
        ("@jit\ndef kernel", "@jit\n@(lambda function: function)\ndef kernel"),
        ("import helper, jit", "import deeper as helper, jit"),
    ],
)
def test_what_a_kernel_says_and_the_constants_that_it_names_decide(
    told: Callable[..., str], old: str, new: str
) -> None:
    changed = KERNEL.replace(old, new)
    assert changed != KERNEL and told(changed) != told()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("deeper(a) + n", "deeper(a) - n"),
        ("a * STEPS", "a + STEPS"),
        ("STEPS, UNUSED = 2, 3", "STEPS, UNUSED = 2, 7"),
        ("SCALE, STEPS, UNUSED = 2", "SCALE, STEPS, UNUSED = 9"),
        ("STEPS, UNUSED = 2, 3", "STEPS, UNUSED = 2, 3.0"),
    ],
)
def test_what_it_calls_decides_and_what_these_name(told: Callable[..., str], old: str, new: str) -> None:
    changed = SHARED.replace(old, new)
    assert changed != SHARED and told(shared=changed) != told()


def test_which_of_the_called_a_name_means_decides(told: Callable[..., str]) -> None:
    both = KERNEL.replace("import helper, jit", "import helper, jit\nfrom shared import deeper as other").replace(
        "kernel.later(BLOCK)", "other(a)"
    )
    assert told(both) != told(both.replace("deeper as other", "helper as other"))


def test_what_cannot_be_told_from_another_has_no_digest(told: Callable[..., str]) -> None:
    assert told(KERNEL.replace("SIZE = 64", "SIZE = object()")) == ""
    assert told(KERNEL.replace("SIZE = 64", "class SIZE:\n    pass")) == ""
    assert digest(variant(type("Builtin", (), {"fn": None})), "gfx1201", COMPILER) == ""


@pytest.fixture
def plain() -> Variant:
    def kernel(a: Any) -> Any:
        return a

    return variant(type("Kernel", (), {"fn": staticmethod(kernel)}))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "renamed"},
        {"signature": {"a": "*fp16", "n": "i32", "BLOCK": "constexpr"}},
        {"constexprs": {"BLOCK": 64}},
        {"constexprs": {"BLOCK": True}},
        {"num_warps": 8},
        {"num_stages": 3},
        {"dot": False},
        {"default": False},
        {"fp_fusion": False},
        {"aligned": ("a", "n")},
        {"large": ("a",)},
        {"options": {"waves_per_eu": 2}},
    ],
)
def test_all_of_a_variant_decides(plain: Variant, change: dict[str, Any]) -> None:
    told = digest(plain, "gfx1201", COMPILER)
    assert told and digest(replace(plain, **change), "gfx1201", COMPILER) != told


def test_target_triton_its_variables_and_the_judges_decide(plain: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [
        digest(plain, "gfx1201", COMPILER),
        digest(plain, "gfx1200", COMPILER),
        digest(plain, "gfx1201", COMPILER | {"triton": "3.9.0"}),
        digest(plain, "gfx1201", COMPILER | {"variables": {"DISABLE_LLVM_OPT": "true"}}),
    ]
    monkeypatch.setattr(module, "_judges", lambda: ("LDS_LIMIT = 1",))
    told.append(digest(plain, "gfx1201", COMPILER))
    assert len(set(told)) == 5 and all(told)


def test_another_process_tells_the_same() -> None:
    pytest.importorskip("triton")
    code = (
        "from radeon_stack.kernels.audit.digest import digest\n"
        "from radeon_stack.kernels.variants import variants\n"
        f"print(*(digest(one, 'gfx1201', {COMPILER}) for one in variants('gfx1201')))"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert told[0] == told[1] and len(told[0]) > 100 and all(len(one) == 16 for one in told[0])


WORDS = st.sampled_from(["a", "b", "'a'", "'a b'", "(a)", "a + 1", "f(a, 'b')", "'a'.join(b)", "[]", "x == {}"])
PARTS = st.recursive(
    st.tuples(st.sampled_from(["{}", "x = {}", "return {}", "x = [\n{}\n]"]), WORDS).map(
        lambda both: [both[0].format(both[1]).splitlines()]
    ),
    lambda inner: st.tuples(WORDS, st.lists(inner, min_size=1, max_size=3)).map(
        lambda both: [[f"if {both[0]}:"], *[[f"  {line}" for line in part] for one in both[1] for part in one]]
    ),
    max_leaves=5,
)
SOURCES = st.lists(PARTS, min_size=1, max_size=4).map(
    lambda parts: "def f(a, b):\n" + "".join(f"  {line}\n" for part in parts for lines in part for line in lines)
)


@given(SOURCES, SOURCES)
def test_sources_of_the_same_code_mean_the_same(one: str, other: str) -> None:
    assert (code(one) == code(other)) <= (meaning(one) == meaning(other))


@given(SOURCES, st.lists(st.integers(0, 30), max_size=5), st.sampled_from(["# a", "      # 'b'", "", "  "]))
def test_comments_and_empty_lines_are_no_code(source: str, places: list[int], line: str) -> None:
    lines = source.splitlines()
    for place in places:
        lines.insert(min(place, len(lines)), line)
    assert code("\n".join(lines) + "\n") == code(source)


def meaning(source: str) -> str:
    """Python's own reading, without statements that are texts."""

    class Texts(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
            return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    return ast.dump(Texts().visit(ast.parse(source)))
