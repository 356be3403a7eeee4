"""What `--from` names: a run by its id, the last one that made what is wanted, or a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from radeon_stack.atomic import PARTIAL
from radeon_stack.contracts.sections import is_made
from radeon_stack.errors import UsageError
from radeon_stack.runs.store import Run, RunStore
from radeon_stack.runs.sweep_table import by_what, judged_by, ranked, rows_of

LAST = "last"


def find_source(
    store: RunStore, wanted: str, makes: Sequence[str], say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """`source` and, of a run, the `model` it began with, for a workload's configuration.

    makes: names below `artifacts/`, any of which will do. Of a sweep the best member that has one is taken, which
    `say` is told. UsageError where nothing has one.
    """
    if wanted == LAST:
        run = _newest(store, makes)
    elif os.sep in wanted or Path(wanted).is_dir():
        folder = Path(os.path.abspath(Path(wanted).expanduser()))
        run = Run(folder)
        if not run.is_sweep and not (run.config.is_file() and run.artifacts.is_dir()):
            return {"source": str(folder)}  # a model's or an adapter's own
    else:
        run = store.find(wanted)
    if run.is_sweep or (wanted == LAST and store.sweep_of(run)):
        run = _best(store.sweep_of(run) or run, makes, say)
    if not _made(run, makes):
        raise UsageError(f"{run.id} has made no {_either(makes)}", where="--from", remedy="see: radeon-stack runs list")
    return {"source": str(run.path), **_base(run)}


def _newest(store: RunStore, makes: Sequence[str]) -> Run:
    """`last` is the last that can be taken: not the check of an export that came after it."""
    for run in reversed(list(store)):
        if _made(run, makes):
            return run
    raise UsageError(
        f"no run in {store.folder} has made {_either(makes)}",
        where="--from",
        remedy="make one: radeon-stack run train-llama --preset demo",
    )


def _best(sweep: Run, makes: Sequence[str], say: Callable[[str], None]) -> Run:
    """The best member that has made it; of those without any loss the first. The sweep itself where there is none."""
    rows = rows_of(sweep)
    ordered = [*ranked(rows), *(row for row in rows if judged_by(row) is None)]
    for row in ordered:
        run = Run(sweep.path.with_name(row.run))
        if _made(run, makes):
            loss = f", {by_what(row)} {judged_by(row):.4g}" if judged_by(row) is not None else ""
            say(f"from {run.id}, the best member of the sweep that has made it: {row.label}{loss}")
            return run
    return sweep


def _made(run: Run, makes: Sequence[str]) -> bool:
    return any(is_whole(run.artifacts / name) for name in makes)


def is_whole(part: Path) -> bool:
    """Whether a folder of artifacts was written to its end: one that a step has just begun holds nothing yet."""
    return part.is_dir() and any(file.is_file() and PARTIAL not in file.name for file in part.iterdir())


def _either(makes: Sequence[str]) -> str:
    return " or ".join(f"artifacts/{name}" for name in makes)


def _base(run: Run) -> dict[str, str]:
    """The run's base, where it is still there: a merged model does without."""
    recipe = run.read_json(run.config).get("recipe")
    config = recipe.get("config") if isinstance(recipe, dict) else None
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, str) or not model:
        return {}
    return {"model": model} if is_made(model) or Path(model).is_dir() else {}
