"""What a container on a cluster's node is given: the folder of all GPUs, of which Slurm leaves the job its own."""

from __future__ import annotations

import os

from radeon_stack.host.machine import KFD
from radeon_stack.host.node_record import NodeRecord
from radeon_stack.images.convert import node_storage
from radeon_stack.launch.access import KEEP_GROUPS, Access
from radeon_stack.launch.confinement import Reasoned, confined
from radeon_stack.launch.plan import Job

DRI = "/dev/dri"
INFINIBAND = "/dev/infiniband"
CLOSED = "Slurm's cgroup keeps the other GPUs closed (ConstrainDevices), and ROCR_VISIBLE_DEVICES says which are yours"


def node_access(runtime: str, job: Job, record: NodeRecord) -> Access:
    """The least with which the job's GPUs, and where there are several nodes its fast network, can be used."""
    devices = (KFD, DRI) if job.gpus else ()
    why = CLOSED if job.gpus else "no GPU is passed"
    if record.rdma and job.nodes > 1:
        devices, why = (*devices, INFINIBAND), f"{why}; {record.rdma[0].name} leads to the other nodes"
    rootless = os.getuid() != 0
    if runtime == "podman" and rootless:
        user, why_user = "0:0", "rootless: number 0 inside is you outside, with your rights and no more"
        groups, why_groups = ((KEEP_GROUPS,) if devices else ()), "your own groups, which the device nodes ask for"
    else:
        user, why_user = f"{os.getuid()}:{os.getgid()}", "the caller, so that the caller owns what is written"
        groups, why_groups = (), f"{runtime} keeps your own"
    return Access(
        devices=devices,
        devices_why=why,
        groups=groups,
        groups_why=why_groups,
        user=user,
        user_why=why_user,
        security=("no-new-privileges",),
        security_why="nothing inside can gain rights",
    )


def on_node(runtime: str, why: str, job: Job, record: NodeRecord, network: str) -> Reasoned:
    """The fields of a plan that say how its container is run on a node."""
    several = job.nodes > 1
    return confined(node_access(runtime, job, record)) | {
        "client": (runtime, why),
        "ipc": ("private", "a private /dev/shm serves; the node's own is never needed"),
        "network": (
            "host" if several or network != "none" else "none",
            "processes on several nodes meet over the nodes' own network"
            if several
            else ("the recipe asks for none" if network == "none" else "the recipe asks, and a node has no bridge"),
        ),
    }


def storage_of(runtime: str) -> str:
    """Podman's folder on a node; the others need none."""
    return node_storage(os.getuid()) if runtime == "podman" else ""
