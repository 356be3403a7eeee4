"""Which of a run's processes is this one? As torchrun tells it; alone without torchrun. Needs no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

MOST = 1024
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What torch raises when another process of the group has gone, by backend: NCCL's errors have types of their own.
LOST_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")
LOST_WORDS = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")


@dataclass(frozen=True)
class Rank:
    """One process of `count`; `local` is its number on this machine, which is its card's, of `beside` in all.

    `launch` is the same of all that were started together, and another the next time: a cluster's attempt, else
    torchrun's own. `attempt` is the cluster's alone.
    """

    number: int = 0
    local: int = 0
    count: int = 1
    launch: str = ""
    beside: int = 1
    attempt: str = ""

    @property
    def first(self) -> bool:
        """The one that tells, samples, saves and merges; the others only train."""
        return self.number == 0

    @property
    def alone(self) -> bool:
        return self.count == 1


ALONE = Rank()
ATTEMPT = "RADEON_STACK_ATTEMPT"  # what a cluster's job calls this attempt of it


def rank(environ: Mapping[str, str] = os.environ) -> Rank:
    """As torchrun's variables tell it; what makes no sense counts as being alone."""
    attempt = environ.get(ATTEMPT, "")
    try:
        number, local, count = (int(environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        beside = int(environ.get("LOCAL_WORLD_SIZE", count))
        found = Rank(number, local, count, attempt or environ.get("TORCHELASTIC_RUN_ID", ""), beside, attempt)
    except (KeyError, ValueError):
        return Rank(launch=attempt, attempt=attempt)
    sensible = 0 <= found.local <= found.number < found.count <= MOST and found.local < found.beside <= found.count
    return found if sensible else Rank(launch=attempt, attempt=attempt)


def end_with_the_launcher() -> None:
    """Be killed when torchrun is: it gives each process a session of its own, which a kill of its group misses."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def leave(code: int) -> NoReturn:
    """End this process; one of several at once, without the destructors of groups that are still held."""
    if not rank().alone:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def lost_another(error: BaseException) -> bool:
    """Does this error say no more than that another process of the run is gone?"""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & set(LOST_TYPES)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_WORDS)
    )
