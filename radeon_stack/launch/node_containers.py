"""A LaunchPlan's container on a cluster's node: the words for `srun`, and those before the workload's command.

One container a task: processes that share memory with each other are started by one task, in one container.

What each runtime takes was read in its own documentation and source:
apptainer 1.1 and newer, https://apptainer.org/docs/user/main/cli/apptainer_exec.html; singularity is SingularityCE
3.10 and newer (`--mount` since 3.9, `--no-eval` since 3.10), https://docs.sylabs.io/guides/latest/user-guide;
pyxis, https://github.com/NVIDIA/pyxis/wiki/Usage and its args.c; podman-run(1), rootless.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from radeon_stack.errors import UsageError
from radeon_stack.images.convert import podman
from radeon_stack.launch.access import VISIBLE
from radeon_stack.launch.docker import mount_flag, run_flags
from radeon_stack.launch.plan import LaunchPlan, Mount

# Slurm, and whoever sets up the meeting of several processes, set these on the node, each task's its own. A `*` stands
# for the rest of a name. Of RADEON_STACK_* the attempt alone: the caller's home folder is nothing inside, and the image
# sets its own.
FORWARDED = (
    *VISIBLE,
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    "SLURM_*",
    "RADEON_STACK_ATTEMPT",
)
ENV = "/usr/bin/env"  # of the image: it takes values as they are, whatever is in them
SHARED_MEMORY = "/dev/shm"  # noqa: S108
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")
# Apptainer keeps the caller's variables out, and takes in those with a prefix: what they are, only the node knows.
# The text is constant: names are its arguments, values stay in the environment.
FORWARD = """\
_prefix=$1; shift
while [ "$1" != -- ]; do
  case $1 in
    *\\*) _names=$(env | sed -n "s/^\\(${1%?}[A-Za-z0-9_]*\\)=.*/\\1/p") ;;
    *) _names=$1 ;;
  esac
  for _name in $_names; do
    eval "[ -z \\"\\${$_name+x}\\" ] || export \\"$_prefix$_name=\\$$_name\\""
  done
  shift
