"""Gradient checkpointing, chosen: activations are computed again only as far as a card's memory demands it.

Computing a layer again costs a forward pass more, a third of a step's time where all layers are; what is spared is
memory alone. So it is the fewest layers whose run surely fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from radeon_stack.catalog.sizes import format_size
from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.errors import UsageError

# (gradient_checkpointing, every_n_layers), the quickest first; the last one is taken whether it fits or not.
ALL = (True, 1)
SETTINGS = ((False, 1), (True, 8), (True, 4), (True, 2), ALL)


def fewest(
    config: FinetuneConfig, needed: Callable[[FinetuneConfig], int], fits: Callable[[int], bool]
) -> tuple[dict[str, Any], str]:
    """Settings of `train`, and the reason. `needed`: bytes a card of a recipe, UsageError where that is not known."""
    try:
        for setting in SETTINGS[:-1]:
            size = needed(with_setting(config, setting))
            if fits(size):
                return _named(setting), f"that takes about {format_size(size)} a card, which surely fits"
    except UsageError as error:
        return _named(ALL), f"nothing is estimated: {error.what}"
    return _named(ALL), f"with every second layer kept it would be {format_size(size)} a card"


def with_setting(config: FinetuneConfig, setting: tuple[bool, int]) -> FinetuneConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=_named(setting))})


def _named(setting: tuple[bool, int]) -> dict[str, Any]:
    checkpointing, every = setting
    return {"gradient_checkpointing": checkpointing, "every_n_layers": every}
