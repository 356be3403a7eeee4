"""Rows go into packs whole and once; how much padding is left is worked out, not guessed."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.contracts.finetune import Data, FinetuneConfig
from radeon_stack.contracts.options import ModelOptions
from radeon_stack.errors import UsageError
from radeon_stack.workloads.finetune.architectures import KNOWN, NOT_PACKED, require_packable
from radeon_stack.workloads.finetune.encoding import Encoded
from radeon_stack.workloads.finetune.packing import (
    batches_told,
    pack,
    packed,
    padding_at_random,
    padding_in_order,
    require_batching,
)


def rows_of(lengths: list[int]) -> list[Encoded]:
    """Rows whose tokens are told from all others'; labels are the ids' negatives."""
    first = [sum(lengths[:row]) for row in range(len(lengths))]
    ids = [list(range(begin, begin + length)) for begin, length in zip(first, lengths, strict=True)]
    return [Encoded(one, [-token for token in one], "") for one in ids]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
def test_every_row_is_whole_in_one_pack_and_no_pack_is_too_long(lengths: list[int], room: int) -> None:
    rows = rows_of(lengths)
    packs = packed(rows, room)
    assert all(0 < len(one.input_ids) == len(one.labels) == sum(one.lengths) <= room for one in packs)
    found = []
    for one in packs:
        ends = [sum(one.lengths[: n + 1]) for n in range(len(one.lengths))]
        for end, length in zip(ends, one.lengths, strict=True):
            found.append((one.input_ids[end - length : end], one.labels[end - length : end]))
    assert sorted(found) == sorted((row.input_ids, row.labels) for row in rows)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
def test_the_same_rows_make_the_same_packs_and_no_two_of_them_fit_into_one(lengths: list[int], room: int) -> None:
    packs = pack(lengths, room)
    assert packs == pack(list(lengths), room)
    taken = sorted(sum(lengths[row] for row in rows) for rows in packs)
    assert len(taken) < 2 or taken[0] + taken[1] > room


def test_the_longest_come_first_and_go_where_the_least_is_left() -> None:
    assert pack([3, 7, 6, 4, 1], 10) == [[1, 0], [2, 3], [4]]
    assert pack([5, 5, 5], 5) == [[0], [1], [2]]
    with pytest.raises(ValueError, match="a row of 6 tokens does not go into 5"):
        pack([5, 6], 5)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 7))
def test_padding_of_batches_at_random_is_that_of_all_orders(lengths: list[int], batch: int) -> None:
    size = min(batch, len(lengths))
    longest = mean(max(order[:size]) for order in permutations(lengths))
    assert padding_at_random(lengths, batch) == pytest.approx(1 - mean(lengths) / longest, abs=1e-12)


def test_padding_in_order_is_counted_batch_by_batch() -> None:
    assert padding_in_order([4, 2, 3], 2) == 1 - 9 / 11
    assert padding_in_order([4, 4, 3], 1) == 0


def test_what_is_told_is_before_and_after() -> None:
    rows = rows_of([2, 8] * 10)
    packs = packed(rows, 10)
    unpacked = batches_told(rows, [], 2, flat=False)
    told = batches_told(rows, packs, 2, flat=False)
    assert unpacked == {"rows": 20, "padding": pytest.approx(1 - 5 / (8 * 29 / 38 + 2 * 9 / 38))}
    assert told == {"rows": 20, "packs": 10, "padding": 0, "padding_unpacked": unpacked["padding"]}
    uneven = packed(rows_of([5, 3, 3, 3]), 8)
    assert batches_told(rows, uneven, 2, flat=False)["padding"] == 1 - 7 / 8
    assert batches_told(rows, uneven, 2, flat=True)["padding"] == 0


def config(attention: Any = "auto", **data: Any) -> FinetuneConfig:
    return FinetuneConfig(model="m", data=Data(**data), model_options=ModelOptions(attention=attention))


def test_packs_are_not_grouped_and_not_given_to_an_attention_that_was_not_tried() -> None:
    assert not Data().packing and not Data().group_by_length
    require_batching(config(packing=True))
    require_batching(config("flex_attention", group_by_length=True))
    with pytest.raises(UsageError, match="nothing to group") as caught:
        require_batching(config(packing=True, group_by_length=True))
    assert caught.value.where == "config.data.group_by_length"
    with pytest.raises(UsageError, match="not shown to keep rows apart") as caught:
        require_batching(config("flex_attention", packing=True))
    assert caught.value.where == "config.model_options.attention"


def folder(path: Path, **told: Any) -> Path:
    (path / "config.json").write_text(json.dumps(told))
    return path


@pytest.mark.parametrize("architecture", [*NOT_PACKED, "ElsewhereForCausalLM"])
def test_a_model_not_known_to_keep_rows_apart_is_refused(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{architecture} is not known to keep the rows of a pack apart") as caught:
        require_packable(folder(tmp_path, architectures=[architecture]), 64)
    assert caught.value.where == "config.data.packing"
    assert "data.packing=false" in str(caught.value.remedy)


@pytest.mark.parametrize("architecture", KNOWN.keys() - NOT_PACKED)
def test_the_others_are_let_through(architecture: str, tmp_path: Path) -> None:
    require_packable(folder(tmp_path, architectures=[architecture], rope_scaling={"rope_type": "llama3"}), 1 << 20)


@pytest.mark.parametrize(
    "told",
    [
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096}},
        {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096},
        {"rope_scaling": {"rope_type": "dynamic"}, "max_position_embeddings": 4096},
    ],
)
def test_positions_that_depend_on_the_longest_row_limit_a_packs_length(told: dict[str, Any], tmp_path: Path) -> None:
    path = folder(tmp_path, architectures=["Phi3ForCausalLM"], **told)
    require_packable(path, 4096)
    with pytest.raises(UsageError, match="beyond 4096 tokens") as caught:
        require_packable(path, 4097)
    assert "data.max_length=4096" in str(caught.value.remedy)
