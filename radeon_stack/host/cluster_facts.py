"""All that `doctor --engine slurm` judges by: the cluster, one partition, and what a node of it told."""

from __future__ import annotations

import os
import pwd
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from radeon_stack.errors import MachineError
from radeon_stack.host import slurm
from radeon_stack.host.bundle import opened
from radeon_stack.host.cluster import Cluster, Member, Partition, cluster, find_partition
from radeon_stack.host.machine import Machine, look
from radeon_stack.host.node_record import NodeRecord
from radeon_stack.host.nodes import NodeError, NodeFacts, node_of
from radeon_stack.text import one_line

COMMANDS = ("sinfo", "scontrol", "sbatch", "srun", "squeue", "scancel")
# slurm.conf(5), AccountingStorageEnforce: each of these asks for an association of the user.
ENFORCING = frozenset({"associations", "limits", "qos", "safe", "wckeys", "all", "1", "2", "3"})


@dataclass(frozen=True)
class ClusterFacts:
    """What was found. None: not known, and `why_not` or `node_error` say why."""

    missing: tuple[str, ...] = ()
    """Slurm's commands that are not here."""
    cluster: Cluster | None = None
    why_not: str = ""
    partition: Partition | None = None
    user: str = ""
    accounts: tuple[str, ...] | None = None
    node: NodeRecord | None = None
    bundle: Path | None = None
    machine: Machine | None = None
    node_error: NodeError | None = None

    @property
    def member(self) -> Member | None:
        """What Slurm knows of the node that was asked."""
        members = self.partition.members if self.partition else ()
        return next((one for one in members if self.node and one.name == self.node.node), None)

    @property
    def enforces(self) -> bool:
        """Does the cluster turn away users that no account has?"""
        words = self.cluster.settings.get("AccountingStorageEnforce", "") if self.cluster else ""
        return bool(ENFORCING & set(words.lower().split(",")))


def gather_cluster(home: Path, name: str | None, wait_seconds: int) -> ClusterFacts:
    """Ask the controller, then a node of the partition. UsageError when there is no such partition."""
    missing = tuple(command for command in COMMANDS if shutil.which(command) is None)
    if missing:
        return ClusterFacts(missing)
    try:
        found = cluster()
    except MachineError as error:
        return ClusterFacts(why_not=error.what)
    partition = find_partition(found, name)
    user = user_name()
    facts = ClusterFacts(cluster=found, partition=partition, user=user)
    if facts.enforces:
        facts = replace(facts, accounts=accounts(found.name, user))
    if not partition.up:
        return facts
    try:
        node = node_of(home, found, partition, min(1, partition.gpus), anew=True, wait_seconds=wait_seconds)
        machine = machine_of(node)
    except NodeError as error:
        return replace(facts, node_error=error)
    except MachineError as error:
        return replace(facts, node_error=NodeError(error.what, where=error.where, remedy=error.remedy))
    return replace(facts, node=node.record, bundle=node.machine, machine=machine)


def machine_of(node: NodeFacts) -> Machine:
    """The node as a machine, read out of its bundle."""
    with opened(str(node.machine)) as tree:
        return look(tree)


def accounts(cluster_name: str, user: str) -> tuple[str, ...] | None:
    """The user's accounts; None where nobody can be asked for them."""
    asked = ["sacctmgr", "--noheader", "--parsable2", "--readonly", "show", "associations"]
    try:
        said = slurm.asked([*asked, f"user={user}", f"cluster={cluster_name}", "format=account"])
    except MachineError:
        return None
    return tuple(dict.fromkeys(one_line(line) for line in said.splitlines() if line.strip()))


def user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
