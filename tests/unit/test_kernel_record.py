"""What an audit of kernels takes from its record, and what of that is looked at again."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.kernels.audit.known import COUNTS, recorded, sample, taken, trusted, untrue
from tests.conftest import ROOT

DIGESTS = st.sets(st.text("0123456789abcdef", min_size=1, max_size=16), max_size=200)
ROWS = st.fixed_dictionaries(
    {
        "name": st.text(min_size=1, max_size=5),
        "arch": st.sampled_from(["gfx1201", "gfx942"]),
        "default": st.booleans(),
        "matrix": st.dictionaries(st.text(max_size=3), st.integers(1, 9), max_size=2),
        "findings": st.lists(st.text(max_size=3), max_size=2).map(tuple),
        "remarks": st.lists(st.text(max_size=3), max_size=2).map(tuple),
        "digest": st.text("0123456789abcdef", min_size=1, max_size=4),
        **{name: st.integers(0, 300) for name in COUNTS},
    }
)


@given(ROWS)
def test_a_row_comes_back_from_the_record_as_it_went_in(row: dict[str, Any]) -> None:
    back = taken(json.loads(json.dumps(recorded(row))))
    assert back == row | {"findings": list(row["findings"]), "remarks": list(row["remarks"])}
    assert untrue(back, row) == [] == untrue(recorded(row), row)


@given(ROWS, st.sampled_from([name for name in COUNTS if name != "code"]))
def test_a_figure_that_was_changed_is_named(row: dict[str, Any], name: str) -> None:
    assert untrue(recorded(row) | {name: row[name] + 1}, row) == [f"{name} {row[name]}, recorded {row[name] + 1}"]
    assert untrue(recorded(row) | {"name": "x" * 9}, row) == [f"name {row['name']}, recorded {'x' * 9}"]


@given(ROWS, st.integers(0, 10**6), st.integers(0, 10**6))
def test_code_may_be_a_little_longer_or_shorter(row: dict[str, Any], told: int, found: int) -> None:
    close = abs(told - found) <= 0.02 * told
    differences = [] if close else [f"code {found}, recorded {told}"]
    assert untrue(recorded(row) | {"code": told}, row | {"code": found}) == differences


@given(st.lists(ROWS, max_size=5))
def test_no_row_with_findings_is_trusted(rows: list[dict[str, Any]]) -> None:
    held = trusted(map(recorded, rows))
    assert held.keys() == {row["digest"] for row in rows if not row["findings"]}
    assert not any(row.get("findings") for row in held.values())
    assert trusted([{"name": "of a record without digests", "vgprs": 9}]) == {}


@given(DIGESTS, st.text(max_size=9))
def test_one_in_twenty_is_drawn_and_the_same_for_the_same_seed(digests: set[str], seed: str) -> None:
    drawn = sample(digests, seed)
    assert drawn <= digests and len(drawn) == -(-len(digests) // 20)
    assert drawn == sample(sorted(digests, reverse=True), seed)


def test_within_some_days_each_is_drawn() -> None:
    digests = {f"{number:016x}" for number in range(100)}
    drawn = {digest for day in range(1, 200) for digest in sample(digests, f"day {day}")}
    assert drawn == digests


@pytest.mark.parametrize("wrong", [[], ["gfx1201 head: vgprs 9, recorded 8"]])
def test_nothing_is_recorded_upon_a_record_that_is_wrong(
    wrong: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    kernels = import_module("kernels")
    row = {"name": "head", "arch": "gfx1201", "vgprs": 9, "digest": "d1"}
    monkeypatch.setattr(kernels, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(
        kernels, "audit", lambda *_: (7 if wrong else 0, {"triton": "3", "untrue": wrong, "rows": [row]})
    )
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--record"])
    assert kernels.main() == (7 if wrong else 0)
    assert (tmp_path / "record.json").is_file() == (not wrong)
    assert wrong or json.loads((tmp_path / "record.json").read_text())["triton"]["3"]["rows"] == [row]
