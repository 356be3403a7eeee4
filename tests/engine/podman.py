"""podman's Docker-compatible service for tests, with root or rootless, in a mount namespace of its own.

The rootless one runs as a user that exists only in there: /etc/passwd and its kin are mounted over, not changed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path("/")
FOLDERS = ("usr/sbin", "usr/bin", "usr/libexec/podman")
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
# /sys/fs/cgroup/unified: a half-mounted second hierarchy that crun trips over, where there is one.
START = """
root=$1 folder=$2
shift 2
umount /sys/fs/cgroup/unified 2>/dev/null
for name in passwd group subuid subgid; do
  [ -e "$folder/$name" ] || continue
  touch "$root/etc/$name"
  mount --bind "$folder/$name" "$root/etc/$name"
done
if [ "$root" != / ]; then
  mount --rbind "$root" "$root"
  for name in proc dev sys tmp; do mount --rbind "/$name" "$root/$name"; done
  # Not chroot: who is in one is not allowed a user namespace.
  cd "$root" && mkdir -p .old && pivot_root . .old && umount -l .old
fi
cd /
exec "$@"
"""


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
def service(*, rootless: bool, root: Path = HERE, keep_groups: bool = True) -> Iterator[Podman]:
    """A podman below `root`; `keep_groups` that a rootless one's containers.conf says so (RS204)."""
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
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                START,
                "sh",
                str(root),
                str(folder),
                *command,
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    enter = ("nsenter", f"--mount=/proc/{child.pid}/ns/mnt", *become)
    try:
        _wait(folder / "run" / "podman.sock", child, folder / "log")
        yield Podman(f"unix://{folder}/run/podman.sock", enter, environment)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        child.wait()
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
