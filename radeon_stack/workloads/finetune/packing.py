"""Rows into packs: which go together, and how much of what is computed is padding. Needs no torch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.errors import UsageError
from radeon_stack.workloads.finetune.encoding import Encoded

FLASH = "flash_attention_2"


@dataclass(frozen=True)
class Pack:
    """Rows one after the other: token ids and labels of all of them, and how many tokens each row has."""

    input_ids: list[int]
    labels: list[int]
    lengths: list[int]


def require_batching(config: FinetuneConfig) -> None:
    """UsageError for ways of making batches that exclude each other, or an attention not shown to keep rows apart."""
    if not config.data.packing:
        return
    if config.data.group_by_length:
        raise UsageError(
            "packs are all as long as they may be: there is nothing to group",
            where="config.data.group_by_length",
            remedy="set one of data.packing and data.group_by_length",
        )
    if config.model_options.attention == "flex_attention":
        raise UsageError(
            "packing was not shown to keep rows apart with it",
            where="config.model_options.attention",
            remedy="--set model_options.attention=sdpa, or data.packing=false",
        )


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The numbers of the rows that go together, for rows of these lengths (tokens) into packs of at most `room`.

    Best fit, decreasing: the longest first, each to where the least is left after it. Each row is in one pack, whole;
    equal lengths keep their order. ValueError for a row longer than `room`.
    """
    if max(lengths, default=0) > room:
        raise ValueError(f"a row of {max(lengths)} tokens does not go into {room}")
    packs: list[list[int]] = []
    with_left: dict[int, list[list[int]]] = {room: []}  # tokens left → packs that have so many
    lefts = [room]  # those of which there are any, ascending; a new pack is always to be had
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        left = lefts[bisect_left(lefts, lengths[row])]
        if left == room:
            packs.append(chosen := [])
        else:
            chosen = with_left[left].pop()
            if not with_left[left]:
                lefts.remove(left)
        chosen.append(row)
        left -= lengths[row]
        if left < room:
            if not with_left.setdefault(left, []):
                insort(lefts, left)
            with_left[left].append(chosen)
    return packs


def packed(rows: Sequence[Encoded], room: int) -> list[Pack]:
    """The rows in packs of at most `room` tokens."""
    return [
        Pack(
            [token for row in together for token in rows[row].input_ids],
            [label for row in together for label in rows[row].labels],
            [len(rows[row].input_ids) for row in together],
        )
        for together in pack([len(row.input_ids) for row in rows], room)
    ]


def padding_at_random(lengths: Sequence[int], batch: int) -> float:
    """The share of padding in batches of so many, drawn at random and padded to their longest: what is to be expected.

    The mean over the longest's mean; it is at most l with the probability that all of a batch are.
    """
    batch = min(batch, len(lengths))
    longest = below = 0.0
    seen = 0
    for length, count in sorted(Counter(lengths).items()):
        seen += count
        upto = prod(max(seen - drawn, 0) / (len(lengths) - drawn) for drawn in range(batch))
        longest += length * (upto - below)
        below = upto
    return 1 - sum(lengths) / len(lengths) / longest


def padding_in_order(lengths: Sequence[int], batch: int) -> float:
    """The share of padding in batches of so many, taken in this order and padded to their longest."""
    batches = [lengths[first : first + batch] for first in range(0, len(lengths), batch)]
    return 1 - sum(lengths) / sum(len(one) * max(one) for one in batches)


def batches_told(rows: Sequence[Encoded], packs: Sequence[Pack], batch: int, *, flat: bool) -> dict[str, Any]:
    """What packing comes to, for the record; without packs, what it would be without. `flat`: nothing is padded."""
    told: dict[str, Any] = {"rows": len(rows)}
    at_random = padding_at_random([len(row.input_ids) for row in rows], batch)
    if not packs:
        return told | {"padding": at_random}
    left = 0.0 if flat else padding_at_random([len(one.input_ids) for one in packs], batch)
    return told | {"packs": len(packs), "padding": left, "padding_unpacked": at_random}
