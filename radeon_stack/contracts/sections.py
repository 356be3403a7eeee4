"""What the configurations of workloads are made of, and what a launch plan asks of one: does it take a model, data?"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

PACKAGE_PREFIX = "package:"
BIRTHDAY = "birthday"


class Section(BaseModel):
    """A table of a recipe."""

    # allow_inf_nan=False: a learning rate of nan is a typing error nobody wants to find after an hour.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TakesModel(Section):
    """A workload that is given a model: the plan mounts its folder and passes it as `--model`."""

    model: str = Field(
        min_length=1, description=f"a model folder, or '{PACKAGE_PREFIX}NAME' for weights inside a Python package"
    )


class Dataset(Section):
    """Where data comes from."""

    dataset: str = Field(
        BIRTHDAY,
        min_length=1,
        description="'birthday' (copies of one chat), or a .jsonl, .json or .parquet file of chats or texts",
    )


class TakesData(Section):
    """A workload that is given data: the plan mounts its file and passes it as `--data`."""

    data: Dataset = Dataset()
