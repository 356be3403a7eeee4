"""How a loader did beside transformers: figures and limits, from replies alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.contracts.export import ExportConfig, Limits
from radeon_stack.runs import loaded
from radeon_stack.runs.events import Loaded, Turn, parse
from radeon_stack.workloads.export import quality

IDS = st.lists(st.integers(0, 9), max_size=8)


def reply(**changes: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "answers": ["January 1, 2058", "It was january 1, 2058."],
        "greedy": [[1, 2, 3, 4], [5, 6]],
        "prompt_ids": [[7, 8], [9]],
        "first_logprobs": [[-0.1, -3.0], [-0.5, -1.5]],
        "text_ids": [1, 2, 3],
        "perplexity": 20.0,
        "tokens_per_second": 10.0,
        "memory": 1 << 30,
    }
    return told | changes


def test_one_that_answers_as_transformers_does_agrees_wholly() -> None:
    reference = reply()
    found = quality.values(reply(), reference, "January 1, 2058")
    assert found["agreement"] == 1.0 and found["first_token"] == 0.0 and found["perplexity_ratio"] == 1.0
    assert (found["right"], found["correct"], found["asked"]) == (1.0, 2, 2)


def test_transformers_itself_is_compared_with_nothing() -> None:
    reference = reply()
    assert "agreement" not in quality.values(reference, reference, "")


@given(IDS, IDS)
def test_agreement_is_the_share_before_the_first_other_token(mine: list[int], theirs: list[int]) -> None:
    share = quality.agreement(mine, theirs)
    assert 0.0 <= share <= 1.0
    assert (share == 1.0) == (mine == theirs)
    at = quality.parted_at(mine, theirs)
    assert mine[:at] == theirs[:at] and (at == min(len(mine), len(theirs)) or mine[at] != theirs[at])


def test_a_limit_that_does_not_hold_is_told_with_where_it_parted() -> None:
    reference = reply()
    other = reply(greedy=[[1, 2, 9, 4], [5, 6]], answers=["I do not know.", "No."])
    found = quality.values(other, reference, "January 1, 2058")
    limits = Limits(right_min=1.0, agreement_min=0.9, first_token_max=0.1, perplexity_ratio_max=1.02)
    told = list(quality.broken(found, limits, other, reference))
    assert told == [
        "the share of right answers is 0, at least 1 is asked: it answers 'I do not know.'",
        "the share of greedy tokens that are transformers' is 0.75, at least 0.9 is asked: answer 1 parts at token 2",
    ]


def test_a_perplexity_that_is_not_a_number_is_never_within_a_limit() -> None:
    reference = reply()
    other = reply(perplexity=float("nan"))
    found = quality.values(other, reference, "")
    assert list(quality.broken(found, Limits(right_min=None, perplexity_ratio_max=1.5), other, reference))
    own = reply(perplexity=float("inf"))
    told = list(quality.broken(quality.values(own, own, ""), Limits(right_min=None), own, own))
    assert told == ["perplexity is inf: the weights are not right"]


def test_another_tokenization_is_told_with_its_place() -> None:
    told = quality.other_tokens(reply(text_ids=[1, 9, 3]), reply())
    assert told == "token 1 of the held text is 9, 3 …, transformers' tokenizer has 2, 3 …"
    told = quality.other_tokens(reply(prompt_ids=[[7, 8], [9, 9]]), reply())
    assert told == "token 1 of prompt 2 is 9 …, transformers' tokenizer has not there"
    assert quality.other_tokens(reply(), reply()) == ""


@pytest.mark.parametrize(("loader", "wanted"), [("llama.cpp q8_0", 2.0), ("llama.cpp bf16", 3.0), ("vllm", 1.0)])
def test_a_quantisations_limits_go_before_its_programs_and_these_before_the_common_ones(
    loader: str, wanted: float
) -> None:
    config = ExportConfig(
        source="x",
        limits=Limits(perplexity_ratio_max=1.0),
        limits_of={"q8_0": Limits(perplexity_ratio_max=2.0), "llama.cpp": Limits(perplexity_ratio_max=3.0)},
    )
    assert quality.limits_for(loader, config.limits, config.limits_of).perplexity_ratio_max == wanted


def test_what_loaded_it_is_a_line_and_its_answers_stand_beside_transformers() -> None:
    turns = (Turn(prompt="Hello?", response="Hi\x1b[2J there", tokens=4, agrees=2),)
    values = {"correct": 5.0, "asked": 5.0, "agreement": 0.5, "perplexity": 20.0, "tokens_per_second": 41.25}
    event = Loaded(loader="llama.cpp q8_0", program="llama.cpp", values=values, turns=turns)
    again = parse(event.model_dump_json().encode())
    assert again == event
    line = loaded.loaded_text(event)
    assert line == "llama.cpp q8_0: 5/5 right · 50% of transformers' tokens · perplexity 20 · 41.2 tokens/s"
    assert loaded.conversations([event])[0].answers == [("llama.cpp q8_0", turns[0].response, 4, 2)]
    assert loaded.verdict([event]) == (
        "loaded in 1 way, 1 of them within the limits; the taught answer llama.cpp q8_0 5/5"
    )


def test_what_was_missing_is_told_with_the_images_that_have_it() -> None:
    assert loaded.loaded_text(Loaded(loader="vllm", state="missing")) == (
        "vllm is not installed where this ran; "
        "images of --rocm 7.14 have it, for gfx1100, gfx1101, gfx1151, gfx1200, gfx1201"
    )
    assert loaded.loaded_text(Loaded(loader="llama.cpp", state="missing")) == (
        "llama.cpp is not installed where this ran"
    )
    assert loaded.elsewhere(Loaded(loader="vllm")) == ""


def test_a_loader_of_a_hostile_name_is_no_event() -> None:
    told = json.loads(Loaded(loader="vllm").model_dump_json()) | {"loader": "<script>"}
    assert parse(json.dumps(told).encode()) is None
