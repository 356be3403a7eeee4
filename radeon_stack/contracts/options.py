"""What a recipe may leave to be chosen: by what a probe of the card measured, else as it always was."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from radeon_stack.contracts.sections import Section

AUTO: Literal["auto"] = "auto"


class ModelOptions(Section):
    """Which of several implementations a model is run with. A run replaces 'auto' before it starts."""

    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        AUTO, description="while training; 'auto': the fastest that the card's probe found right, else 'sdpa'"
    )


class TakesOptions(Section):
    """A workload that runs a model in one of several ways."""

    model_options: ModelOptions = ModelOptions()
