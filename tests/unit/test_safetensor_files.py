"""Headers of safetensors files from anywhere: nothing in them is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.errors import UsageError
from radeon_stack.safetensor_files import INDEX, MAX_HEADER_BYTES, header, places, places_in, read

GOOD = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}


def write(file: Path, told: Any, size: int = 8) -> Path:
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(size)))
    return file


def test_tensors_come_in_the_order_of_their_bytes_whatever_the_headers_is(tmp_path: Path) -> None:
    second = {"dtype": "F32", "shape": [], "data_offsets": [8, 12]}
    found = places_in(write(tmp_path / "a.safetensors", {"b": second, "a": GOOD, "__metadata__": {"x": "y"}}, 12))
    assert [(place.name, place.shape, place.bytes) for place in found] == [("a", (2, 2), 8), ("b", (), 4)]
    assert read(found[1]) == bytes((8, 9, 10, 11)) and read(found[0], 6) == bytes((6, 7))


@pytest.mark.parametrize(
    ("told", "what"),
    [
        ({"a": GOOD | {"dtype": "BF17"}}, "no plausible tensor: a"),
        ({"a": GOOD | {"shape": [2, 3]}}, "no plausible tensor: a"),
        ({"a": GOOD | {"shape": [-2, -2]}}, "no plausible tensor: a"),
        ({"a": GOOD | {"shape": [2.0, 2]}}, "no plausible tensor: a"),
        ({"a": GOOD | {"shape": [True, 4]}}, "no plausible tensor: a"),
        ({"a": GOOD | {"shape": [1] * 15 + [2, 2]}}, "no plausible tensor: a"),
        ({"a": GOOD | {"data_offsets": [8, 0]}}, "no plausible tensor: a"),
        ({"a": GOOD | {"data_offsets": [-8, 0]}}, "no plausible tensor: a"),
        ({"a": GOOD | {"data_offsets": [0, 8, 16]}}, "no plausible tensor: a"),
        ({"a": GOOD, "b": GOOD}, "no plausible tensor: b"),
        ({"a": GOOD | {"data_offsets": [2, 10]}}, "no plausible tensor: a"),
        ({"a": GOOD, "b": GOOD | {"data_offsets": [8, 16]}}, "cut short"),
        ({}, "too long"),
        ({"a\x1b[2J": None}, "no plausible tensor: a�"),
        ([], "not a JSON object"),
        (b"{" * 100_000, "not readable JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not readable JSON"),
    ],
)
def test_what_cannot_be_is_refused_with_the_file(tmp_path: Path, told: Any, what: str) -> None:
    file = write(tmp_path / "model.safetensors", told)
    with pytest.raises(UsageError, match=what.replace("[", r"\[")) as error:
        places_in(file)
    assert error.value.where == str(file)


def test_a_header_of_an_impossible_length_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for length in (0, MAX_HEADER_BYTES + 1, (1 << 64) - 1):
        file.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(UsageError, match="not a safetensors file"):
            places_in(file)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_in_words(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.mktemp("random") / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(UsageError):
        assert places_in(file)
        raise UsageError("by chance")


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/hostname", "b.safetensors", 7])
def test_an_index_leads_nowhere_else(tmp_path: Path, name: Any) -> None:
    write(tmp_path / "a.safetensors", {"a": GOOD})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UsageError, match=r"which is not there|no weight_map of names"):
        places(tmp_path)


def test_a_tensor_that_its_file_has_not_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"a": GOOD})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors", "c": "a.safetensors"}}))
    with pytest.raises(UsageError, match="names c, which its file has not"):
        places(tmp_path)


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(tmp_path: Path) -> None:
    (place,) = places_in(write(tmp_path / "a.safetensors", {"a": GOOD}))
    with place.file.open("r+b") as stream:
        stream.truncate(place.end - 1)
    with pytest.raises(UsageError, match="became shorter"):
        read(place)


def test_a_header_is_read_as_it_was_made_and_leaves_tensors_aligned(tmp_path: Path) -> None:
    (place,) = places_in(write(tmp_path / "a.safetensors", {"a": GOOD}))
    (tmp_path / "b.safetensors").write_bytes(made := header([place]) + read(place))
    (again,) = places_in(tmp_path / "b.safetensors")
    assert again.like(place) and again.begin % 8 == 0 and again.end == len(made)
