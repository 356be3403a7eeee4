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
class Port:
    """A port of this machine, at one of its addresses, and the workload's that it leads to."""

    address: str
    host: int
    container: int

    def __str__(self) -> str:
        """As docker, compose and quadlet write it."""
        return f"{self.address}:{self.host}:{self.container}"


@dataclass(frozen=True)
class Job:
    """What a run asks of a cluster. `gpus`, `cpus` are of each node; `minutes` None: what the partition gives.

    `after` is a dependency and `more` are further options, both in Slurm's words. `requeue`: it may be begun anew, when
    its time is up, after a node has died, or when others came first. Of an image: `images` is the home folder below
    which its file is, `download` the bytes of its layers, `plain` that its registry has no TLS, `storage` podman's.
    """

    nodes: int
    gpus: int
    cpus: int
    partition: str | None = None
    account: str | None = None
    minutes: int | None = None
    after: str | None = None
    requeue: bool = True
    more: tuple[str, ...] = ()
    images: str = ""
    download: int = 0
    plain: bool = False
    storage: str = ""


@dataclass(frozen=True)
class LaunchPlan:
    """What an engine carries out. Dry run, JSON and the real launch are renderings of it.

    `memory` and `shm` are bytes, `gpus` PCI addresses (of a partition with its number); `shared` that others may have
    them too. `subject` is what a probe's answers hold for (card, image), `choices` what was chosen by them. `parallel`
    is how `processes` share the work: none, data, or layers (one process over several GPUs). `client` is the command
    line that speaks to the engine: docker or podman; on a cluster what its nodes run containers with. `job` is what is
    asked of a cluster, which gives GPUs by number: `gpus` is empty then, and `processes` are those of all nodes.
    `unset` are variables that the workload must not see, `without` known issues that are not looked after. A field that
    an engine has no use for is empty, and its reason says so.
    `reasons` has one for each field, and may have more: `env.NAME`, `choices.NAME`, `job.NAME`, `mounts.TARGET`.
    """

    run_id: str
    run_dir: str
    engine: str
    client: str | None
    image: str | None
    gpus: tuple[str, ...]
    shared: bool
    subject: tuple[tuple[str, str], ...]
    choices: tuple[tuple[str, str], ...]
    parallel: str
    processes: int
    job: Job | None
    command: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    unset: tuple[str, ...]
    without: tuple[str, ...]
    secrets: tuple[str, ...]
    mounts: tuple[Mount, ...]
    devices: tuple[str, ...]
    groups: tuple[str, ...]
    user: str | None
    memory: int | None
    shm: int | None
    ipc: str | None
    network: str | None
    ports: tuple[Port, ...]
    cap_drop: tuple[str, ...]
    security: tuple[str, ...]
    read_only_root: bool
    tmpfs: tuple[str, ...]
    init: bool
    labels: tuple[tuple[str, str], ...]
    stop_seconds: int
    reasons: Mapping[str, str]

    def __post_init__(self) -> None:
        unexplained = set(self.field_names()) ^ {name for name in self.reasons if "." not in name}
        unexplained |= {name for name in self.reasons if "." in name and not self._has(*name.split(".", 1))}
        if unexplained:
            raise ValueError(f"a reason is owed for each field, and for no other: {sorted(unexplained)}")

    def _has(self, field: str, item: str) -> bool:
        """Is there an item of that name in that field? Of a mount the target is its name."""
        items = getattr(self, field, ())
        if isinstance(items, Job):
            return hasattr(items, item)
        return any(item == (i.target if isinstance(i, Mount) else i[0] if isinstance(i, tuple) else i) for i in items)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(cls) if f.name != "reasons")

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LaunchPlan:
        """The plan that `as_record` gave. KeyError or TypeError for anything else."""
        fields = {"job": {"value": None, "reason": "made before there were clusters"}, **record["fields"]}
        values = {name: fields[name]["value"] for name in cls.field_names()}
        for name, value in values.items():
            if isinstance(value, list):
                values[name] = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        values["mounts"] = tuple(Mount(**mount) for mount in values["mounts"])
        values["ports"] = tuple(Port(**port) for port in values["ports"])
        if values["job"] is not None:
            values["job"] = Job(**{**values["job"], "more": tuple(values["job"]["more"])})
        reasons = {name: fields[name]["reason"] for name in cls.field_names()}
        for name in cls.field_names():
            reasons |= {f"{name}.{item}": why for item, why in fields[name].get("items", {}).items()}
        return cls(**values, reasons=reasons)

    def as_record(self) -> dict[str, Any]:
        """`plan.json`: each field with its value and reason."""
        values = dataclasses.asdict(self)
        fields = {}
        for name in self.field_names():
            items = {key.split(".", 1)[1]: why for key, why in self.reasons.items() if key.startswith(f"{name}.")}
            fields[name] = {"value": values[name], "reason": self.reasons[name]} | ({"items": items} if items else {})
        return {"fields": fields}
