"""Answers as lines for a person."""

from __future__ import annotations

from radeon_stack.text import one_line
from radeon_stack.workloads.capabilities.asking import Told


def line(told: Told) -> str:
    """One question: verdict, the time of each step, the largest error, and what there is to say."""
    times = ", ".join(f"{part['name']} {part['milliseconds']:.3g} ms" for part in told.parts if "milliseconds" in part)
    errors = [part["error"] for part in told.parts if "error" in part]
    error = f"error {max(errors):.1e}" if errors else ""
    more = told.detail or next((part["detail"] for part in told.parts if part.get("detail")), "")
    return one_line(f"{told.question:<26} {told.verdict:<9} {told.seconds:5.1f} s  ", 200).ljust(46) + one_line(
        "  ".join(filter(None, (times, error, more))), 160
    )


def counts(answers: list[Told]) -> dict[str, int]:
    """How many answers of each verdict."""
    found: dict[str, int] = {}
    for told in answers:
        found[told.verdict] = found.get(told.verdict, 0) + 1
    return found
