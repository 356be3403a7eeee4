"""Where checkpoints are, and which of them are whole. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"^step-(\d+)$")


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A finished checkpoint: the step it was taken after, and its folder."""

    step: int
    path: Path


def checkpoints(artifacts: Path) -> Path:
    """The folder of finished checkpoints; each got its name, `step-N`, when it was whole."""
    return artifacts / "checkpoints"


def scratch(artifacts: Path) -> Path:
    """Where the trainer writes; a killed attempt may leave something half-written here, and only here."""
    return checkpoints(artifacts) / "trainer.partial"


def best_folder(artifacts: Path) -> Path:
    """The adapter that was evaluated best, kept while training may yet be stopped early."""
    return checkpoints(artifacts) / "best"


def last_checkpoint(artifacts: Path) -> Checkpoint | None:
    """The newest whole checkpoint."""
    found = (
        Checkpoint(int(match[1]), path)
        for path in checkpoints(artifacts).glob("step-*")
        if (match := _NAME.match(path.name))
    )
    return max(found, default=None)
