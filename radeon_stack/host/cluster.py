"""What a Slurm cluster has: its partitions, their nodes and limits, as its own commands tell them.

Only formats that Slurm 20.11 and 25 both have: `--json` came later, and its fields move with every release.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from radeon_stack.catalog.problems import nearest
from radeon_stack.errors import MachineError, UsageError
from radeon_stack.host.slurm import asked
from radeon_stack.host.sysroot import as_number
from radeon_stack.text import one_line

CONFIG = ("scontrol", "show", "config")
PARTITIONS = ("scontrol", "--oneliner", "show", "partition")
# One line for each node and partition. The reason is last: it is whatever somebody typed.
NODES = ("sinfo", "--noheader", "--Node", "--format=%R|%t|%c|%m|%N|%G|%E")
MOST_LINES = 100_000
GPU = "gpu"
UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}
BROKEN = ("down", "drain", "drng", "fail", "failg", "err", "inval", "unk", "boot^")


@dataclass(frozen=True)
class Gres:
    """A generic resource of a node: `gpu:r9700:2` is three words of it; without a type that is ""."""

    name: str
    type: str
    count: int


@dataclass(frozen=True)
class Member:
    """A node of a partition; memory in bytes, its state in sinfo's short words, the reason when it is out of use."""

    name: str
    state: str
    cpus: int
    memory: int
    gres: tuple[Gres, ...] = ()
    reason: str = ""

    @property
    def idle(self) -> bool:
        return self.state.rstrip("~#%+") == "idle"

    @property
    def broken(self) -> bool:
        """Does it take no work until somebody has seen to it?"""
        return self.state.rstrip("*$@!-^~#%+") in BROKEN or "*" in self.state

    @property
    def gpus(self) -> int:
        return sum(one.count for one in self.gres if one.name == GPU)


@dataclass(frozen=True)
class Partition:
    """A queue and its nodes. `cpus` and `memory` (bytes) are the least that a node has, `gres` the most.

    `max_minutes` is None without a limit; `preempt` is Slurm's word, "" where it is not told; times in seconds.
    """

    name: str
    default: bool
    up: bool
    max_minutes: int | None
    nodes: int
    idle: int
    cpus: int
    memory: int
    gres: tuple[Gres, ...] = ()
    preempt: str = ""
    grace: int = 0
    state: str = "UP"
    default_minutes: int | None = None
    members: tuple[Member, ...] = ()

    @property
    def gpus(self) -> int:
        """The most GPUs that a job can have on one node."""
        return max((member.gpus for member in self.members), default=sum(g.count for g in self.gres if g.name == GPU))


@dataclass(frozen=True)
class Cluster:
    """The cluster whose controller answers here; `settings` are those of slurm.conf and cgroup.conf, as it tells."""

    name: str
    version: str
    partitions: tuple[Partition, ...]
    settings: Mapping[str, str] = field(default_factory=dict)


def cluster() -> Cluster:
    """Ask the controller. MachineError when there is no client here, ControllerError when nothing answers."""
    return parse_cluster(asked(CONFIG), asked(PARTITIONS), asked(NODES))


def parse_cluster(config: str, partitions: str, nodes: str) -> Cluster:
    """From what CONFIG, PARTITIONS and NODES print."""
    settings = parse_settings(config)
    members = parse_members(nodes)
    found = (_partition(line, members) for line in _lines(partitions) if line.startswith("PartitionName="))
    return Cluster(
        settings.get("ClusterName", ""),
        settings.get("SLURM_VERSION", ""),
        tuple(one for one in found if one.name),
        settings,
    )


def partition_named(cluster: Cluster, name: str | None) -> Partition:
    """The partition of that name, else the default one. UsageError when there is none, MachineError when it is down."""
    found = find_partition(cluster, name)
    if not found.up:
        others = ", ".join(one.name for one in cluster.partitions if one.up)
        remedy = f"another one: --partition NAME ({others})" if others else "ask whoever runs the cluster"
        raise MachineError(f"the partition {found.name} is {found.state.lower()}", where="--partition", remedy=remedy)
    return found


