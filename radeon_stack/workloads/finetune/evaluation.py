"""What is held back to evaluate on, and what the evaluations say: which step was best, and is it time to stop?

Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.errors import UsageError

RECORD = "evaluation.json"  # beside the best adapter
T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: after which optimizer step, and the loss (nats a token)."""

    step: int
    loss: float


def require_evaluation(config: FinetuneConfig) -> None:
    """UsageError where training shall stop by evaluations that there are none of."""
    if config.train.early_stopping and not config.data.eval_share:
        raise UsageError(
            "early stopping needs evaluations",
            where="config.train.early_stopping",
            remedy="hold some of the data back: --set data.eval_share=0.05",
        )


def split(rows: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """(rows to learn, rows to evaluate on), both in their order; at least one of each. UsageError where that can't be.

    A row is drawn by a hash of the seed and its number: the same rows on every machine and after every resume. By
    `train.seed`, not `train.data_seed`: that one changes when a run is resumed after a GPU fault, and rows that were
    learnt before would be evaluated on after.
    """
    if not share:
        return list(rows), []
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise UsageError(
            f"{share:g} of {len(rows)} rows leaves nothing to learn", where="config.data.eval_share", remedy="lower it"
        )
    drawn = set(sorted(range(len(rows)), key=lambda number: _lot(seed, number))[:count])
    return (
        [row for number, row in enumerate(rows) if number not in drawn],
        [row for number, row in enumerate(rows) if number in drawn],
    )


def is_better(found: Evaluation, best: Evaluation | None) -> bool:
    """Lower than any before; a loss that is no number is never better."""
    return found.loss == found.loss and (best is None or found.loss < best.loss)


def out_of_patience(evaluations: Iterable[Evaluation], best: Evaluation | None, patience: int) -> bool:
    """Were there `patience` evaluations since the best one? Never where `patience` is 0."""
    since = {one.step for one in evaluations if best is None or one.step > best.step}
    return 0 < patience <= len(since)


def evaluations_in(history: Iterable[dict[str, Any]]) -> list[Evaluation]:
    """The evaluations in a trainer's log history."""
    return [Evaluation(int(entry["step"]), float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]


def write_record(folder: Path, best: Evaluation) -> None:
    """Write down beside an adapter which evaluation it had."""
    (folder / RECORD).write_text(json.dumps(asdict(best)) + "\n", encoding="utf-8")


def read_record(folder: Path) -> Evaluation | None:
    """The evaluation of a kept adapter; None where none is kept."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return Evaluation(int(found["step"]), float(found["loss"]))
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def _lot(seed: int, number: int) -> bytes:
    return blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
