"""How a loader did beside transformers, and what of the limits does not hold. Pure: replies in, figures out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from radeon_stack.contracts.export import Limits

SHOWN = 3  # tokens told on either side of where two texts part


def values(reply: Mapping[str, Any], reference: Mapping[str, Any], expected: str) -> dict[str, float]:
    """The figures of a loader. Those of a comparison are left out of the reference's own."""
    found: dict[str, float] = {
        "perplexity": reply["perplexity"],
        "tokens_per_second": reply["tokens_per_second"],
    }
    if reply["memory"]:  # not told where a GPU computes: its memory is not the process's
        found["memory_bytes"] = reply["memory"]
    if reply["answers"] and expected:
        right = sum(is_right(text, expected) for text in reply["answers"])
        found |= {"right": right / len(reply["answers"]), "correct": right, "asked": len(reply["answers"])}
    if reply is reference:
        return found
    shares = [agreement(*pair) for pair in zip(reply["greedy"], reference["greedy"], strict=True)]
    steps = [
        abs(mine - theirs)
        for pair in zip(reply["first_logprobs"], reference["first_logprobs"], strict=True)
        for mine, theirs in zip(*pair, strict=True)
    ]
    if shares:
        found |= {"agreement": sum(shares) / len(shares), "first_token": sum(steps) / len(steps)}
    return found | {"perplexity_ratio": reply["perplexity"] / reference["perplexity"]}


def is_right(text: str, expected: str) -> bool:
    return expected.casefold() in text.casefold()


def agreement(mine: Sequence[int], theirs: Sequence[int]) -> float:
    """Share of the longer of two greedy answers that lies before the first token that differs; 1.0 for the same."""
    longest = max(len(mine), len(theirs))
    return parted_at(mine, theirs) / longest if longest else 1.0


def parted_at(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two answers begin with in common."""
    pairs = enumerate(zip(mine, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(mine), len(theirs)))


def other_tokens(reply: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """Where a loader's own tokenization is not transformers'; "" where it is: its answers would be another model's."""
    asked = zip(reply["prompt_ids"], reference["prompt_ids"], strict=True)
    texts = [("the held text", reply["text_ids"], reference["text_ids"])]
    texts += [(f"prompt {number}", mine, theirs) for number, (mine, theirs) in enumerate(asked, 1)]
    for name, mine, theirs in texts:
        if mine != theirs:
            place = parted_at(mine, theirs)
            here, there = mine[place : place + SHOWN], theirs[place : place + SHOWN]
            return f"token {place} of {name} is {_told(here)}, transformers' tokenizer has {_told(there)}"
    return ""


def _told(ids: Sequence[int]) -> str:
    return f"{', '.join(map(str, ids))} …" if ids else "not there"


def broken(
    found: Mapping[str, float], limits: Limits, reply: Mapping[str, Any], reference: Mapping[str, Any]
) -> Iterator[str]:
    """What of the limits does not hold, each in words with the place where it parted from transformers.

    A figure that is no finite number is within no limit, transformers' own neither.
    """
    for name, figure in found.items():
        if not math.isfinite(figure):
            yield f"{WORDS.get(name, name)} is {figure}: the weights are not right"
    for key, bound in limits.model_dump().items():
        name, _, side = key.rpartition("_")
        value = found.get(name)
        if (
            bound is None
            or value is None
            or not math.isfinite(value)
            or (value >= bound if side == "min" else value <= bound)
        ):
            continue
        least = "at least" if side == "min" else "at most"
        yield f"{WORDS[name]} is {value:.3g}, {least} {bound:g} is asked{_where(name, reply, reference)}"


WORDS = {
    "right": "the share of right answers",
    "agreement": "the share of greedy tokens that are transformers'",
    "first_token": "the first token's difference in log probability",
    "perplexity_ratio": "perplexity beside transformers'",
}


def _where(name: str, reply: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    if name == "right" and reply["answers"]:
        return f": it answers '{reply['answers'][0][:60]}'"
    if name != "agreement":
        return ""
    pairs = list(zip(reply["greedy"], reference["greedy"], strict=True))
    worst = min(range(len(pairs)), key=lambda one: agreement(*pairs[one]))
    return f": answer {worst + 1} parts at token {parted_at(*pairs[worst])}"


def limits_for(loader: str, limits: Limits, limits_of: Mapping[Any, Limits]) -> Limits:
    """Of `llama.cpp q8_0` those of `q8_0`, else of `llama.cpp`, else the common ones."""
    program, _, quantization = loader.partition(" ")
    return limits_of.get(quantization) or limits_of.get(program) or limits
