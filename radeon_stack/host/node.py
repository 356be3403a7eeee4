"""Runs on a node of a cluster, by srun, with the Python of the shared file system: writes down what the node is.

`python -m radeon_stack.host.node --to FOLDER --name NAME --token TOKEN` writes `NAME.machine.tar.gz`, the node's
facts as a bundle, and `NAME.node.json`, what a job needs to know beyond them. The token is in the file that the submit
host has written, and keeps locked: who does not see it there does not see the same file system.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from radeon_stack import atomic
from radeon_stack.errors import MachineError, StackError
from radeon_stack.host.bundle import pack
from radeon_stack.host.facts import Ways, gather
from radeon_stack.host.machine import numbers_in_kib
from radeon_stack.host.networks import interfaces, rdma
from radeon_stack.host.node_record import NodeRecord, Runtime
from radeon_stack.host.shared_folder import examine_shared
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.text import one_line, print_line

BUNDLE, RECORD = ".machine.tar.gz", ".node.json"
SECONDS = 10  # for a program to tell its version: it may lie on a file system that is slow to answer
RUNTIMES = {
    "apptainer": ("--version",),
    "singularity": ("--version",),
    "podman": ("--version",),
    "enroot": ("version",),
}
# srun(1), OUTPUT ENVIRONMENT VARIABLES; and by which ROCm is told its GPUs.
TOLD = (
    "SLURM_LAUNCH_NODE_IPADDR",
    "SLURM_JOB_GPUS",
    "SLURM_STEP_GPUS",
    "SLURM_CPUS_ON_NODE",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
)
SUBORDINATE = ("/etc/subuid", "/etc/subgid")


def main() -> int:
    parser = argparse.ArgumentParser(prog="radeon_stack.host.node", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--name", required=True, help="what the files are called")
    parser.add_argument("--token", required=True)
    parser.add_argument("--gpus", type=int, default=0, help="how many the job has asked for")
    arguments = parser.parse_args()
    try:
        write(arguments.to, arguments.name, arguments.token, arguments.gpus)
    except (StackError, OSError) as error:
        print_line(f"radeon-stack: {error}", sys.stderr)
        return int(MachineError.exit_code)
    return 0


def write(folder: Path, name: str, token: str, gpus: int) -> None:
    """Both files, each of them whole; the record last, for it says that the bundle is there."""
    shared = examine_shared(folder, name, token)
    sysroot = Sysroot()
    pack(gather(sysroot, folder, Ways()), sysroot, folder / f"{name}{BUNDLE}")
    record = look(gpus).model_copy(update={"shared": shared, "written": time.time()})
    atomic.write_text(folder / f"{name}{RECORD}", record.model_dump_json(indent=1))


def look(gpus: int = 0) -> NodeRecord:
    """This node, but for the shared folder."""
    sysroot = Sysroot()  # another one than the bundle's: what is read here does not belong into that
    return NodeRecord(
        hostname=socket.gethostname(),
        node=os.environ.get("SLURMD_NODENAME", ""),
        written=time.time(),
        python=sys.executable,
        python_version=platform.python_version(),
        torch=importlib.util.find_spec("torch") is not None,
        cpus=len(os.sched_getaffinity(0)),
        all_cpus=os.cpu_count() or 0,
        memory=numbers_in_kib(sysroot.text("/proc/meminfo") or "").get("MemTotal", 0),
        runtimes=tuple(filter(None, (_runtime(name) for name in RUNTIMES))),
        srun=shutil.which("srun") is not None,
        pyxis="--container-image" in _said(["srun", "--help"]),
        interfaces=interfaces(sysroot),
        rdma=rdma(sysroot),
        rocm=sysroot.text("/opt/rocm/.info/version") or "",
        environment={name: os.environ[name] for name in TOLD if name in os.environ},
        gpus_asked=gpus,
    )


def _runtime(name: str) -> Runtime | None:
    path = shutil.which(name)
    if path is None:
        return None
    said = one_line(_said([path, *RUNTIMES[name]]))
    why = "" if said else "it does not tell its version: it does not run here"
    return Runtime(
        name=name, version=version_in(said), path=path, why_not=why or (_podman() if name == "podman" else "")
    )


def version_in(said: str) -> str:
    """`apptainer version 1.3.4`, `singularity-ce version 4.1.0-noble`, `3.4.1`."""
    return next((word for word in said.split() if word[:1].isdigit()), said)


def _podman() -> str:
    """Why rootless podman does not work here: its images have files of more users than one."""
    if os.getuid() == 0:
        return ""
    if shutil.which("newuidmap") is None:
        return "there is no newuidmap (Debian: uidmap)"
    names = _names()
    for file in SUBORDINATE:
        lines = (Sysroot().text(file) or "").splitlines()
        if not any(line.partition(":")[0] in names for line in lines):
            return f"{file} has no range for this user"
    return ""


def _names() -> set[str]:
    import pwd

    uid = os.getuid()
    try:
        return {str(uid), pwd.getpwuid(uid).pw_name}
    except KeyError:
        return {str(uid)}


def _said(command: list[str]) -> str:
    """What a program prints; "" when it is not there, fails or says nothing in time."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
