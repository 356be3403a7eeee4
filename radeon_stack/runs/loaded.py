"""How programs that loaded an export did, in words: a line each, and the tables of the report. Texts are untrusted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from radeon_stack.catalog.platforms import load_platforms
from radeon_stack.runs.events import Event, Loaded
from radeon_stack.text import one_line

LENGTH = 240
REFERENCE = "transformers"


@dataclass(frozen=True)
class Conversation:
    """A prompt, and what each program answered: (loader, response, tokens, how many of them are transformers')."""

    prompt: str
    answers: list[tuple[str, str, int, int]]


@dataclass(frozen=True)
class Figure:
    """A column's name, the figure in it, and the words around the figure in a line."""

    name: str
    text: str
    phrase: str


def loaded_of(events: Iterable[Event]) -> list[Loaded]:
    """The last word on each program, in their order."""
    return list({event.loader: event for event in events if isinstance(event, Loaded)}.values())


def loaded_text(event: Loaded) -> str:
    """`llama.cpp q8_0: 5/5 right · 97 % of transformers' tokens · … · 45 tokens/s`"""
    if event.state == "missing":
        return "; ".join(filter(None, (f"{event.loader} is not installed where this ran", elsewhere(event))))
    told = [figure.phrase.format(figure.text) for figure in figures(event) if figure.text]
    figures_and_fault = filter(None, (" · ".join(told), *event.broken[:1]))
    return one_line(": ".join((event.loader, *figures_and_fault)), LENGTH)


def figures(event: Loaded) -> list[Figure]:
    """A program's figures, "" where it has none; the same columns for all."""
    found = event.values
    right = f"{found['correct']:.0f}/{found['asked']:.0f}" if "correct" in found and "asked" in found else ""
    return [
        Figure("taught answer", right, "{} right"),
        Figure("greedy", _of(found, "agreement", "{:.0%}"), "{} of transformers' tokens"),
        Figure("first token", _of(found, "first_token", "±{:.3f}"), "first token {}"),
        Figure("perplexity", _of(found, "perplexity", "{:.4g}"), "perplexity {}"),
        Figure("ratio", _of(found, "perplexity_ratio", "×{:.3f}"), "{}"),
        Figure("tokens/s", _of(found, "tokens_per_second", "{:.3g}"), "{} tokens/s"),
        Figure("memory", _size(found, "memory_bytes"), "{}"),
    ]


def elsewhere(event: Loaded) -> str:
    """Which images have a program that was missing; "" where it was not, or none has."""
    if event.state != "missing":
        return ""
    having = [p for p in load_platforms().values() for other in p.kinds.values() if event.loader in other.brings]
    releases = ", ".join(dict.fromkeys(f"--rocm {platform.rocm}" for platform in having))
    return f"images of {releases} have it, for {', '.join(str(p.gfx) for p in having)}" if having else ""


def files(event: Loaded) -> str:
    """The size of what it loaded."""
    return _size(event.values, "file_bytes")


def conversations(loaded: Sequence[Loaded]) -> list[Conversation]:
    """What they answered to the same prompts, side by side."""
    prompts = dict.fromkeys(turn.prompt for event in loaded for turn in event.turns)
    return [
        Conversation(
            prompt,
            [
                (event.loader, turn.response, turn.tokens, turn.agrees)
                for event in loaded
                for turn in event.turns
                if turn.prompt == prompt
            ],
        )
        for prompt in prompts
    ]


def verdict(loaded: Sequence[Loaded]) -> str:
    """The export in a sentence; "" where nothing loaded anything."""
    asked = [event for event in loaded if event.state in ("ok", "broken")]
    if not asked:
        return ""
    held = sum(event.state == "ok" for event in asked)
    right = [event for event in asked if "correct" in event.values]
    answers = f"; the taught answer {', '.join(_right(event) for event in right)}" if right else ""
    return f"loaded in {len(asked)} way{'s' * (len(asked) > 1)}, {held} of them within the limits{answers}"


def _right(event: Loaded) -> str:
    return f"{event.loader} {event.values['correct']:.0f}/{event.values.get('asked', 0):.0f}"


def _of(values: dict[str, Any], name: str, form: str) -> str:
    return form.format(values[name]) if name in values else ""


def _size(values: dict[str, Any], name: str) -> str:
    return f"{values[name] / (1 << 20):,.0f} MiB" if name in values else ""