def find_partition(cluster: Cluster, name: str | None) -> Partition:
    """As `partition_named`, whether it is up or not."""
    names = [one.name for one in cluster.partitions]
    if name is None:
        default = next((one for one in cluster.partitions if one.default), None)
        if default is None:
            raise UsageError(
                "the cluster has no default partition", where="--partition", remedy=f"name one of: {', '.join(names)}"
            )
        return default
    for one in cluster.partitions:
        if one.name == name:
            return one
    hint = nearest(name, names)
    allowed = f"allowed: {', '.join(sorted(names))}"
    raise UsageError(
        f"the cluster has no partition '{one_line(name)}'" + (f"; {hint}" if hint.startswith("did") else ""),
        where="--partition",
        remedy=allowed if names else "scontrol show partition: you may see none",
    )


def parse_settings(text: str) -> dict[str, str]:
    """The `Name = value` lines of `scontrol show config`, those of its part on cgroups among them."""
    found: dict[str, str] = {}
    for line in _lines(text):
        name, equals, value = line.partition("=")
        if equals and name.strip() and " " not in name.strip():
            found.setdefault(name.strip(), one_line(value, 400))
    return found


def parse_members(text: str) -> dict[str, list[Member]]:
    """Nodes by their partition; a line that is not whole is left out."""
    found: dict[str, list[Member]] = {}
    for line in _lines(text):
        words = line.split("|", 6)
        if len(words) < 6:
            continue
        partition, state, cpus, memory, name, gres = (word.strip() for word in words[:6])
        reason = one_line(words[6], 200) if len(words) > 6 else ""
        found.setdefault(partition, []).append(
            Member(
                one_line(name),
                one_line(state, 20),
                _count(cpus),
                _count(memory) << 20,
                parse_gres(gres),
                "" if reason in ("none", "None") else reason,
            )
        )
    return found


def parse_gres(text: str) -> tuple[Gres, ...]:
    """`gpu:r9700:2(S:0-1),nic:1`; the sockets in brackets, which may hold commas, do not matter here."""
    found = []
    for word in re.sub(r"\([^()]*\)", "", text).split(","):
        name, *rest = (part for part in word.strip().split(":") if part != "no_consume")
        if not name or name in ("N/A", "null"):
            continue
        count = _count(rest.pop()) if rest and rest[-1][:1].isdigit() else 1
        found.append(Gres(one_line(name, 40), one_line(":".join(rest), 40), count))
    return tuple(found)


def minutes(text: str) -> int | None:
    """Slurm's `days-hours:minutes:seconds`, `minutes:seconds` or `minutes`, rounded down; None: no limit."""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() and len(part) < 10 for part in (*parts, days or "0")):
        return None
    numbers = [int(part) for part in parts]
    if dash:  # days-hours, days-hours:minutes, days-hours:minutes:seconds
        hours, least, *_ = [*numbers, 0, 0]
        return int(days or 0) * 1440 + hours * 60 + least
    return numbers[0] * 60 + numbers[1] if len(numbers) == 3 else numbers[0]


def _partition(line: str, members: Mapping[str, list[Member]]) -> Partition:
    told = dict(word.split("=", 1) for word in line.split() if "=" in word)
    name = one_line(told["PartitionName"])
    own = tuple(members.get(name, ()))
    state = one_line(told.get("State", "UP"), 20)
    grace = as_number(told.get("GraceTime", ""))
    return Partition(
        name=name,
        default=told.get("Default") == "YES",
        up=state == "UP",
        max_minutes=minutes(told.get("MaxTime", "")),
        nodes=len(own),
        idle=sum(member.idle for member in own),
        cpus=min((member.cpus for member in own), default=0),
        memory=min((member.memory for member in own), default=0),
        gres=_most(gres for member in own for gres in member.gres),
        preempt=one_line(told.get("PreemptMode", ""), 40),
        grace=grace or 0,
        state=state,
        default_minutes=minutes(told.get("DefaultTime", "")),
        members=own,
    )


def _most(gres: Iterable[Gres]) -> tuple[Gres, ...]:
    counts: dict[tuple[str, str], int] = {}
    for one in gres:
        counts[one.name, one.type] = max(one.count, counts.get((one.name, one.type), 0))
    return tuple(Gres(name, kind, count) for (name, kind), count in counts.items())


def _count(text: str) -> int:
    """`16`, `16+` of several kinds of nodes, `503K` of an older sinfo; 0 for anything else."""
    text = text.rstrip("+")
    shift = UNITS.get(text[-1:], 0)
    return (as_number(text[:-1] if shift else text) or 0) << shift


def _lines(text: str) -> list[str]:
    return text.splitlines()[:MOST_LINES]
