"""Sums of a folder's files: written beside them, and asked for later by whoever needs them whole."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from radeon_stack.checksums import MAX_LINES, SUMS, require_sums, sum_of, write_summed, write_sums
from radeon_stack.errors import CheckError

SUM = "0" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in {"b.safetensors": bytes(3 << 20), "a.json": b"{}", "an odd name.txt": b"text"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "below").mkdir()
    write_sums(tmp_path)
    return tmp_path


def test_a_folder_that_is_as_it_was_written_is_vouched_for(folder: Path) -> None:
    assert require_sums(folder)
    write_sums(folder)
    assert [line[66:] for line in (folder / SUMS).read_text().splitlines()] == [
        "a.json",
        "an odd name.txt",
        "b.safetensors",
    ]


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum here")
def test_coreutils_read_the_sums_too(folder: Path) -> None:
    assert subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=folder, check=False).returncode == 0


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (bytes(1 << 20) + b"\1" + bytes((2 << 20) - 1), "b.safetensors is not as it was written"),
        (bytes((3 << 20) - 1), "b.safetensors is not as it was written"),
        (bytes((3 << 20) + 1), "b.safetensors is not as it was written"),
        (None, "b.safetensors is not there"),
    ],
    ids=["a flipped bit", "too short", "too long", "missing"],
)
def test_a_file_that_is_not_as_it_was_written_is_named(folder: Path, data: bytes | None, what: str) -> None:
    file = folder / "b.safetensors"
    file.write_bytes(data) if data else file.unlink()
    with pytest.raises(CheckError, match=what) as error:
        require_sums(folder)
    assert error.value.where == str(folder) and "copy the folder again" in error.value.remedy


def test_what_lies_beside_them_does_not_matter_and_without_sums_nothing_vouches(folder: Path) -> None:
    (folder / "notes.md").write_text("mine")
    assert require_sums(folder)
    (folder / SUMS).unlink()
    assert not require_sums(folder)


def test_a_sum_taken_while_writing_is_of_what_was_handed_over_not_of_what_the_disk_made_of_it(tmp_path: Path) -> None:
    told = write_summed(tmp_path / "shard", [b"one", memoryview(b"two")])
    assert (tmp_path / "shard").read_bytes() == b"onetwo" and told == sum_of(tmp_path / "shard")
    (tmp_path / "shard").write_bytes(b"onetwp")
    write_sums(tmp_path, {"shard": told})
    with pytest.raises(CheckError, match="shard is not as it was written"):
        require_sums(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        f"{SUM}  ../a.json\n",
        f"{SUM}  /etc/hostname\n",
        f"\\{SUM}  a\\nb\n",
        f"{SUM}  ..\n",
        f"{SUM}  a.json\n{SUM}  a.json\n",
        f"{SUM[1:]}  a.json\n",
        f"{SUM}  {'a' * 256}\n",
        "\x1b[2J\n",
        "",
        f"{SUM}  a.json\n" * MAX_LINES,
        "a" * (5 << 20),
    ],
    ids=lambda text: repr(text[60:80]),
)
def test_sums_from_anywhere_name_no_file_elsewhere_and_have_bounds(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / SUMS).write_text(text)
    with pytest.raises(CheckError) as error:
        require_sums(tmp_path)
    assert SUMS in error.value.where and error.value.what.isprintable()


def test_a_name_that_no_line_can_hold_is_refused_when_sums_are_written(tmp_path: Path) -> None:
    (tmp_path / "a\nb.json").write_text("{}")
    with pytest.raises(CheckError, match=r"cannot be summed under its name: a b\.json"):
        write_sums(tmp_path)
