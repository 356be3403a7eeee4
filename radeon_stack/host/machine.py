"""The facts of this machine that a launch plan depends on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from radeon_stack.host.gpus import Gpu, gpus


@dataclass(frozen=True)
class Machine:
    """What was found; memory in bytes."""

    gpus: tuple[Gpu, ...]
    memory: int
    uid: int
    gid: int
    sysroot: Path = Path("/")


def probe(sysroot: Path = Path("/")) -> Machine:
    """Look at this machine, or at the tree below `sysroot` in its place."""
    return Machine(
        gpus=tuple(gpus(sysroot)),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        uid=os.getuid(),
        gid=os.getgid(),
        sysroot=sysroot,
    )
