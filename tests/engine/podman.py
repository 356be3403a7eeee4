"""podman's Docker-compatible service for tests, with root or rootless, in a mount namespace of its own.

The rootless one runs as a user that exists only in there: /etc/passwd and its kin are mounted over, not changed.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.engine.debian import HERE, apart

FOLDERS = ("usr/sbin", "usr/bin", "usr/libexec/podman")
USER_FILES = ("passwd", "group", "subuid", "subgid")
UID = 4321
RENDER = 992
SECONDS = 30
NEEDED = ("podman", "crun", "newuidmap", "setpriv", "catatonit")
CONTAINERS = """[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
"""
# What `--group-add keep-groups` is on podman's command line; its socket has no other way to say it (RS204).
KEEP_GROUPS = 'annotations = ["run.oci.keep_original_groups=1"]\n'


def missing(root: Path = HERE) -> list[str]:
    """The programs that are not there; `root` is this system, or another one's folder."""
    folders = os.environ["PATH"] if root == HERE else os.pathsep.join(str(root / name) for name in FOLDERS)
    return [name for name in NEEDED if shutil.which(name, path=folders) is None]


@dataclass(frozen=True)
class Podman:
    """A service of its own: its DOCKER_HOST, and how to run a command where it runs, as who it runs as."""

    host: str
    enter: tuple[str, ...]
    environment: dict[str, str]

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        words = [*self.enter, *command]
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)


@contextmanager
def service(*, rootless: bool, root: Path = HERE, keep_groups: bool = True, cdi: str = "") -> Iterator[Podman]:
    """A podman below `root`; `keep_groups` that a rootless one's containers.conf says so (RS204).

    `cdi`: the text of a specification in its /etc/cdi.
    """
    # A short path, since a socket's name is short; and one that another user can walk.
    folder = Path(tempfile.mkdtemp(prefix="rs-podman-"))
    folder.chmod(0o711)
    (folder / "containers.conf").write_text(CONTAINERS + (KEEP_GROUPS if rootless and keep_groups else ""))
    (folder / "storage.conf").write_text(
        '[storage]\ndriver = "vfs"\n'
        + ("" if rootless else f'graphroot = "{folder}/data"\nrunroot = "{folder}/state"\n')
    )
    for name in ("home", "run"):
        (folder / name).mkdir(mode=0o700)
    environment = {
        "PATH": os.environ["PATH"] if root == HERE else ":".join(f"/{name}" for name in FOLDERS),
        "HOME": str(folder / "home"),
        "XDG_RUNTIME_DIR": str(folder / "run"),
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
    }
    become: list[str] = []
    if rootless:
        _write_user(folder)
        for name in ("home", "run"):
            os.chown(folder / name, UID, UID)
        become = ["setpriv", "--reuid", str(UID), "--regid", str(UID), "--groups", f"{UID},{RENDER}"]
    command = [*become, "podman", "system", "service", "--time", "0", f"unix://{folder}/run/podman.sock"]
    mounts = {folder / name: f"/etc/{name}" for name in (USER_FILES if rootless else ())}
    if cdi:
        (root / "etc/cdi").mkdir(exist_ok=True)
        (folder / "amd.json").write_text(cdi)
        mounts[folder / "amd.json"] = "/etc/cdi/amd.json"
    if root != HERE:
        mounts |= {Path(f"/{name}"): f"/{name}" for name in ("dev", "sys", "tmp")}
    try:
        with apart(root, mounts, command, folder / "log", environment) as there:
            _wait(folder / "run" / "podman.sock", there.process, folder / "log")
            yield Podman(f"unix://{folder}/run/podman.sock", (*there.enter, *become), environment)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def _wait(place: Path, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and child.poll() is None:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(place))
                return
            except OSError:
                time.sleep(0.1)
    raise RuntimeError(log.read_text(errors="replace")[-2000:])
