"""A private, throw-away Slurm for tests: `python tools/cluster.py start --root DIR`, then `stop`.

One host plays a controller and several nodes: munge, slurmctld and a slurmd for each, with keys, state, sockets and pid
files below DIR. `start` prints the SLURM_CONF to use and nothing else on stdout; `stop` ends these processes alone, and
what jobs have left of theirs. `kill` and `up` do so with one daemon: what happens to a cluster, for a test to see.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2")
PORTS = ("slurmctld", *NODES)
START_SECONDS = 30
POLL_SECONDS = 0.1
PROGRAMS = ("munged", "slurmctld", "slurmd")

# cred_expire: as long as a job waits that is queued again. SlurmdTimeout: until a node that is silent is down.
CONFIGURATION = """\
ClusterName=stand-in
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmctldPort={port}
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdPidFile={root}/%n.pid
SlurmdLogFile={root}/%n.log
SlurmdSpoolDir={root}/%n
StateSaveLocation={root}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=12
KillWait=30
InactiveLimit=0
MinJobAge=300
JobCompType=jobcomp/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["start", "stop", "kill", "up"])
    parser.add_argument("--root", type=Path, required=True, help="the cluster's folder; a short path, for its sockets")
    parser.add_argument("--daemon", choices=["slurmctld", *NODES], help="of kill and up: which one")
    parser.add_argument("--gpus", type=int, default=0, help="of start: as many on each node, which are no real ones")
    arguments = parser.parse_args()
    root: Path = arguments.root.absolute()
    if arguments.action in ("kill", "up") and not arguments.daemon:
        parser.error("kill and up take a --daemon")
    actions: dict[str, Callable[[], int]] = {
        "start": lambda: start(root, arguments.gpus),
        "stop": lambda: stop(root),
        "kill": lambda: kill(root, arguments.daemon),
        "up": lambda: up(root, arguments.daemon),
    }
    return actions[arguments.action]()


def start(root: Path, gpus: int = 0) -> int:
    """Start the cluster unless it is there; exit code 3 when it cannot be had."""
    if why := impossible():
        return fail(why)
    for folder in (root, root / "state", *(root / node for node in NODES)):
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    key = root / "munge.key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
    configuration(root).write_text(configured(root, gpus), encoding="utf-8")
    (root / "gres.conf").write_text("".join(gpu_lines(root, gpus)), encoding="utf-8")
    if not running(root, "munged"):
        (root / "munge.socket").unlink(missing_ok=True)  # of one that was killed
        launch(root, "munged")
    if not await_(lambda: (root / "munge.socket").exists()):
        return fail(f"munged did not start; see {root}/munged.log")
    for daemon in ("slurmctld", *NODES):
        if not running(root, daemon):
            launch(root, daemon)
    if not await_(lambda: is_up(states(root))):
        return fail(f"the nodes did not come up ({states(root)}); see {root}/slurmctld.log and {root}/n1.log")
    print(configuration(root))
    return 0


def stop(root: Path) -> int:
    """End every process of this folder: daemons, and what jobs have left."""
    if shutil.which("scancel") and running(root, "slurmctld"):
        subprocess.run(
            ["scancel", "--user", "root"], env=environment(root), capture_output=True, timeout=10, check=False
        )
        await_(lambda: not jobs(root), seconds=5)
    for daemon in (*NODES, "slurmctld", "munged"):
        end(root, daemon, signal.SIGKILL)
    for stepd in children(root):
        os.kill(stepd, signal.SIGKILL)
    return 0


def kill(root: Path, daemon: str) -> int:
    """SIGKILL, as a crash does it."""
    return 0 if end(root, daemon, signal.SIGKILL) else fail(f"no {daemon} there")


def up(root: Path, daemon: str) -> int:
    launch(root, daemon)
    return 0 if await_(lambda: running(root, daemon)) else fail(f"{daemon} did not start; see {root}/{daemon}.log")


def configured(root: Path, gpus: int) -> str:
    host, (cores, memory), port = socket.gethostname(), machine(), ports(root)
    lines = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port[name]} CPUs={cores} "
        f"RealMemory={memory // len(NODES)} {f'Gres=gpu:{gpus} ' if gpus else ''}State=UNKNOWN"
        for name in NODES
    ]
    return CONFIGURATION.format(root=root, host=f"{host}(127.0.0.1)", port=port["slurmctld"], nodes="\n".join(lines))


