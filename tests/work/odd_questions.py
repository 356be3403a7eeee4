"""Questions that end in every way there is."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from radeon_stack.workloads.capabilities.steps import Measured, MissingError, Step, Steps


def fine(seed: int) -> Steps:
    yield Step("forward", lambda: Measured(1e-3, 1e-2, 0.5))
    yield Step("backward", lambda: Measured(2e-3, 1e-2, 1.5))


def segfault(seed: int) -> Steps:
    yield Step("forward", lambda: Measured(1e-3, 1e-2, 0.5))
    yield Step("backward", lambda: ctypes.string_at(0))  # type: ignore[arg-type,return-value]


def hang(seed: int, pids: str) -> Steps:
    """It leaves a child of its own behind, too."""

    def forever() -> Measured:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(pids).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
        return Measured()

    yield Step("copy", forever)


def wrong(seed: int) -> Steps:
    yield Step("forward", lambda: Measured(0.5, 1e-2))
    yield Step("backward", lambda: Measured(1e-3, 1e-2))


def not_finite(seed: int) -> Steps:
    yield Step("forward", lambda: Measured(math.nan, 1e-2))


def refused(seed: int) -> Steps:
    def run() -> Measured:
        raise RuntimeError("No available kernel. Aborting execution.\nand more lines")

    yield Step("forward", run)
    yield Step("backward", lambda: Measured(1e-3, 1e-2))


def nothing(seed: int) -> Steps:
    raise MissingError("a second GPU")
    yield


def gpu_fault(seed: int) -> Steps:
    def run() -> Measured:
        print(
            "Memory access fault by GPU node-1 (Agent handle: 0x5) on address 0x7f. Reason: Unknown.", file=sys.stderr
        )
        os.abort()

    yield Step("forward", run)


def noisy(seed: int) -> Steps:
    print("a library speaks on stdout")
    yield Step("forward", lambda: Measured(1e-3, 1e-2))


def quits(seed: int) -> Steps:
    yield Step("forward", lambda: os._exit(3))


def illegal_access(seed: int) -> Steps:
    def run() -> Measured:
        raise RuntimeError("HIP error: an illegal memory access was encountered")

    yield Step("forward", run)


def talkative(seed: int) -> Steps:
    yield Step("copies", lambda: Measured(0.0, 0.0, 1.0, "0→1 25.1 GB/s direct, " * 1000))
