"""The audit of kernels with real compilers: this Python's triton, and the one of the ROCm 7.1.1 base."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.errors import Exit, MachineError
from radeon_stack.kernels.audit.assembly import read_assembly
from radeon_stack.kernels.audit.chips import CHIPS, waves_by_registers
from radeon_stack.kernels.audit.known import recorded
from tests.conftest import ROOT, Cli

sys.path.insert(0, str(ROOT / "tools"))
from tritons import python_with_triton, surroundings  # type: ignore[import-not-found, unused-ignore]

pytestmark = pytest.mark.work
KERNELS = "tests.work.audited"


@dataclass(frozen=True)
class Audited:
    """An audit of the test's kernels for two architectures."""

    python: Path
    code: int
    out: str
    err: str
    record: dict[str, Any]
    cache: Path

    def findings(self, name: str, arch: str = "gfx1201") -> list[str]:
        found: list[str] = self.row(name, arch)["findings"]
        return found

    def row(self, name: str, arch: str = "gfx1201") -> dict[str, Any]:
        (row,) = [row for row in self.record["rows"] if row["name"] == name and row["arch"] == arch]
        return dict(row)


@pytest.fixture(scope="session")
def tritons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tritons")


@pytest.fixture(scope="session", params=["this Python's", "3.5.1"])
def audited(request: pytest.FixtureRequest, tritons: Path, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    python = Path(sys.executable)
    if request.param != "this Python's":
        torch = pytest.importorskip("torch")
        try:
            python = python_with_triton(tritons, request.param, beside=Path(torch.__file__).parent.parent)
        except MachineError as error:
            pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("audit")
    arguments = ["--target", "gfx1201", "gfx942", "--from", KERNELS, "--cache", folder / "cache"]
    done = run(python, *arguments, "--json", folder / "told.json")
    record = json.loads((folder / "told.json").read_text())
    return Audited(python, done.returncode, done.stdout, done.stderr, record, folder / "cache")


def run(python: Path, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "radeon_stack.kernels.audit", *map(str, arguments)]
    environment = surroundings() | changes
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


def test_a_good_kernel_has_matrix_instructions_and_no_findings(audited: Audited) -> None:
    for arch, instruction in (("gfx1201", "v_wmma_f32_16x16x16_bf16"), ("gfx942", "v_mfma_f32_32x32x8_bf16")):
        row = audited.row("good", arch)
        assert row["findings"] == [] and row["matrix"][instruction] >= 8
        assert 0 < row["vgprs"] <= 256 and 0 < row["lds"] <= 65536 and row["waves_per_simd"] >= 4
    assert audited.findings("no dot") == []


def test_each_kind_of_bad_kernel_is_found(audited: Audited) -> None:
    assert "a dot without matrix instructions" in audited.findings("fp32")
    assert audited.findings("fp32", "gfx942") == [], "CDNA has them for float32"
    assert re.fullmatch(r"spills \d+ VGPRs, \d+ bytes of scratch memory", audited.findings("spills")[0])
    assert audited.findings("spills, not a default") == [] and audited.row("spills, not a default")["remarks"]
    assert re.fullmatch(r"\d+ bytes of LDS, more than 65536", audited.findings("too much LDS")[0])
    assert "store() got an unexpected keyword argument" in audited.findings("does not compile")[0]
    assert audited.findings("compiler dies") == ["compiler crashed: SIGABRT (LLVM ERROR: Cannot select: intrinsic)"]
    assert audited.findings("told wrongly") == ["compiler ValueError: to the launcher n is i32, not constexpr"]


def test_it_ends_with_the_code_of_a_check_that_did_not_hold_and_says_what_was_not_done(audited: Audited) -> None:
    assert audited.code == Exit.CHECK
    assert "compiled, not run" in audited.out
    assert re.search(r"radeon-stack: \d+ of 18 do not hold; gfx1201 compiler dies: ", audited.err)


def test_registers_leave_room_for_as_many_waves_as_the_compiler_writes_itself(audited: Audited) -> None:
    told = 0
    for path in audited.cache.rglob("*.amdgcn"):
        text = path.read_text()
        arch = re.search(r'\.amdgcn_target ".*-(gfx\d+)"', text)
        occupancy = re.search(r"^; Occupancy: (\d+)$", text, re.MULTILINE)
        assert arch and occupancy
        binary = read_assembly(text)
        if binary.sgprs <= 80:  # LLVM did not always count what the trap handler takes
            assert waves_by_registers(CHIPS[arch[1]], binary.vgprs, binary.sgprs) == int(occupancy[1]), path
            told += 1
    assert told >= 6


def test_what_a_launch_compiles_is_what_the_audit_compiled(audited: Audited, tmp_path: Path) -> None:
    warm = tmp_path / "warm"
    arguments = ("--target", "gfx1201", "--from", KERNELS, "--only", "good", "--cache", warm)
    assert run(audited.python, *arguments).returncode == 0
    held = sorted(path.name for path in warm.iterdir())
    assert run(audited.python, *arguments).returncode == 0
    assert sorted(path.name for path in warm.iterdir()) == held, "the second run finds what the first made"
    code = (
        "import torch\nfrom radeon_stack.kernels.audit.recorded import recorded\n"
        f"from {KERNELS} import matmul\n"
        "a, b, c = (torch.empty(320, 320, dtype=torch.bfloat16) for _ in range(3))\n"
        "with recorded('gfx1201') as launches:\n"
        "    for k in (320, 321):\n"
        "        matmul[(9,)](a, b, c, 321, 321, k, 320, 320, 320, 128, 128, 32,\n"
        "                     num_warps=8, num_stages=2, enable_fp_fusion=True)\n"
        "print(*(launch.compiled.key for launch in launches))"
    )
    done = subprocess.run(
        [str(audited.python), "-c", code],
        env=surroundings() | {"TRITON_CACHE_DIR": str(warm)},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    hit, miss = ("".join(folder) for folder in done.stdout.split())
    keys = {row["key"] for row in audited.record["rows"] if row["name"] == "good" and row["arch"] == "gfx1201"}
    assert hit in keys and miss not in keys
    new = {path.name for path in warm.iterdir()} - set(held)
    assert len(new) == 1, "an inner size that is not divisible by 16 is another binary, and the one that was is not"


def test_what_is_recorded_and_unchanged_is_taken_but_for_a_sample(audited: Audited, tmp_path: Path) -> None:
    code, told, _ = audited_again(audited, tmp_path, "no dot", audited.record["rows"])
    assert (code, told["taken"], told["compiled"], told["untrue"]) == (Exit.OK, 1, 1, [])
    assert {row["arch"]: row["vgprs"] for row in told["rows"]} == {
        arch: audited.row("no dot", arch)["vgprs"] for arch in ("gfx1201", "gfx942")
    }


def test_a_record_that_was_edited_by_hand_is_found(audited: Audited, tmp_path: Path) -> None:
    edited = [row | {"vgprs": 7} for row in audited.record["rows"] if "vgprs" in row]
    code, told, err = audited_again(audited, tmp_path, "no dot", edited)
    assert code == Exit.CHECK and len(told["untrue"]) == 1
    assert re.search(r"the record is wrong in 1 .*:\n  gfx\d+ no dot: vgprs \d+, recorded 7\n", err)


def test_what_did_not_hold_is_compiled_again_and_so_is_what_the_record_has_of_another_kernel(
    audited: Audited, tmp_path: Path
) -> None:
    code, told, _ = audited_again(audited, tmp_path, "does not compile", audited.record["rows"])
    assert (code, told["taken"], told["compiled"], told["untrue"]) == (Exit.CHECK, 0, 2, [])
    others = [row | {"digest": f"another {place}"} for place, row in enumerate(audited.record["rows"])]
    code, told, _ = audited_again(audited, tmp_path, "no dot", others)
    assert (code, told["taken"], told["compiled"]) == (Exit.OK, 0, 2)


def audited_again(
    audited: Audited, folder: Path, only: str, rows: list[dict[str, Any]]
) -> tuple[int, dict[str, Any], str]:
    """Its code, its record and what it complained of, when these rows are recorded."""
    record = {"triton": {audited.record["triton"]: {"rows": [recorded(row) for row in rows]}}}
    (folder / "known.json").write_text(json.dumps(record))
    arguments = ["--target", "gfx1201", "gfx942", "--from", KERNELS, "--only", only, "--known", folder / "known.json"]
    done = run(audited.python, *arguments, "--json", folder / "told.json")
    return done.returncode, json.loads((folder / "told.json").read_text()), done.stderr


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "known.json").write_text("<<<<<<< ours")
    refused = run(Path(sys.executable), "--target", "gfx1201", "--from", KERNELS, "--known", tmp_path / "known.json")
    assert refused.returncode == Exit.USAGE and "is no record of an audit" in refused.stderr


def test_an_interpreter_is_refused_and_so_are_kernels_that_need_more_than_triton(tmp_path: Path) -> None:
    refused = run(Path(sys.executable), "--target", "gfx1201", TRITON_INTERPRET="1")
    assert refused.returncode == Exit.USAGE and "unset it" in refused.stderr
    missing = run(Path(sys.executable), "--target", "gfx1201", "--from", "no_such_kernels")
    assert missing.returncode == Exit.USAGE and "no_such_kernels cannot be imported" in missing.stderr
    nothing = run(Path(sys.executable), "--target", "gfx1201", "--from", KERNELS, "--only", "nothing")
    assert nothing.returncode == Exit.USAGE and "no kernel's name" in nothing.stderr


def test_without_triton_the_command_says_what_to_install(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError('no triton', name='triton')\n")
    result = cli("image", "audit", "--kernels", env=surroundings() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert result.code == Exit.MACHINE and "pip install triton" in result.error
