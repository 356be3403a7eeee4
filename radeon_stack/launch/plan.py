"""The LaunchPlan: everything about a launch, decided once, each field with its reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mount:
    """A folder or file of the host at a place in the container."""

    source: str
    target: str
    read_only: bool


@dataclass(frozen=True)
class LaunchPlan:
    """What an engine carries out. Dry run, JSON and the real launch are renderings of it.

    `memory` and `shm` are bytes. A field that an engine has no use for is empty, and its reason says so.
    """

    run_id: str
    run_dir: str
    engine: str
    image: str | None
    command: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    secrets: tuple[str, ...]
    mounts: tuple[Mount, ...]
    devices: tuple[str, ...]
    groups: tuple[int, ...]
    user: str | None
    memory: int | None
    shm: int | None
    ipc: str | None
    network: str | None
    cap_drop: tuple[str, ...]
    security: tuple[str, ...]
    read_only_root: bool
    tmpfs: tuple[str, ...]
    init: bool
    labels: tuple[tuple[str, str], ...]
    stop_seconds: int
    reasons: Mapping[str, str]

    def __post_init__(self) -> None:
        unexplained = set(self.field_names()) ^ set(self.reasons)
        if unexplained:
            raise ValueError(f"a reason is owed for each field, and for no other: {sorted(unexplained)}")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(cls) if f.name != "reasons")

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LaunchPlan:
        """The plan that `as_record` gave. KeyError or TypeError for anything else."""
        fields = record["fields"]
        values = {name: fields[name]["value"] for name in cls.field_names()}
        for name, value in values.items():
            if isinstance(value, list):
                values[name] = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        values["mounts"] = tuple(Mount(**mount) for mount in values["mounts"])
        return cls(**values, reasons={name: fields[name]["reason"] for name in cls.field_names()})

    def as_record(self) -> dict[str, Any]:
        """`plan.json`: each field with its value and reason."""
        values = dataclasses.asdict(self)
        return {"fields": {name: {"value": values[name], "reason": self.reasons[name]} for name in self.field_names()}}
