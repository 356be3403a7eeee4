"""Packed products as NVIDIA's assembler makes them, by the triton that lets them run on: no GPU is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from radeon_stack.errors import Exit, MachineError
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from sass import written_while_read  # type: ignore[import-not-found, unused-ignore]
from tritons import python_with_triton, surroundings  # type: ignore[import-not-found, unused-ignore]

pytestmark = pytest.mark.work


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        beside = Path(torch.__file__).parent.parent
        return Path(python_with_triton(tmp_path_factory.mktemp("tritons"), "3.5.1", beside=beside))
    except MachineError as error:
        pytest.skip(f"needs triton 3.5.1: {error}")


def looked_at(python: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    command = [str(python), "tools/hopper.py", "--json", *arguments]
    done = subprocess.run(command, env=surroundings(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_no_register_is_written_that_a_product_still_reads(python: Path) -> None:
    code, told = looked_at(python, "--only", "rows (64|288|384)")
    assert told["triton"] == "3.5.1" and len(told["rows"]) == 10
    assert (code, [row["overwritten"] for row in told["rows"]]) == (Exit.OK, [[]] * 10)
    assert all(row["products"] for row in told["rows"])


def test_it_is_seen_where_products_are_not_awaited(python: Path) -> None:
    code, told = looked_at(python, "--only", "experts backward nf4 rows 384", "--unawaited")
    assert code == Exit.CHECK
    assert "HGMMA" in told["rows"][0]["overwritten"][0]


LOOP = """
.L_x_1:
        /*0010*/                   LDS R8, [R40] ;
        /*0020*/                   {writes} ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, {running} ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(
    ("writes", "running", "found"),
    [
        ("F2FP.BF16.F32.PACK_AB R7, R50, R51", "0x0", False),
        ("F2FP.BF16.F32.PACK_AB R7, R50, R51", "0x1", True),
        ("SHFL.IDX PT, R4, R50, R51, 0x1f", "0x1", True),
        ("LDS.64 R6, [R40]", "0x1", True),
        ("@P1 IMAD R5, R50, R51, R52", "0x1", True),
        ("FMUL R8, R4, R5", "0x1", False),
        ("STG.E R4, [R50]", "0x1", False),
    ],
)
def test_a_product_reads_until_it_is_waited_for(writes: str, running: str, found: bool) -> None:
    assert bool(written_while_read(LOOP.format(writes=writes, running=running))) == found
