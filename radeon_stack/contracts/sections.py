"""What the configurations of workloads are made of, and what a launch plan asks of one: does it take a model, data?"""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, field_validator

PACKAGE_PREFIX = "package:"
RANDOM_PREFIX = "random:"
HUB_PREFIX = "hub:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
RANDOM_MODELS = ("qwen3-moe",)
BIRTHDAY = "birthday"


class Section(BaseModel):
    """A table of a recipe."""

    # allow_inf_nan=False: a learning rate of nan is a typing error nobody wants to find after an hour.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TakesModel(Section):
    """A workload that is given a model: the plan mounts its folder and passes it as `--model`."""

    model: str = Field(
        min_length=1,
        description=f"a model folder; '{PACKAGE_PREFIX}NAME' for weights inside a Python package; "
        f"'{RANDOM_PREFIX}qwen3-moe' for a tiny one with random weights, to try the way; '{HUB_PREFIX}ORG/NAME' or "
        f"'{HUB_PREFIX}ORG/NAME@REVISION' from the Hugging Face hub, where the recipe allows the network",
    )

    @field_validator("model")
    @classmethod
    def _known(cls, model: str) -> str:
        if model.startswith(RANDOM_PREFIX) and model.removeprefix(RANDOM_PREFIX) not in RANDOM_MODELS:
            raise ValueError(", ".join(f"'{RANDOM_PREFIX}{name}'" for name in RANDOM_MODELS))
        if model.startswith(HUB_PREFIX):
            name, revision = hub_parts(model)
            if not HUB_ID.fullmatch(name) or not (revision is None or REVISION.fullmatch(revision)):
                raise ValueError(f"'{HUB_PREFIX}ORG/NAME' or '{HUB_PREFIX}ORG/NAME@REVISION'")
        return model


def hub_parts(model: str) -> tuple[str, str | None]:
    """The id and the revision (a branch, tag or commit; None: the hub's default) of `hub:ORG/NAME@REVISION`."""
    name, at, revision = model.removeprefix(HUB_PREFIX).partition("@")
    return name, revision if at else None


def is_made(model: str) -> bool:
    """Whether a model is no folder of the user's, but one that is made, or read, where the workload runs."""
    return model.startswith((PACKAGE_PREFIX, RANDOM_PREFIX, HUB_PREFIX))


class TakesSource(Section):
    """A workload that is given what a run made: the plan mounts its folder and passes it as `--source`."""

    source: str = Field(
        min_length=1,
        description="a run's folder, or one with an adapter, a merged model or GGUF files; usually given as --from",
    )


class MayMerge(TakesSource):
    """One that may have to merge an adapter into the base which that was trained on."""

    model: str = Field(
        "", description="the 16-bit base, where an adapter has to be merged; of a run's adapter it is the run's own"
    )


class Listens(Section):
    """A workload that answers on a port: the plan opens it to this machine alone, and has a key made to ask for."""

    port: int = Field(8000, ge=0, lt=1 << 16, description="of 127.0.0.1, and no other address; 0: one that is free")


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
