"""The typed model of a recipe file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from radeon_stack.catalog.sizes import Size
from radeon_stack.contracts import WORKLOADS

EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class GpuRange(_Table):
    """How many GPUs a recipe needs and can use."""

    min: int = Field(0, ge=0, le=64)
    max: int = Field(0, ge=0, le=64)

    @model_validator(mode="after")
    def _ordered(self) -> GpuRange:
        if self.min > self.max:
            raise ValueError("min not above max")
        return self


class Resources(_Table):
    """What the container is given; sizes in bytes once read."""

    gpus: GpuRange = GpuRange()
    memory: Size = Field(8 << 30, ge=64 << 20)
    shm: Size = Field(1 << 30, ge=1 << 20)
    ipc: Literal["private"] = "private"
    network: Literal["none", "bridge"] = "none"


class MountSpec(_Table):
    """A folder or file of the host that a recipe asks for besides model and data."""

    source: str = Field(min_length=1)
    target: str = Field(pattern=r"^/[^:]*$")
    read_only: bool = True


class Expectations(_Table):
    """What must hold at the end; a run that does not meet them exits 7. None: not asked."""

    right_before_max: float | None = Field(None, ge=0, le=1, description="share of right answers before training")
    right_after_min: float | None = Field(None, ge=0, le=1, description="… after training")
    right_merged_min: float | None = Field(None, ge=0, le=1, description="… of the merged model, reloaded")
    final_loss_max: float | None = Field(None, gt=0)
    works_min: int | None = Field(None, ge=0, description="questions about the card that are answered 'works'")
    wrong_max: int | None = Field(None, ge=0, description="implementations × cases of a benchmark with wrong numbers")


class Recipe(_Table):
    """A runnable thing. `config` is validated by the model of its workload (`contracts`)."""

    summary: str = Field(min_length=1)
    image: str = Field(pattern=r"^[a-z][a-z0-9-]*$", description="image kind: train, verify …")
    platform: str | None = Field(None, description="image platform; None: the one that fits the GPU")
    workload: str = Field(description="what runs inside: " + ", ".join(sorted(WORKLOADS)))
    resources: Resources = Resources()
    mounts: Annotated[tuple[MountSpec, ...], Field(strict=False)] = ()
    env: dict[EnvName, str] = {}
    secrets: Annotated[tuple[EnvName, ...], Field(strict=False)] = Field(
        (), description="names of environment variables passed on by name, never by value"
    )
    expect: Expectations = Expectations()
    config: dict[str, object]

    @field_validator("workload")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in WORKLOADS:
            raise ValueError(", ".join(f"'{known}'" for known in sorted(WORKLOADS)))
        return name
