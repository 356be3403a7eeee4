"""`python -m radeon_stack.workloads.node --nodes N --processes P -- MODULE …`: what a cluster starts on each node.

It has torchrun start this node's processes and meet those of the others, at the node from which they were started; and
it hands on whatever asks for a stop, once: torchrun, told twice, gives up waiting for them to save. Needs no torch.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from radeon_stack.workloads.ranks import ATTEMPT, end_with_the_launcher

# Below the ports that Linux gives out by itself (32768 and up): one a job, so that jobs on one node do not meet.
FIRST_PORT, PORTS = 15000, 10000
LOOPBACK, LOOPBACK_NAME = "127.0.0.1", "lo"
SIOCGIFADDR = 0x8915  # linux/sockios.h
# How long the first waits for the last: nodes of a large job start minutes apart, each reads torch from a shared disk.
JOIN_SECONDS = 1800
READ_SECONDS = 600  # and how long the others look for the first one, whose Python may still be loading
PATIENCE = f"join_timeout={JOIN_SECONDS},read_timeout={READ_SECONDS}"
FIRST_VISIBLE = "ROCR_VISIBLE_DEVICES"
OTHER_VISIBLE = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class Place:
    """This node among a job's: its number, where all meet, and its own address and interface towards there."""

    number: int
    head: str
    port: int
    address: str
    interface: str


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True, help="on this node")
    parser.add_argument("work", nargs="+", help="the workload's module and its arguments")
    known = parser.parse_args(argv)
    end_with_the_launcher()
    several = known.nodes * known.processes > 1
    place = place_of(environ, known.nodes) if several else None
    return carried_out(
        command(place, known.nodes, known.processes, known.work, environ),
        seen(environ) | (variables(place, known.processes, environ) if place else {}),
    )


def seen(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables of which one says which GPUs are this job's. Slurm may set several, and each counts on top of the last:
    gres.conf(5), Flags."""
    ours = environ.get(FIRST_VISIBLE)
    return {name: text for name, text in environ.items() if ours is None or name not in OTHER_VISIBLE}


def place_of(environ: Mapping[str, str], nodes: int) -> Place:
    """As Slurm tells it: srun(1), OUTPUT ENVIRONMENT VARIABLES. The address is the one that leads to the first node."""
    port = FIRST_PORT + int(environ.get("SLURM_JOB_ID", "0")) % PORTS
    if nodes == 1:  # whose container may have no other network
        return Place(0, LOOPBACK, port, LOOPBACK, LOOPBACK_NAME)
    head = environ.get("SLURM_LAUNCH_NODE_IPADDR", LOOPBACK)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, port))  # sends nothing
        address = str(probe.getsockname()[0])
    return Place(int(environ.get("SLURM_NODEID", "0")), head, port, address, interface_of(address))


def interface_of(address: str) -> str:
    """The interface that has an IPv4 address; "" where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no IPv4 address
                request = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, request)
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return ""


def command(
    place: Place | None, nodes: int, processes: int, work: Sequence[str], environ: Mapping[str, str]
) -> list[str]:
    """torchrun for several processes, else the workload itself."""
    if place is None:
        return [sys.executable, "-m", *work]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(nodes), "--nproc-per-node", str(processes)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{place.head}:{place.port}"),
        *("--rdzv-id", environ.get(ATTEMPT, "radeon-stack")),
        *("--rdzv-conf", f"is_host={int(place.number == 0)},{PATIENCE}"),
        *("--local-addr", place.address),
        *("-m", "--", *work),
    ]


def variables(place: Place, processes: int, environ: Mapping[str, str]) -> dict[str, str]:
    """What several processes want, where the job has not said it."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    wanted = {"OMP_NUM_THREADS": str(threads)}
    if place.interface:
        # Else gloo takes the address that the host's name has, and RCCL any interface that is up: a docker0 too.
        wanted |= {"GLOO_SOCKET_IFNAME": place.interface, "NCCL_SOCKET_IFNAME": place.interface}
    return {name: value for name, value in wanted.items() if name not in environ}


def carried_out(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run it to its end and hand on the first wish to stop; its exit code, as a shell gives it."""
    stopping = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if not stopping and child is not None:
            child.send_signal(signal.SIGTERM)
        stopping = True

    child: subprocess.Popen[bytes] | None = None
    for number in ASKING:
        signal.signal(number, ask)
    child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_as_a_child)
    if stopping:  # while it was started
        child.send_signal(signal.SIGTERM)
    code = child.wait()
    return 128 - code if code < 0 else code


def _as_a_child() -> None:
    """Slurm signals a task's whole process group, or all that is in its cgroup: SIGUSR1 is for this process alone."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    end_with_the_launcher()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
