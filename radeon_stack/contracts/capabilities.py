"""The `capabilities` workload: what it can be told, and how an answer reads on both sides of the container's wall."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Literal, get_args

from pydantic import Field

from radeon_stack.contracts.sections import Section

MAX_PARTS = 8
MAX_DETAIL = 600
Verdict = Literal["works", "wrong", "crashed", "timed out", "failed", "missing", "not asked"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
Text = Annotated[str, Field(max_length=MAX_DETAIL)]
Positive = Annotated[float, Field(ge=0.0, le=1e9)]
Pattern = Annotated[str, Field(pattern=r"^[a-z0-9_.*?]{1,64}$")]


class Part(Section):
    """A step of a question: forward, backward, a copy … `error` is relative to a float64 reference.

    `tolerance` is what `error` may be, `milliseconds` the median of a few calls once warm.
    """

    name: str = Field(pattern=r"^[a-z0-9_. ]{1,32}$")
    verdict: Verdict
    detail: Text = ""
    error: Positive | None = None
    tolerance: Positive | None = None
    milliseconds: Positive | None = None


class Answer(Section):
    """What became of a question, which had a process of its own. `seconds` it took, without importing."""

    question: str = Field(pattern=r"^[a-z0-9_.]{1,64}$")
    verdict: Verdict
    detail: Text = ""
    seconds: Positive = 0.0
    parts: Annotated[tuple[Part, ...], Field(strict=False, max_length=MAX_PARTS)] = ()

    def milliseconds(self) -> dict[str, float]:
        """The time of each step that was timed."""
        return {part.name: part.milliseconds for part in self.parts if part.milliseconds is not None}

    def error(self) -> float | None:
        """The largest of its steps' relative errors."""
        return max((part.error for part in self.parts if part.error is not None), default=None)

    def remark(self) -> str:
        """What there is to say, by the answer or else by its steps."""
        told = self.detail or "; ".join(dict.fromkeys(part.detail for part in self.parts if part.detail))
        return " ".join(told.split())

    def words(self) -> str:
        """The answer on a line: verdict, times, error, remark. Untrusted text is in it."""
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in self.milliseconds().items())
        error = "" if self.error() is None else f"error {self.error():.1e}"
        return f"{self.question:<24} {self.verdict:<9}  " + "  ".join(filter(None, (times, error, self.remark())))


def counts(answers: Iterable[Answer]) -> dict[str, int]:
    """How many answers of each verdict, those that work first."""
    found = Counter(answer.verdict for answer in answers)
    return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}


class CapabilitiesConfig(Section):
    """What is asked, and for how long at most."""

    questions: Annotated[tuple[Pattern, ...], Field(strict=False, min_length=1)] | Literal["all"] = Field(
        "all", description="'all', or names as the report has them; 'sdpa*' means all that begin so"
    )
    timeout: int = Field(60, ge=1, le=3600, description="seconds for each question, once its imports are done")
    seed: int = Field(0, ge=0, lt=1 << 32, description="of the random operands")
