"""A published image as the file that a site's container runtime takes: made once, below the shared home folder.

The commands are lists; `converting` and `loading` render them as `sh` for a job's script, which runs where there is no
radeon-stack. Whoever comes second waits for the lock, and takes the file. A lock whose holder was killed is free, as
flock(2) has it; where a file system has none, two may work at once, each under a name of its own, and the last rename
stands. A file counts only with its record: reference and size.

Sources: https://apptainer.org/docs/user/main/cli/apptainer_build.html, enroot's doc/cmd/import.md and src/docker.sh,
podman-pull(1), podman-save(1), podman-load(1).
"""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from radeon_stack.errors import ImageError, UsageError
from radeon_stack.images.references import split
from radeon_stack.images.registry import Registry
from radeon_stack.images.sites import SiteImage

FOLDER = "images"
UNPACKED = 3  # what a layer grows to: see images/pulling.py
PARTIAL = "<partial>"  # in a command: the file that it is to make
SUFFIXES = {"apptainer": ".sif", "singularity": ".sif", "pyxis": ".sqsh", "podman": ".tar"}
LOCAL_NAME = "localhost/radeon-stack/site"
# Of a login: a job has neither, and what sbatch carried over points at the login node's.
SESSION = ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")
# A job has no cgroup to hand out, and no journal.
PODMAN = ("--cgroup-manager=cgroupfs", "--events-backend=none")
# Where each unpacks layers, by the variables that say so.
SCRATCH = {
    "apptainer": "${APPTAINER_TMPDIR:-${TMPDIR:-/tmp}}",
    "singularity": "${SINGULARITY_TMPDIR:-${TMPDIR:-/tmp}}",
    "pyxis": "${ENROOT_TEMP_PATH:-${TMPDIR:-/tmp}}",
}

Command = tuple[str, ...]


@dataclass(frozen=True)
class Conversion:
    """How a site gets its file, and what a container is then named by (`name`).

    `room` is about what the file takes, `unpacked` what its layers take while it is made, in bytes; `storage` podman's
    folder on the node's own disk.
    """

    runtime: str
    reference: str
    file: str
    name: str
    room: int
    unpacked: int
    commands: tuple[Command, ...]
    storage: str = ""


def conversion(image: SiteImage, runtime: str, home: Path, storage: str = "") -> Conversion:
    """`storage`: of podman alone, which needs one that no two nodes share."""
    if runtime not in SUFFIXES:
        raise UsageError(f"'{runtime}' is no runtime of containers on a node", remedy=f"one of {', '.join(SUFFIXES)}")
    if (runtime == "podman") != bool(storage):
        raise ValueError("podman, and no other, has a storage of its own")
    where, digest = split(image.reference)
    number = digest.partition(":")[2]
    file = str(home.absolute() / FOLDER / (number + SUFFIXES[runtime]))
    name = file
    # Squashed, an image is about as large as its compressed layers; podman's archive has them unpacked.
    room = image.download * 5 // 4
    if runtime == "podman":
        name, room = f"{LOCAL_NAME}:{number}", image.download * UNPACKED
        begin, plain = podman(storage), ("--tls-verify=false",) if image.plain else ()
        commands: tuple[Command, ...] = (
            (*begin, "pull", "--quiet", *plain, image.reference),
            (*begin, "tag", image.reference, name),
            (*begin, "save", "--quiet", "--format", "oci-archive", "--output", PARTIAL, name),
        )
    elif runtime == "pyxis":
        # `#` and a digest where a tag stands: so every enroot reads it; docker's own form is understood from 4.0 on.
        allowed = ("env", "ENROOT_ALLOW_HTTP=y") if image.plain else ()
        commands = (
            (*allowed, "enroot", "import", "--output", PARTIAL, f"docker://{where.host}#{where.name}:{digest}"),
        )
    else:
        plain = ("--no-https",) if image.plain else ()
        commands = ((runtime, "build", "--disable-cache", *plain, PARTIAL, f"docker://{image.reference}"),)
    return Conversion(runtime, image.reference, file, name, room, image.download * UNPACKED, commands, storage)


def podman(storage: str) -> Command:
    """How `podman` begins in a job. `storage` on the node's own disk: a shared home folder cannot hold one."""
    without = [part for name in SESSION for part in ("-u", name)]
    place = ("--root", f"{storage}/storage", "--runroot", f"{storage}/run") if storage else ()
    return ("env", *without, "podman", *place, *PODMAN)


def node_storage(uid: int) -> str:
    """Where podman's images and containers of one person are on a node."""
    return f"/var/tmp/radeon-stack-{uid}"  # noqa: S108 - made for its owner alone, or refused: see _OWN