done
shift
exec "$@"
"""


@dataclass(frozen=True)
class Words:
    """`srun`'s own options, and what stands before the workload's command."""

    srun: tuple[str, ...]
    before: tuple[str, ...]


def words(plan: LaunchPlan, image: str, forwarded: Sequence[str] = FORWARDED, *, storage: str = "") -> Words:
    """The container of `plan`, by the runtime that `plan.client` names.

    `image` is what the site has of it: a .sif or .sqsh file, podman's local name. `storage` is podman's, on the node's
    own disk ("": its default). `forwarded` are variables that the task has and the workload needs. No value of a
    secret is in the words. UsageError where a name or path has no way to be written.
    """
    _require_writable(plan, forwarded)
    if plan.client == "podman":
        return Words((), _podman(plan, image, forwarded, storage))
    if plan.client == "pyxis":
        return Words(_pyxis(plan, image, forwarded), _environment(plan))
    return Words((), _apptainer(plan, image, forwarded))


def lost(plan: LaunchPlan) -> tuple[str, ...]:
    """What the plan asks for and its runtime has no way to give: each with what is there instead."""
    found: list[str] = []
    if plan.memory is not None:
        found.append("memory: the job's limit holds (Slurm's --mem), the container has none of its own")
    if plan.ports:
        found.append("ports: nothing is published; the node's own network is the container's")
    return (*found, *_LOST[str(plan.client)](plan))


def _apptainer(plan: LaunchPlan, image: str, forwarded: Sequence[str]) -> tuple[str, ...]:
    program = str(plan.client)
    prefix = program.upper()
    flags = ["--containall", "--no-home", "--no-privs", "--no-eval", "--pwd", "/"]
    flags += ["--net", "--network", "none"] if plan.network == "none" else []
    for mount in (*plan.mounts, *(Mount(path, path, read_only=False) for path in plan.devices)):
        flags += ["--mount", mount_flag(mount)]
    # What a site's module binds for everybody is no part of the plan.
    without = [part for name in ("BIND", "BINDPATH", "MOUNT") for part in ("-u", f"{prefix}_{name}")]
    taken = ("sh", "-c", FORWARD, "sh", f"{prefix}ENV_", *forwarded, *plan.secrets, "--")
    # Its /tmp is 64 MiB, unless the site has said otherwise.
    scratch = () if "TMPDIR" in dict(plan.env) else (f"TMPDIR={SHARED_MEMORY}",)
    return (*taken, "env", *without, program, "exec", *flags, image, *_environment(plan), *scratch)


def _apptainer_lost(plan: LaunchPlan) -> list[str]:
    found = ["mounts: what the site's configuration names (`bind path`) is there as well"]
    if plan.shm is not None:
        found.append(f"shm: {SHARED_MEMORY} is the container's own, and as large as half of the node's memory")
    if plan.tmpfs:
        found.append(
            "tmpfs: /tmp is as large as the site's configuration says (`sessiondir max size`, 64 MiB), "
            f"so that TMPDIR is {SHARED_MEMORY}"
        )
    return found


def _pyxis(plan: LaunchPlan, image: str, forwarded: Sequence[str]) -> tuple[str, ...]:
    # Slurm's own variables come along with any of these; a variable that is not named stays outside.
    exported = [name for name in (*forwarded, *plan.secrets) if not name.endswith("*")]
    mounts = [f"{m.source}:{m.target}{':ro' * m.read_only}" for m in plan.mounts]
    mounts += [f"{path}:{path}" for path in plan.devices]
    flags = ["--no-container-mount-home", "--no-container-remap-root", "--no-container-entrypoint"]
    flags += ["--container-readonly"] if plan.read_only_root else []
    return (
        f"--export={','.join(exported) or 'NONE'}",
        f"--container-image={image}",
        *flags,
        "--container-workdir=/",
        *([f"--container-mounts={','.join(mounts)}"] if mounts else []),
        *([f"--container-env={','.join(exported)}"] if exported else []),
    )


def _pyxis_lost(plan: LaunchPlan) -> list[str]:
    dev = "devices: the node's whole /dev is there, unless the site's enroot.conf says ENROOT_RESTRICT_DEV"
    found = [f"{dev}; Slurm's cgroup keeps the other GPUs closed (ConstrainDevices)"]
    if plan.cap_drop or plan.security:
        found.append("cap_drop, security: none can be asked for; enroot has no rights beyond yours to give")
    if plan.ipc is not None or plan.shm is not None:
        found.append(f"ipc, shm: {SHARED_MEMORY}, and the processes to be seen, are the node's")
    if plan.network == "none":
        found.append("network: it is the node's, though the recipe asks for none")
    return found


def _podman(plan: LaunchPlan, image: str, forwarded: Sequence[str], storage: str) -> tuple[str, ...]:
    # The engine of a job has no cgroup to hand out: Slurm's holds all that is in it.
    network = plan.network if plan.network == "none" else "host"
    held = replace(plan, memory=None, ports=(), network=network)
    flags = ["--rm", "--pull=never", "--cgroups=disabled", "--log-driver=none", "--workdir=/", *run_flags(held)]
    for name in plan.unset:
        flags += ["--unsetenv", name]
    for name in forwarded:
        flags += ["--env", name]
    # No entrypoint: what follows the image is the command.
    return (*podman(storage), "run", *flags, "--entrypoint=", image)


def _podman_lost(plan: LaunchPlan) -> list[str]:
    # Seen of podman 4.3.1 with a real Slurm 22.05; the second joins the namespaces of the first.
    told = "stop_seconds: where Slurm signals by cgroup (ProctrackType=proctrack/cgroup) a SIGTERM ends it at once: "
    ask = "ask it to stop by SIGUSR1 (--signal=USR1@SECONDS), which a second container of yours on a node does not hear"
    other = "elsewhere what is killed without having heeded SIGTERM outlives its job"
    found = [f"{told}{ask}; {other}"]
    return found + (["network: the node's, for a bridge leads to no other node"] if plan.network == "bridge" else [])


def _environment(plan: LaunchPlan) -> tuple[str, ...]:
    """Set inside the image, where no runtime reads a value's commas and dollar signs, or keeps HOME for itself."""
    unset = [part for name in plan.unset for part in ("-u", name)]
    return (ENV, *unset, *(f"{name}={value}" for name, value in plan.env))


_LOST: dict[str, Callable[[LaunchPlan], list[str]]] = {
    "apptainer": _apptainer_lost,
    "singularity": _apptainer_lost,
    "pyxis": _pyxis_lost,
    "podman": _podman_lost,
}
RUNTIMES = tuple(_LOST)
# pyxis splits at these and has no quotes; and it writes mounts into a script of bash's, between double quotes.
_UNWRITABLE = {"pyxis": ',:"$`\\'}


def _require_writable(plan: LaunchPlan, forwarded: Sequence[str]) -> None:
    if plan.client not in RUNTIMES:
        raise UsageError(
            f"'{plan.client}' is no runtime of containers on a node",
            where="--engine slurm",
            remedy=f"one of {', '.join(RUNTIMES)}",
        )
    for name in (*dict(plan.env), *plan.secrets, *plan.unset):
        if not NAME.fullmatch(name):
            raise UsageError(f"'{name}' cannot be a variable's name", where="env", remedy="letters, digits and _")
    for name in forwarded:
        if not PATTERN.fullmatch(name):
            raise ValueError(name)
    refused = _UNWRITABLE.get(plan.client, "")
    for path in (*(path for mount in plan.mounts for path in (mount.source, mount.target)), *plan.devices):
        bad = [char for char in path if char in refused or not char.isprintable()]
        if bad or not path.startswith("/"):
            raise UsageError(
                f"{bad[0]!r} in {path!r}" if bad else f"'{path}' is no absolute path",
                where="mounts",
                remedy=f"{plan.client} has no way to write it: put it under another name",
            )
