"""Gradient checkpointing, chosen: activations are computed again only as far as a card's memory demands it.

Computing a layer again costs a forward pass more, a third of a step's time where all layers are; what is spared is
memory alone. So it is the fewest layers whose run surely fits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from radeon_stack.catalog.load import Effective
from radeon_stack.catalog.sizes import format_size
from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.contracts.options import AUTO
from radeon_stack.errors import UsageError
from radeon_stack.host.choices import Choice
from radeon_stack.host.gpus import Gpu
from radeon_stack.launch.placement import Placement, needed, room, surely

# (gradient_checkpointing, every_n_layers) in words, the quickest first; the last is taken whether it fits or not.
ALL = ("every layer", True, 1)
SETTINGS = (
    ("no layer", False, 1),
    ("every 8th layer", True, 8),
    ("every 4th layer", True, 4),
    ("every 2nd layer", True, 2),
    ALL,
)
KEYS = ("gradient_checkpointing", "every_n_layers")


def recomputed(
    effective: Effective, placement: Placement, gpus: tuple[Gpu, ...]
) -> tuple[Effective, tuple[Choice, ...]]:
    """The recipe with `train.gradient_checkpointing` decided where it is "auto", and the choice with its reason."""
    if not isinstance(effective.config, FinetuneConfig):
        return effective, ()
    config, choice = chosen(effective.config, placement, gpus)
    if choice is None:
        return effective, ()
    origin = dict(effective.origin) | {f"config.train.{key}": f"chosen: {choice.why}" for key in KEYS}
    return replace(effective, config=config, origin=origin), (choice,)


def chosen(config: FinetuneConfig, placement: Placement, gpus: tuple[Gpu, ...]) -> tuple[FinetuneConfig, Choice | None]:
    """The same of a configuration alone; no choice where somebody else decided."""
    if config.train.gradient_checkpointing != AUTO:
        return config, None
    (value, *settings), why = _fewest(config, placement, gpus)
    return _with(config, settings), Choice("recompute", value, why)


def _fewest(config: FinetuneConfig, placement: Placement, gpus: tuple[Gpu, ...]) -> tuple[tuple[str, bool, int], str]:
    if config.backend == "unsloth":
        return ALL, "unsloth's own checkpointing, of which nothing is estimated"
    least = min((room(gpu) for gpu in gpus), default=0)
    if not least:
        return ALL, "the memory there is is not known"
    sizes = []
    for setting in SETTINGS:
        try:
            sizes.append(needed(_with(config, setting[1:]), placement, gpus))
        except UsageError as error:
            return ALL, f"nothing is estimated: {error.what}"
        if surely(sizes[-1], least):
            return setting, f"about {format_size(sizes[-1])} of the {format_size(least)} a card has" + _otherwise(sizes)
    return ALL, f"about {format_size(sizes[-1])} of the {format_size(least)} a card has"


def _otherwise(sizes: list[int]) -> str:
    return f"; {format_size(sizes[-2])} with fewer" if len(sizes) > 1 else ""


def _with(config: FinetuneConfig, settings: Any) -> FinetuneConfig:
    train = config.train.model_copy(update=dict(zip(KEYS, settings, strict=True)))
    return config.model_copy(update={"train": train})
