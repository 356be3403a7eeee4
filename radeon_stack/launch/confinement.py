"""What every container of ours is held to, whatever runs in it."""

from __future__ import annotations

from typing import Any

from radeon_stack.launch.access import Access

SCRATCH = "/tmp"  # noqa: S108 - the container's own, in memory
Reasoned = dict[str, tuple[Any, str]]


def confined(access: Access) -> Reasoned:
    """The fields of a plan that give rights, or take them, each with its reason."""
    return {
        "devices": (access.devices, access.devices_why),
        "groups": (access.groups, access.groups_why),
        "user": (access.user, access.user_why),
        "security": (access.security, access.security_why),
        "cap_drop": (("ALL",), "it needs no capability"),
        "read_only_root": (True, "only what is mounted for writing and /tmp are written"),
        "tmpfs": ((SCRATCH,), "scratch that leaves with the container"),
        "init": (True, "signals reach the workload, and no zombie stays"),
    }