def gpu_lines(root: Path, count: int) -> list[str]:
    """gres.conf: Slurm asks for device nodes and opens none; the null device is one, under a render node's name."""
    nodes = [root / f"renderD{128 + number}" for number in range(count)]
    for node in nodes:
        if not node.exists():
            os.mknod(node, 0o600 | stat.S_IFCHR, os.stat(os.devnull).st_rdev)
    return [f"Name=gpu File={node} Flags=amd_gpu_env\n" for node in nodes]


def ports(root: Path) -> dict[str, int]:
    """Each daemon's port: free ones when the folder is new, the same ones ever after; several clusters share a host."""
    kept = root / "ports"
    if not kept.exists():
        kept.write_text(" ".join(map(str, free_ports(len(PORTS)))), encoding="utf-8")
    return dict(zip(PORTS, map(int, kept.read_text(encoding="utf-8").split()), strict=True))


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def machine() -> tuple[int, int]:
    """CPUs, and MiB of memory."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return os.cpu_count() or 1, (pages >> 20) - 512


def command(root: Path, daemon: str) -> list[str]:
    if daemon == "munged":
        return [
            "munged",
            "--foreground",
            "--force",
            *(f"--{name}={root}/munge.{name.split('-')[0]}" for name in ("key-file", "socket")),
            f"--pid-file={root}/munged.pid",
            f"--log-file={root}/munged.log",
            f"--seed-file={root}/munge.seed",
        ]
    conf = str(configuration(root))
    return ["slurmctld", "-D", "-f", conf] if daemon == "slurmctld" else ["slurmd", "-D", "-f", conf, "-N", daemon]


def launch(root: Path, daemon: str) -> None:
    with (root / f"{daemon}.out").open("ab") as log:
        child = subprocess.Popen(
            command(root, daemon),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(root),
            start_new_session=True,
        )
    (root / f"{daemon}.ours").write_text(str(child.pid))


def end(root: Path, daemon: str, number: int) -> bool:
    """Signal a daemon of this folder and wait until it is gone; False when there is none."""
    if not running(root, daemon):
        return False
    pid = int((root / f"{daemon}.ours").read_text())
    os.kill(pid, number)
    await_(lambda: not running(root, daemon))
    return True


def running(root: Path, daemon: str) -> bool:
    """Is the process that was started for it still there? The pid may be another's by now."""
    try:
        pid = int((root / f"{daemon}.ours").read_text())
        text = Path(f"/proc/{pid}/cmdline").read_text()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return False
    return state != "Z" and text.split("\0")[:-1] == command(root, daemon)


def children(root: Path) -> list[int]:
    """slurmstepd of this cluster's jobs, and what runs under them: they have its configuration in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if f"SLURM_CONF={configuration(root)}\0".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def states(root: Path) -> dict[str, int]:
    """How many nodes are in which state."""
    asked = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%t"]
    done = subprocess.run(asked, env=environment(root), capture_output=True, text=True, check=False)
    found: dict[str, int] = {}
    for state in done.stdout.split():
        found[state] = found.get(state, 0) + 1
    return found


def is_up(found: dict[str, int]) -> bool:
    """Do all nodes take jobs? One that was stopped may have left some."""
    return sum(found.get(state, 0) for state in ("idle", "mix", "alloc")) == len(NODES)


def jobs(root: Path) -> list[str]:
    done = subprocess.run(["squeue", "--noheader"], env=environment(root), capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def configuration(root: Path) -> Path:
    return root / "slurm.conf"


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "SLURM_CONF": str(configuration(root))}


def await_(true: Callable[[], bool], seconds: float = START_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def impossible() -> str:
    """Why no cluster can be started here, or nothing."""
    for program in PROGRAMS:
        if shutil.which(program) is None:
            return (
                f"{program} is not installed (Debian: apt-get install --no-install-recommends slurmd slurmctld munge)"
            )
    return "" if os.geteuid() == 0 else "slurmd needs root"


def fail(why: str) -> int:
    print(f"cluster: {why}", file=sys.stderr)
    return 3


if __name__ == "__main__":
    sys.exit(main())
