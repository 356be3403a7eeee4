"""A site of its own for tests: a Slurm of two nodes, a registry, a shared home folder, and one person who works there.

All of it is in namespaces of its own (mounts, processes, network), so that nothing outside is changed or met.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.small_image import open_registry, push_small_image
from tests.conftest import ROOT, wait_for
from tests.engine.debian import HERE, apart

UID, GROUP = 4321, 992
USER_FILES = ("passwd", "group", "subuid", "subgid")
FOLDERS = ("usr/sbin", "usr/bin", "sbin", "bin")
SLURM = ("slurmctld", "slurmd", "munged", "sbatch")
CLONE_NEWNET = 0x40000000
LABELS = {
    "radeon-stack.kind": "train",
    "radeon-stack.platform": "cpu",
    "radeon-stack.key": "k",
    "radeon-stack.torch": "2.13.0",
}


def missing(root: Path, *programs: str) -> list[str]:
    """Programs that are not below `root`, and what else there has to be."""
    path = os.environ["PATH"] if root == HERE else os.pathsep.join(str(root / name) for name in FOLDERS)
    lacking = [name for name in (*SLURM, *programs) if shutil.which(name, path=path) is None]
    lacking += [name for name in ("docker-registry", "busybox", "setpriv") if shutil.which(name) is None]
    return [*lacking, *(["root"] if os.geteuid() else [])]


@dataclass(frozen=True)
class Site:
    """How to do something there: as its person, from a login node."""

    folder: Path
    enter: tuple[str, ...]
    first: int
    environment: dict[str, str]
    repository: str
    reference: str

    @property
    def home(self) -> Path:
        """The person's, shared by all nodes."""
        return self.folder / "home"

    def run(self, command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
        become = ("setpriv", "--reuid", str(UID), "--regid", str(UID), "--groups", f"{UID},{GROUP}")
        return subprocess.run(
            [*self.enter, *become, *command],
            env={**self.environment, **more},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def disk(self, node: str) -> Path:
        """A folder of the person's on that node's own disk: of this machine's, since all nodes are on it."""
        folder = self.folder / f"disk-{node}"
        folder.mkdir(mode=0o700, exist_ok=True)
        os.chown(folder, UID, UID)
        return folder

    def write(self, name: str, text: str) -> Path:
        path = self.home / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        for made in (path, path.parent):
            os.chown(made, UID, UID)
        return path

    def submit(self, name: str, lines: list[str], *options: str, **more: str) -> str:
        """A job of these lines; its id."""
        script = self.write(f"jobs/{name}.sh", "\n".join(["#!/bin/sh", "cd /", *lines, ""]))
        out = f"--output={self.home}/jobs/{name}.out"
        done = self.run(["sbatch", "--parsable", "--nodes=2", out, *options, str(script)], **more)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def output(self, name: str) -> str:
        path = self.home / "jobs" / f"{name}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def state(self, job: str) -> str:
        told = self.run(["scontrol", "--oneliner", "show", "job", job]).stdout
        return dict(word.split("=", 1) for word in told.split() if "=" in word).get("JobState", "")

    def ended(self, job: str) -> str:
        """The state in which it ended."""
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "")
        wait_for(lambda: self.state(job) not in going, seconds=60, what=f"job {job}")
        return self.state(job)

    def processes(self, mark: str) -> list[str]:
        """Command lines there that have this word."""
        told = subprocess.run([*self.enter, "ps", "-eo", "args"], capture_output=True, text=True, check=True, cwd="/")
        return [line for line in told.stdout.splitlines() if mark in line]

    @contextmanager
    def network(self) -> Iterator[None]:
        """What this thread opens meanwhile is opened in the site's network."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as ours, open(f"/proc/{self.first}/ns/net") as theirs:
            assert libc.setns(theirs.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert libc.setns(ours.fileno(), CLONE_NEWNET) == 0


@contextmanager
def open_site(root: Path = HERE, *, cgroups: bool = False) -> Iterator[Site]:
    """A site whose nodes have the programs below `root`; `cgroups`: its Slurm holds what belongs to a job in one."""
    # A short path, for sockets; and one that another user can walk.
    folder = Path(tempfile.mkdtemp(prefix="rs-site-", dir="/tmp"))
    folder.chmod(0o711)
    try:
        (folder / "home").mkdir(mode=0o700)
        os.chown(folder / "home", UID, UID)
        _write_user(folder)
        tool = (ROOT / "tools" / "cluster.py").read_text()
        if cgroups:
            tool = tool.replace("proctrack/linuxproc", "proctrack/cgroup")
            (folder / "slurm").mkdir()
            (folder / "slurm" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "cluster.py").write_text(tool)
        # As a node has it: whoever runs there may mount what is theirs.
        os.mknod(folder / "fuse", 0o020666, os.makedev(10, 229))
        (folder / "fuse").chmod(0o666)
        mounts = {folder / name: f"/etc/{name}" for name in USER_FILES} | {folder / "fuse": "/dev/fuse"}
        if root != HERE:
            own = {Path(f"/{name}"): f"/{name}" for name in ("dev", "sys", "tmp")}
            mounts = own | mounts | {Path(f"/etc/{name}"): f"/etc/{name}" for name in ("hosts", "resolv.conf")}
        environment = {
            "PATH": os.environ["PATH"] if root == HERE else ":".join(f"/{name}" for name in FOLDERS),
            "HOME": str(folder / "home"),
            "SLURM_CONF": str(folder / "slurm" / "slurm.conf"),
            # A login has these; on a node they lead nowhere.
            "XDG_RUNTIME_DIR": f"/run/user/{UID}",
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path=/run/user/{UID}/bus",
        }
        # Reaps what is left to it, as a machine's first process does.
        with apart(root, mounts, ["catatonit", "-P"], folder / "log", environment, net=True) as there:
            _inside(there.enter, ["ip", "link", "set", "lo", "up"], environment)
            # Names are looked up for machines that have an address of some network (AI_ADDRCONFIG): one of none.
            _inside(there.enter, ["ip", "address", "add", "192.0.2.1/32", "dev", "lo"], environment)
            site = Site(folder, there.enter, there.first, environment, "", "")
            with site.network():
                registry = open_registry(folder)
                host = registry.__enter__()
                reference = push_small_image(f"{host}/radeon/train", "train-cpu-stable", LABELS)
            try:
                cluster = ["python3", str(folder / "cluster.py"), "start", "--root", str(folder / "slurm")]
                _inside(there.enter, cluster, environment)
                yield Site(folder, there.enter, there.first, environment, f"{host}/radeon/train", reference)
            finally:
                registry.__exit__(None, None, None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if cgroups:
            _without_cgroups()


def _without_cgroups() -> None:
    """What slurmd made and, ended at once, did not take away; the kernel keeps what still holds a process."""
    for top in Path("/sys/fs/cgroup/freezer").glob("slurm_n[12]"):
        for group in (*sorted(top.rglob("*/"), reverse=True), top):
            with suppress(OSError):
                group.rmdir()


def _inside(enter: tuple[str, ...], command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run([*enter, *command], env=environment, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"


def _write_user(folder: Path) -> None:
    lines = {
        "passwd": Path("/etc/passwd").read_text() + f"radeon:x:{UID}:{UID}::{folder}/home:/bin/sh\n",
        "group": Path("/etc/group").read_text() + f"radeon:x:{UID}:\n",
        "subuid": "radeon:100000:65536\n",
        "subgid": "radeon:100000:65536\n",
    }
    for name, text in lines.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o644)
