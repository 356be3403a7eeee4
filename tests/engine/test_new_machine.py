"""A machine with a card and nothing set up: doctor's remedies, followed line by line, lead to a doctor that is green.

The machine is Debian 13 in a folder, with a root, processes and devices of its own, and an R9700 in its /sys. Who sits
there is in no group, has installed radeon-stack by pip, and may use sudo. `make image` is the one remedy that is not
followed: the base of a ROCm image cannot be pulled in a test, so an image with its labels is imported instead.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.images.builder import default_ca, default_pip_conf
from tests.conftest import ROOT
from tests.engine.conftest import missing
from tests.engine.debian import Apart, apart, bootstrap, impossible
from tests.stages import RENDER, STAGES, build

pytestmark = [pytest.mark.engine]
UID = 1000
SOFTWARE = "/opt/radeon-stack"
ROUNDS = 8
ATTEMPTS, THERE_ALREADY = 5, 9  # 9: useradd's and groupadd's word for an account that is there
DISK = "64g"  # of the machine; it is memory as far as it is written to, and how full this disk is tells nothing of it
TWINS = {"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9}  # of /dev/mem's major number, 1
IMPORT = "tar --create --files-from /dev/null | docker import {labels} - radeon-stack/train:rocm7.1.1-gfx1201"
LABELS = {"kind": "train", "platform": "rocm7.1.1-gfx1201", "rocm": "7.1.1", "gfx": "gfx1201"}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    if why := impossible():
        missing(why)
    folder = tmp_path_factory.mktemp("machine")
    folder.chmod(0o755)
    root = bootstrap("trixie", folder / "root", "python3-venv", "sudo", "ca-certificates")
    tree = build(STAGES["r9700"], folder / "tree")
    install(root)
    settle_in(root)
    shutil.copytree(tree / "sys", root / "sys", symlinks=True, dirs_exist_ok=True)
    (root / "sys/fs/cgroup").mkdir(parents=True)
    mounts = {devices(folder / "dev"): "/dev", Path("/dev/pts"): "/dev/pts", Path("/sys/fs/cgroup"): "/sys/fs/cgroup"}
    mounts |= {tree / name: f"/{name}" for name in ("proc/meminfo", "proc/cmdline", "proc/sys/kernel/osrelease")}
    environment = {"PATH": "/usr/sbin:/usr/bin"}
    with apart(root, mounts, ["sleep", "infinity"], folder / "log", environment) as there:
        for place, owner in (("/home/me", UID), ("/var/lib/docker", 0)):
            disk(there, place, owner)
        yield there


def disk(machine: Apart, place: str, owner: int) -> None:
    mkdir, mount = (["mkdir", "-p", place], ["mount", "-t", "tmpfs", "-o", f"size={DISK},uid={owner},gid={owner}"])
    for command in (mkdir, [*mount, "tmpfs", place]):
        subprocess.run([*machine.enter, *command], check=True, capture_output=True)


def install(root: Path) -> None:
    """radeon-stack, as pip installs it: from a wheel of this tree, with what it needs from the index."""
    environ = dict(os.environ)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    # The service raises limits, which a test machine may not: CAP_SYS_RESOURCE.
    (root / "etc/default/docker").write_text('ulimit() { command ulimit "$@" 2>/dev/null || true; }\n')
    (root / "etc/dpkg/dpkg.cfg.d/keep").write_text("force-confold\n")
    certificates, settings = default_ca(environ), default_pip_conf(environ)
    for found, place in ((certificates, "etc/ssl/certs/ca-certificates.crt"), (settings, "etc/pip.conf")):
        if found:
            shutil.copy(found, root / place)
    source = root / "opt/source"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    for command in (["python3", "-m", "venv", SOFTWARE], [f"{SOFTWARE}/bin/pip", "install", "--quiet", "/opt/source"]):
        done = subprocess.run(["chroot", str(root), *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]


def settle_in(root: Path) -> None:
    """A user in no group but their own, who may use sudo; and the group of the device nodes, as udev makes it."""
    for command in (
        ["useradd", "--create-home", "--uid", str(UID), "--shell", "/bin/bash", "me"],
        ["groupadd", "--system", "--gid", str(RENDER), "render"],
    ):
        # The files of accounts are locked by whoever touches them, a package's script say: as a person would, again.
        for attempt in range(ATTEMPTS):
            time.sleep(attempt)
            done = subprocess.run(["chroot", str(root), *command], check=False, capture_output=True, text=True)
            if done.returncode in (0, THERE_ALREADY):
                break
        else:
            pytest.fail(f"{' '.join(command)} → {done.returncode}: {done.stderr}")
    assert f"render:x:{RENDER}:" in (root / "etc/group").read_text()
    assert (root / "home/me").is_dir()
    (root / "etc/sudoers.d/me").write_text("me ALL=(ALL) NOPASSWD: ALL\n")


def devices(folder: Path) -> Path:
    """A /dev with what every program wants, /dev/kfd and a render node (twins of /dev/null)."""
    for name in ("dri", "pts", "shm"):
        (folder / name).mkdir(parents=True)
    (folder / "shm").chmod(0o1777)
    for name, minor in TWINS.items():
        node(folder / name, minor, 0o666)
    for name in ("kfd", "dri/renderD128"):
        node(folder / name, TWINS["null"], 0o660)
        os.chown(folder / name, 0, RENDER)
    (folder / "ptmx").symlink_to("pts/ptmx")
    for name, number in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        (folder / name).symlink_to(f"/proc/self/fd{number}")
    return folder


def node(path: Path, minor: int, mode: int) -> None:
    os.mknod(path, stat.S_IFCHR | mode, os.makedev(1, minor))
    path.chmod(mode)


def login(machine: Apart, script: str) -> subprocess.CompletedProcess[str]:
    """Run lines as who has just logged in."""
    become = ["setpriv", "--reuid", str(UID), "--regid", str(UID), "--init-groups"]
    told = [
        "HOME=/home/me",
        "USER=me",
        f"PATH={SOFTWARE}/bin:/usr/local/bin:/usr/bin:/bin",
        "DEBIAN_FRONTEND=noninteractive",
    ]
    command = [*machine.enter, *become, "env", "-i", *told, "bash", "-ec", f"cd; {script}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)


def doctor(machine: Apart) -> dict[str, Any]:
    done = login(machine, "radeon-stack doctor --json")
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout))


def test_following_the_remedies_line_by_line_leads_to_a_green_doctor(machine: Apart) -> None:
    first = doctor(machine)
    assert {check["code"] for check in first["checks"] if check["state"] == "fail"} >= {
        "RS106",
        "RS108",
        "RS109",
        "RS201",
    }
    story = []
    unheeded: set[str] = set()
    for _ in range(ROUNDS):
        found = doctor(machine)
        wrong = [check for check in found["checks"] if check["state"] in ("fail", "warn")]
        if not wrong:
            break
        for line in dict.fromkeys(line for check in wrong for line in check["remedy"]):
            if line.startswith("make image ROCM=7.1.1 ARCH=gfx1201"):
                labels = " ".join(f"--change 'LABEL radeon-stack.{key}={value}'" for key, value in LABELS.items())
                line = IMPORT.format(labels=labels)
            done = login(machine, line)
            story.append(f"{line} → {done.returncode}")
            if done.returncode:
                # As a person would: what it says is read, doctor is asked again, and the same remedy has to work then.
                story.append(done.stderr[-1500:])
                unheeded.add(line)
                break
            unheeded.discard(line)
    else:
        pytest.fail("\n".join([*story, json.dumps(wrong, indent=1)]))
    assert not unheeded, "\n".join(story)
    assert found["states"]["fail"] == found["states"]["warn"] == 0
    assert login(machine, "radeon-stack doctor").returncode == 0
    print("\n".join(story))
