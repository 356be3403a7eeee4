"""The arrows of the house: who may import whom, and that the host side never imports torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from radeon_stack.images.render import INSIDE

PACKAGE = Path(__file__).resolve().parents[2] / "radeon_stack"
SHARED = {"errors", "atomic", "checksums", "contracts", "dialogue", "figures", "safetensor_files", "text"}
# room → the rooms it may import; `catalog` is the ground floor, `cli` the roof.
ARROWS = {
    "catalog": set(),
    "host": {"catalog"},
    "codeobjects": set(),
    "images": {"catalog", "host", "codeobjects"},
    "runs": {"catalog"},
    "launch": {"catalog", "host", "images", "runs"},
    "cli": {"catalog", "codeobjects", "host", "images", "launch", "runs"},
    "contracts": set(),
    "kernels": {"runs.events"},
    "workloads": {"runs.events", "codeobjects", "kernels"},
}
HEAVY = ("torch", "transformers", "trl", "peft", "triton", "bitsandbytes", "datasets")


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_only_what_its_arrows_allow(room: str) -> None:
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            if not name.startswith("radeon_stack."):
                continue
            inner = name.removeprefix("radeon_stack.")
            allowed = {room} | SHARED | ARROWS[room] | {"__version__"}
            assert any(inner == a or inner.startswith(f"{a}.") for a in allowed), f"{file} imports {name}"


def test_what_runs_inside_an_image_imports_only_what_is_inside() -> None:
    inside = {
        str(file.relative_to(PACKAGE).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for name in INSIDE
        for file in ([PACKAGE / name] if name.endswith(".py") else (PACKAGE / name).rglob("*.py"))
    }
    assert "workloads.job" in inside and "host.facts" not in inside
    for module in inside:
        file = PACKAGE / module.replace(".", "/")
        for name in imports(file.with_suffix(".py") if file.with_suffix(".py").exists() else file / "__init__.py"):
            if name.startswith("radeon_stack."):
                inner = name.removeprefix("radeon_stack.")
                assert {inner, inner.rpartition(".")[0]} & (inside | {"__version__"}), f"{module} imports {name}"


def test_every_room_is_held_by_an_arrow() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(ARROWS)


@pytest.mark.parametrize("room", ["catalog", "codeobjects", "host", "images", "runs", "launch", "cli", "contracts"])
def test_no_file_of_the_host_side_names_a_training_library(room: str) -> None:
    for file in (PACKAGE / room).rglob("*.py"):
        assert not [name for name in imports(file) if name.split(".")[0] in HEAVY], file


def test_the_audit_of_kernels_needs_triton_alone() -> None:
    for file in [*(PACKAGE / "kernels/audit").rglob("*.py"), PACKAGE / "kernels/variant.py"]:
        outside = {name.split(".")[0] for name in imports(file)} - set(sys.stdlib_module_names)
        assert outside <= {"triton", "radeon_stack"}, file


def test_nothing_on_the_host_side_pulls_in_torch_when_it_is_imported() -> None:
    modules = [
        str(file.relative_to(PACKAGE.parent).with_suffix("")).replace("/", ".")
        for room in ARROWS
        if room not in ("workloads", "kernels")
        for file in (PACKAGE / room).rglob("*.py")
    ]
    code = (
        "import sys, importlib\n"
        f"for name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_neither_pydantic_nor_rich_nor_the_docker_sdk() -> None:
    code = (
        "import sys\nfrom radeon_stack.cli import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "print([n for n in ('pydantic', 'rich', 'docker', 'jinja2') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
