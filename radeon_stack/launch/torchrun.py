"""Several processes of one workload on this machine: torchrun's command line, and the variables that it takes."""

from __future__ import annotations

import os

from radeon_stack.launch.plan import Job

LOOPBACK = "127.0.0.1"
LOOPBACK_NAME = "lo"


def started(python: str, processes: int) -> tuple[str, ...]:
    """What comes before the workload's module. `--`: torchrun would take our options for short forms of its own."""
    if processes == 1:
        return (python, "-m")
    torchrun = (python, "-m", "torch.distributed.run", "--standalone", "--local-addr", LOOPBACK)
    return (*torchrun, "--nproc-per-node", str(processes), "-m", "--")


def variables(processes: int, stop_seconds: int, job: Job | None) -> tuple[tuple[str, str, str], ...]:
    """Name, value and reason; nothing for one process. On a cluster each node knows its processors and interfaces."""
    if processes == 1:
        return ()
    wait = (
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
        str(max(stop_seconds - 10, 1)),
        "torchrun waits so many seconds for a clean stop (torch 2.13; older ones wait 30)",
    )
    if job is not None:
        return (wait,)
    threads = max(1, (os.cpu_count() or 1) // processes)
    near = "the processes are on one machine; a container without a network has no other interface"
    return (
        ("GLOO_SOCKET_IFNAME", LOOPBACK_NAME, near),
        ("NCCL_SOCKET_IFNAME", LOOPBACK_NAME, near),
        ("OMP_NUM_THREADS", str(threads), f"this machine's CPUs, shared by {processes} processes"),
        wait,
    )
