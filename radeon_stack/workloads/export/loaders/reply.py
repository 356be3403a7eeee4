"""What a loader answers: plain data, as it travels between processes."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LARGEST = 700.0  # whose exp is still finite
LIKELIEST = 10  # of a first token, whose log probabilities are compared


@dataclass
class Reply:
    """`answers`: sampled, to the taught prompt. The rest is a list by prompt, or of the held text.

    `prompt_ids` and `text_ids` are the loader's own tokenization; `greedy` token ids up to the end of the turn;
    `first_ids` the ids whose log probabilities `first_logprobs` has, natural logarithm. `perplexity` of the text from
    its second token on. `memory` is bytes of main memory at most, before perplexity was measured; 0 where a
    GPU computes.
    """

    program: str
    device: str
    answers: list[str] = field(default_factory=list)
    prompt_texts: list[str] = field(default_factory=list)
    prompt_ids: list[list[int]] = field(default_factory=list)
    end_ids: list[int] = field(default_factory=list)
    greedy: list[list[int]] = field(default_factory=list)
    greedy_texts: list[str] = field(default_factory=list)
    first_ids: list[list[int]] = field(default_factory=list)
    first_logprobs: list[list[float]] = field(default_factory=list)
    text_ids: list[int] = field(default_factory=list)
    perplexity: float = 0.0
    tokens_per_second: float = 0.0
    memory: int = 0

    def as_data(self) -> dict[str, Any]:
        return asdict(self)


class Pace:
    """Tokens a second over several greedy answers, one after the other."""

    def __init__(self) -> None:
        self._tokens, self._seconds = 0, 0.0

    def timed(self, ask: Any) -> Any:
        """What `ask()` gives; its length in tokens counts."""
        begun = time.monotonic()
        found = ask()
        self._seconds += time.monotonic() - begun
        self._tokens += len(found)
        return found

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0


def up_to_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Token ids before the first one that ends the turn."""
    known = set(ends)
    return list(ids[: next((place for place, one in enumerate(ids) if one in known), len(ids))])


def to_perplexity(loss: float) -> float:
    """exp of a mean negative log likelihood; inf above what a float holds."""
    return math.exp(loss) if loss < LARGEST else math.inf if loss >= LARGEST else math.nan


def resident() -> int:
    """Bytes: the most that this process had in memory. getrusage's begins with what the one had that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) << 10 if found else 0
