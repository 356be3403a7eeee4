"""Another Debian in a folder, for newer programs than this machine's and for machines with nothing set up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import wait_for

HERE = Path("/")
# /sys/fs/cgroup/unified: a half-mounted second hierarchy that crun trips over, where there is one.
START = """
set -e
root=$1
shift
umount /sys/fs/cgroup/unified 2>/dev/null || true
if [ "$root" != / ]; then
  mount --rbind "$root" "$root"
  mount -t proc proc "$root/proc"
fi
while [ "$1" != -- ]; do
  [ -e "$root$2" ] || touch "$root$2"
  mount --rbind "$1" "$root$2"
  shift 2
done
shift
if [ "$root" != / ]; then
  # Not chroot: who is in one is not allowed a user namespace.
  cd "$root" && mkdir -p .old && pivot_root . .old && umount -l .old
fi
cd /
echo ready >&0
exec "$@" </dev/null
"""


def impossible() -> str:
    """Why there can be none here, or nothing."""
    if os.geteuid():
        return "root is needed for a Debian in a folder"
    return "" if shutil.which("debootstrap") else "debootstrap is not installed (Debian: apt-get install debootstrap)"


def bootstrap(suite: str, root: Path, *packages: str) -> Path:
    """A minimal Debian of that suite with these packages below `root`; half a minute."""
    include = [f"--include={','.join(packages)}"] if packages else []
    settings = root / "etc/dpkg/dpkg.cfg.d"  # its dpkg is not to wait for the disk at each file
    settings.mkdir(parents=True)
    (settings / "unsafe-io").write_text("force-unsafe-io\n")
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", *include, suite, str(root)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    root.chmod(0o755)
    return root


def program(root: Path, path: str) -> list[str]:
    """The beginning of a command that runs a program of that Debian here, with its own libraries."""
    loader, libraries = root / "lib64/ld-linux-x86-64.so.2", root / "usr/lib/x86_64-linux-gnu"
    return [str(loader), "--library-path", str(libraries), str(root / path)]


@dataclass(frozen=True)
class Apart:
    """A process in a mount namespace of its own; `enter` begins commands that run beside it, `first` is its pid."""

    process: subprocess.Popen[bytes]
    enter: tuple[str, ...]
    first: int


@contextmanager
def apart(
    root: Path, mounts: Mapping[Path, str], command: list[str], log: Path, env: Mapping[str, str], *, net: bool = False
) -> Iterator[Apart]:
    """Run a command with `root` as its root, and there what `mounts` names, at these places; `net`: a network too.

    All that is started in there ends with it. Nothing is entered before it is furnished: until then it is still here.
    """
    pairs = [word for source, target in mounts.items() for word in (str(source), target)]
    spaces = ["--mount", "--propagation", "private", "--pid", "--fork", "--mount-proc", *(["--net"] * net)]
    heard, told = os.pipe()
    with log.open("wb") as output, open(told, "wb") as word, open(heard, "rb") as ear:
        process = subprocess.Popen(
            ["unshare", *spaces, "sh", "-c", START, "sh", str(root), *pairs, "--", *command],
            env=dict(env),
            stdin=word,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        word.close()
        ready = ear.readline()
    assert ready, f"nothing could be furnished in {root}: {log.read_text(errors='replace')[-2000:]}"
    inside = _first_child(process)
    try:
        kinds = {"mount": "mnt", "pid": "pid"} | ({"net": "net"} if net else {})
        yield Apart(
            process, ("nsenter", *(f"--{kind}=/proc/{inside}/ns/{name}" for kind, name in kinds.items())), inside
        )
    finally:
        with suppress(ProcessLookupError):
            os.kill(inside, signal.SIGKILL)  # the first process there: with it go all others
        process.wait()


def _first_child(process: subprocess.Popen[bytes]) -> int:
    def child() -> int | None:
        text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        return int(text.split()[0]) if text.split() else None

    return wait_for(child, what="the first process of the namespace")
