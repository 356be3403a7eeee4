"""What a probe's answers hold for, how they are kept when it ends, and how a later run chooses by them."""

from __future__ import annotations

import importlib.metadata
import time
from dataclasses import replace
from pathlib import Path

from radeon_stack.catalog.load import Effective
from radeon_stack.contracts.options import AUTO, TakesOptions
from radeon_stack.errors import MachineError
from radeon_stack.host.choices import Choice as Taken
from radeon_stack.host.choices import choices
from radeon_stack.host.known_issues import Setup
from radeon_stack.host.probes import Found, Subject, load, save
from radeon_stack.host.selection import Selection
from radeon_stack.launch.choose import Choice
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.runs.events import Answered, read_events
from radeon_stack.runs.store import Run, cannot_write

WORKLOAD = "capabilities"
OPTIONS = "model_options"
# What this Python has where there is no image; another version of one may answer otherwise.
PACKAGES = ("torch", "triton", "pytorch-triton-rocm", "bitsandbytes", "flash-attn", "transformers")


def folder(home: Path) -> Path:
    return home / "probes"


def subject_of(selection: Selection, choice: Choice, rocm: str) -> Subject:
    """What an answer holds for: the cards, and the image by its id, or the environment, or this Python's packages."""
    gpus = selection.gpus
    cards = (("gfx", gpus[0].gfx if gpus else "cpu"), ("card", " + ".join(sorted({g.name for g in gpus})) or "cpu"))
    if choice.image is not None:
        return (*cards, ("image", choice.image.id))
    if choice.environment is not None:
        return (*cards, ("environment", choice.environment.folder.name))
    return (*cards, *((name, found) for name in PACKAGES if (found := _version(name))), ("rocm", rocm))


def found_for(home: Path, subject: Subject) -> Found:
    return load(folder(home), subject)


def decided(effective: Effective, found: Found, setup: Setup) -> tuple[Effective, tuple[Taken, ...]]:
    """The recipe with each 'auto' replaced by what is chosen, and the choices with their reasons.

    MachineError for an 'auto' of which nothing works. A recipe without options leaves nothing to choose.
    """
    config = effective.config
    if not isinstance(config, TakesOptions):
        return effective, ()
    options, taken, origin = config.model_options, [], dict(effective.origin)
    for choice in choices(found, setup):
        if choice.name == "attention" and effective.image_kind != effective.recipe.image:
            taken.append(Taken(choice.name, AUTO, "the backend chooses it itself"))
            continue
        asked = getattr(options, choice.name, None)
        place = f"config.{OPTIONS}.{choice.name}"
        if asked is None:
            taken += [choice] if choice.env or choice.name == "blas" else []
        elif asked != AUTO:
            taken.append(Taken(choice.name, asked, f"asked for ({effective.origin.get(place, 'the recipe')})"))
        elif not choice.value:
            raise MachineError(
                f"nothing works for {choice.name}; {choice.why}",
                where=place,
                remedy=f"probe again: radeon-stack run probe, or decide: --set {OPTIONS}.{choice.name}=…",
            )
        else:
            options = options.model_copy(update={choice.name: choice.value})
            origin[place] = f"chosen: {choice.why}"
            taken.append(choice)
    config = config.model_copy(update={OPTIONS: options})
    return replace(effective, config=config, origin=origin), tuple(taken)


def keep_answers(run: Run) -> None:
    """Keep what a probe has answered, however it ended. MachineError when it cannot be written."""
    recipe = run.read_json(run.config).get("recipe")
    if not isinstance(recipe, dict) or recipe.get("workload") != WORKLOAD:
        return
    answers = [event.answer for event in read_events(run.events) if isinstance(event, Answered)]
    try:
        subject = LaunchPlan.from_record(run.read_json(run.plan)).subject
    except (KeyError, TypeError, ValueError):
        return
    if not answers or not subject:
        return
    home = run.path.parent.parent
    try:
        save(folder(home), subject, answers, run=run.id, asked=time.time())
    except OSError as error:
        raise cannot_write(folder(home), error) from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
