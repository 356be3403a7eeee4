"""What an image ships compiled is what a run on its GPU launches: found there, and not compiled. No GPU is needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.errors import CheckError, MachineError
from radeon_stack.kernels.shipped import FOLDER, MANAGER, count, use
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from tritons import python_with_triton, surroundings  # type: ignore[import-not-found, unused-ignore]

pytestmark = pytest.mark.work
STUB = """static int nothing(void) { return 0; }
int hipDriverGetVersion(int* version) { *version = 70100000; return 0; }
int hipRuntimeGetVersion(int* version) { *version = 70100000; return 0; }
int hipGetProcAddress(const char* name, void** found) { *found = (void*)nothing; return 0; }
"""
LAYER = "dense * rows 16*"  # all that a step of an NF4 layer launches at few rows


@dataclass(frozen=True)
class Shipped:
    """A folder as an image has it, of one layer's kernels, and the Python whose triton made it."""

    python: Path
    folder: Path
    told: str
    environment: dict[str, str]

    def run(self, cache: Path, tree: Path = ROOT, **changes: str) -> dict[str, Any]:
        """What a step calls and compiles in a process of its own, whose sources are `tree`'s."""
        named = {"RADEON_STACK_KERNELS": str(self.folder), "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(tree)}
        return launched(self.python, "run", tree, **self.environment, **named, **changes)


@pytest.fixture(scope="module", params=["this Python's", "3.5.1"])
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "this Python's":
        return Path(sys.executable)
    torch = pytest.importorskip("torch")
    try:
        folder = tmp_path_factory.mktemp("tritons")
        return Path(python_with_triton(folder, request.param, beside=Path(torch.__file__).parent.parent))
    except MachineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def shipped(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    folder = tmp_path_factory.mktemp("shipped") / "kernels"
    library = hip_library(python, tmp_path_factory.mktemp("hip"))
    environment = {"TRITON_LIBHIP_PATH": str(library)} if library else {}
    command = [python, "-m", "radeon_stack.kernels.warm", "--target", "gfx1201", "--only", LAYER, folder]
    done = subprocess.run(
        list(map(str, command)), env=quiet() | environment, cwd=ROOT, check=True, capture_output=True, text=True
    )
    return Shipped(python, folder, done.stdout, environment)


def hip_library(python: Path, folder: Path) -> Path | None:
    """A libamdhip64 that has all names which Triton looks for and does nothing; None without a C compiler."""
    if shutil.which("gcc") is None:
        return None
    code = "import triton.backends.amd as amd; print(amd.__path__[0])"
    found = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    sources = "".join((Path(found) / name).read_text() for name in ("driver.py", "driver.c"))
    names = {*re.findall(r"\bhip[A-Z]\w+", sources)} - {*re.findall(r"\bhip\w+(?=\()", STUB)}
    nothing = "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names))
    (folder / "hip.c").write_text(STUB + nothing)
    library = folder / "libamdhip64.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(folder / "hip.c")], check=True)
    return library


def quiet() -> dict[str, str]:
    """The environment without what would be part of a key, as in an image."""
    return {name: value for name, value in surroundings().items() if not name.startswith("TRITON_")}


def launched(python: Path, what: str, tree: Path = ROOT, **changes: str) -> dict[str, Any]:
    done = subprocess.run(
        [str(python), "-m", "tests.work.launched", what],
        env=quiet() | changes,
        cwd=tree,
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(json.loads(done.stdout))


def test_all_that_the_recipes_launch_is_shipped(python: Path) -> None:
    told = launched(python, "keys")
    assert told["missing"] == []
    assert told["launched"] >= 100 and told["shipped"] >= told["launched"]


def test_a_step_finds_its_kernels_and_compiles_nothing_and_what_differs_finds_none(
    shipped: Shipped, tmp_path: Path
) -> None:
    assert shipped.told.startswith("7 of 7 kernels compiled for gfx1201, ")
    before = listing(shipped.folder)
    found = shipped.run(tmp_path / "cache")
    assert found["step"] == found["again"] == found["other shape"] == {"called": 5, "compiles": None}
    assert listing(shipped.folder) == before, "it may be read-only"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()], "nothing was compiled"
    # The first is launched before the others, whose keys must not depend on it.
    for change in ("other kernel", "other option", "width", "address"):
        assert found[change] == {"called": 0, "compiles": "this would be compiled"}, change


def test_what_calls_a_kernel_is_shipped_with_it(shipped: Shipped) -> None:
    if not shipped.environment:
        pytest.skip("no C compiler")
    assert ", 7 with what calls them" in shipped.told
    assert list(shipped.folder.glob("*/hip_utils.*.so"))


def test_a_kernel_is_the_same_whichever_was_launched_before_it(python: Path) -> None:
    code = (
        "import sys\n"
        "from radeon_stack.kernels.jit import decode, grouped, linear\n"
        "from radeon_stack.kernels.keys import settle\n"
        "kernels = [decode.decode_blocks, grouped.gated_forward, linear.linear]\n"
        "for number in sys.argv[1:]:\n"
        "    settle(kernels[int(number)])\n"
        "print(*(kernel.cache_key for kernel in kernels))"
    )

    def keys(*order: str) -> str:
        command = [str(python), "-c", code, *order]
        return subprocess.run(command, env=quiet(), cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert keys("0", "1", "2") == keys("2", "1", "0")


def test_another_source_is_another_kernel(shipped: Shipped, tmp_path: Path) -> None:
    for part in ("radeon_stack", "tests/__init__.py", "tests/work", "recipes"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / part, tmp_path / part)
    same = shipped.run(tmp_path / "cache", tmp_path)
    assert same["step"]["compiles"] is None, "where the sources lie is no part of a key"
    file = tmp_path / "radeon_stack/kernels/jit/weights.py"  # of a function that the kernels call
    text = file.read_text()
    assert text.count("        return scale\n") == 1
    file.write_text(text.replace("        return scale\n", "        return  scale\n"))
    assert shipped.run(tmp_path / "cache", tmp_path)["step"]["compiles"] == "this would be compiled"


def test_what_is_there_in_part_is_not_taken_and_what_is_moved_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from radeon_stack.kernels.cache import ShippedToo

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("RADEON_STACK_KERNELS", str(tmp_path / "shipped"))
    folder = tmp_path / "shipped" / "KEY"
    folder.mkdir(parents=True)
    files = {"k.hsaco": "/elsewhere/KEY/k.hsaco", "k.json": "/elsewhere/KEY/k.json"}
    (folder / "__grp__k.json").write_text(json.dumps({"child_paths": files}))
    (folder / "k.json").write_text("{}")
    assert ShippedToo("KEY").get_group("k.json") is None
    (folder / "k.hsaco").write_bytes(b"")
    assert ShippedToo("KEY").get_group("k.json") == {name: str(folder / name) for name in files}
    assert ShippedToo("OTHER").get_group("k.json") is None
    assert ShippedToo("KEY").get_file("k.hsaco") == str(folder / "k.hsaco")
    ShippedToo("KEY").put(b"own", "k.hsaco")
    assert (folder / "k.hsaco").read_bytes() == b""
    assert ShippedToo("KEY").get_file("k.hsaco") == str(tmp_path / "cache" / "KEY" / "k.hsaco")


def test_an_image_without_its_kernels_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from radeon_stack.workloads.probe.checks import CHECKS

    (check,) = [check for check in CHECKS if check.name == "kernels"]
    description = {"gfx": "gfx1201", "kernels": True, "triton": "3.5.1"}
    assert check.applies(description) and not check.applies({"gfx": None}), "nor do images made before have any"
    monkeypatch.setenv("RADEON_STACK_KERNELS", str(tmp_path))
    with pytest.raises(CheckError, match=r"none of \d+ kernels is compiled for gfx1201"):
        check.run(description)
    assert check.run({**description, "triton": None}).startswith("0 of "), "of a triton that nobody looked into"
    (tmp_path / "KEY").mkdir()
    (tmp_path / "KEY/k.hsaco").write_bytes(b"")
    assert re.fullmatch(r"1 of \d+ compiled for gfx1201", check.run(description))


def test_a_run_looks_where_the_image_says_and_leaves_a_manager_that_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(MANAGER, raising=False)
    monkeypatch.setenv(FOLDER, str(tmp_path / "missing"))
    use()
    assert MANAGER not in os.environ and count() == 0
    monkeypatch.setenv(FOLDER, str(tmp_path))
    use()
    assert MANAGER not in os.environ, "an empty folder helps nobody"
    (tmp_path / "KEY").mkdir()
    (tmp_path / "KEY/k.hsaco").write_bytes(b"")
    monkeypatch.setenv(MANAGER, "theirs:Manager")
    use()
    assert os.environ[MANAGER] == "theirs:Manager"


def test_without_triton_there_is_nothing_and_no_failure(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from radeon_stack.kernels.warm import main\n"
        f"sys.exit(main(['--target', 'gfx1201', {str(tmp_path / 'kernels')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "no kernel is compiled ahead" in done.stdout
    assert find_spec("triton") is not None


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path.relative_to(folder)), path.stat().st_mtime_ns) for path in folder.rglob("*"))
