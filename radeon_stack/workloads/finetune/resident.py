"""Main memory, as the kernel tells it."""

from __future__ import annotations

import resource
from pathlib import Path


def resident() -> int:
    """Bytes of main memory that this process has now."""
    return _pages(1)


def most_resident() -> int:
    """The most that it ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available() -> int:
    """Bytes of main memory that it can still have: MemAvailable, or what its own limit (RLIMIT_AS) leaves."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = int(next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "0")) << 10
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return free if limit == resource.RLIM_INFINITY else max(0, min(free, limit - _pages(0)))


def _pages(field: int) -> int:
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()