def converting(made: Conversion) -> str:
    """`sh` that makes the file unless it is there: by one node of a job, before the others want it. Exit code 5."""
    folder = Path(made.file).parent
    another_home = "or put the home folder elsewhere: RADEON_STACK_HOME=DIR"
    if made.storage:
        room = _call("room", made.storage, _kib(made.unpacked), "free some on this node")
        scratch = [_call("own", made.storage), room, _call("steady", made.storage)]
    else:
        # Not quoted by shlex: the node's own variables say where.
        remedy = shlex.quote("name a larger folder of this node: TMPDIR=DIR")
        scratch = [f'room "{SCRATCH[made.runtime]}" {_kib(made.unpacked)} {remedy}']
    lines = [
        *_begin(made),
        "! whole || exit 0",
        f"{_call('mkdir', '-p', str(folder))} || {_call('fail', f'cannot make {folder}', another_home)}",
        'if lock "$file.lock"; then locked=yes; else locked=; fi',
        "! whole || exit 0",
        _call("room", str(folder), _kib(made.room), f"remove images that no run needs, {another_home}"),
        *scratch,
        "# What a killed attempt left; without a lock it may be another node's.",
        'if [ -n "$locked" ]; then rm -rf -- "$file".*.partial; fi',
        'partial="$file.$(uname -n).$$.partial"',
        'trap \'rm -rf -- "$partial" "$partial.record"\' EXIT',
        "trap 'exit 130' INT TERM",
        *(f"{_line(made, command)} || {_failed(made)}" for command in made.commands),
        'sync "$partial"',
        'echo "$reference $(stat -c %s "$partial")" >"$partial.record"',
        'mv -f "$partial.record" "$file.record"',
        'mv -f "$partial" "$file"',
    ]
    return "\n".join([*lines, ""])


def loading(made: Conversion) -> str:
    """`sh` that each node runs once before its container: podman takes the file in unless it has it. "" for others."""
    if not made.storage:
        return ""
    prune = shlex.join((*podman(made.storage), "image", "prune", "--all"))
    has = _call("engine", "image", "exists", made.name)
    lines = [
        *_begin(made),
        _call("own", made.storage),
        _call("steady", made.storage),
        f"{_call('lock', f'{made.storage}/lock')} || true",
        "# Containers of jobs that were killed; those that run stay.",
        "engine container prune --force || true",
        f"! {has} || exit 0",
        'whole || fail "there is no whole $file" "convert the image first, on a node that reaches its registry"',
        _call("room", made.storage, _kib(made.unpacked), f"on this node: {prune}"),
        f'engine load --quiet --input "$file" || {_failed(made)}',
        f'{has} || fail "podman loaded another image than $file is of" "remove that file: it is then made anew"',
    ]
    return "\n".join([*lines, ""])


def convert(made: Conversion) -> None:
    """Make the file here and now, as a job would: on a login node, which reaches the registry and knows its password.

    ImageError when it cannot be had; what the programs say has gone to stderr.
    """
    env = {**os.environ, **_password(made)}
    done = subprocess.run(["sh", "-c", converting(made)], env=env, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ImageError(
            f"no image for {made.runtime} was made of {made.reference}",
            where="--image",
            remedy="the lines above say why",
        )


def _password(made: Conversion) -> dict[str, str]:
    """Docker's own for the registry, for those who do not read it where it is: podman does, enroot has its netrc."""
    if made.runtime not in ("apptainer", "singularity"):
        return {}
    found = Registry(split(made.reference)[0]).credentials()
    name = f"{made.runtime.upper()}_DOCKER"
    return {f"{name}_USERNAME": found[0], f"{name}_PASSWORD": found[1]} if found else {}


# Of both scripts; for any `sh`. A `df` that tells nothing is no reason to stop.
PRELUDE = """\
set -eu
umask 077
fail() { echo "radeon-stack: $(uname -n): $1; $2" >&2; exit 5; }
whole() { [ -f "$file" ] && [ "$(cat "$file.record" 2>/dev/null)" = "$reference $(stat -c %s "$file")" ]; }
lock() { exec 9>>"$1"; flock 9 2>/dev/null; }
room() {  # folder, KiB, remedy
  free=$(df -Pk "$1" | awk 'NR == 2 { print $4 }') || free=
  if [ -n "$free" ] && [ "$free" -lt "$2" ]; then
    fail "about $(($2 / 1024)) MiB are needed in $1, $((free / 1024)) are free" "$3"
  fi
}
own() {  # a folder in a place where everyone may write: made for us alone, or refused
  mkdir -m 700 "$1" 2>/dev/null || true
  if [ -L "$1" ] || [ "$(stat -c %u "$1")" != "$(id -u)" ]; then
    fail "$1 is not yours" "have it removed, or name another folder of this node"
  fi
}"""


# podman takes the namespaces of a process of its own or of a container; the end of a job kills them all, and it then
# refuses everything, since it believes a container to run. Its remedy stops what runs: there is nothing then.
STEADY = """\
steady() {
  (
    flock 9 2>/dev/null || true
    engine info >/dev/null 2>&1 || { engine system migrate && engine rm --all --force --time 0; }
  ) 9>>"$1/lock"
}"""


def _begin(made: Conversion) -> list[str]:
    lines = [PRELUDE, f"file={shlex.quote(made.file)}", f"reference={shlex.quote(made.reference)}"]
    if made.storage:
        lines += [f'engine() {{ {shlex.join(podman(made.storage))} "$@" >&2 9>&-; }}', STEADY]
    return lines


def _call(*words: str) -> str:
    return shlex.join(words)


def _line(made: Conversion, command: Command) -> str:
    """A command whose lines go to stderr. The lock is not for what it leaves running, as podman does."""
    begin = podman(made.storage)
    if made.storage and command[: len(begin)] == begin:
        command = ("engine", *command[len(begin) :])
    words = " ".join('"$partial"' if word == PARTIAL else shlex.quote(word) for word in command)
    return words if command[0] == "engine" else f"{words} >&2 9>&-"


def _failed(made: Conversion) -> str:
    program = "enroot" if made.runtime == "pyxis" else made.runtime
    return _call(
        "fail",
        f"{program} made no image of {made.reference}",
        "see above; what this node does not reach, a login node can convert",
    )


def _kib(size: int) -> str:
    return str(-(-size // 1024))
