"""Can a job on a node of the cluster do its work: Python, container, folder, clock, network?"""

from __future__ import annotations

from radeon_stack.catalog.sizes import format_size
from radeon_stack.host.checks.finding import Check, Finding, fail, ok, skipped, warn
from radeon_stack.host.checks.images import LEAST_HOME
from radeon_stack.host.cluster_facts import ClusterFacts
from radeon_stack.host.node_record import Interface
from radeon_stack.host.nodes import BusyError, PythonError, SharingError
from radeon_stack.host.runtimes import ORDER, VENV, choose_runtime, why_not

NO_NODE = "no node was asked (RS512)"
CLOCK_SECONDS = 5  # munge refuses credentials that are 300 s off; times in logs mislead long before that
HOME = "export RADEON_STACK_HOME=DIR   # on a file system that all nodes see"
# ROCm heeds the first; HIP and torch count the others within what the first has left.
VISIBLE, WITHIN = "ROCR_VISIBLE_DEVICES", ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


def asked(facts: ClusterFacts) -> Finding:
    """Does a short job run on a node of the partition? It brings the node's facts back as a bundle.

    What doctor says of the node's own driver, GPUs and groups: `radeon-stack doctor --sysroot BUNDLE`.
    """
    if facts.partition is None:
        return skipped("no cluster answers (RS502)")
    if not facts.partition.up:
        return skipped("the partition is down (RS504)")
    error = facts.node_error
    if isinstance(error, BusyError):
        return warn(error.what, f"squeue --partition={facts.partition.name}")
    if isinstance(error, PythonError | SharingError):
        return ok("one ran, and could not tell what it found")
    if error is not None:
        return fail(error.what, *filter(None, [error.remedy]))
    if facts.node is None:
        return skipped("not known")
    return ok(f"on {facts.node.node or facts.node.hostname}; more of it: radeon-stack doctor --sysroot {facts.bundle}")


def python(facts: ClusterFacts) -> Finding:
    """Does the node run this Python? And has it torch, which a run without a container needs?"""
    if isinstance(facts.node_error, PythonError):
        return fail(
            facts.node_error.what, "# install radeon-stack into an environment on a file system that all nodes see"
        )
    node = facts.node
    if node is None:
        return skipped(NO_NODE)
    said = f"{node.python_version}, {node.python}"
    if not node.torch:
        needed = choose_runtime(node).name == VENV
        return (fail if needed else ok)(f"{said}, without torch" + ("" if needed else ", which a container has"))
    return ok(f"{said}, with torch")


def runtime(facts: ClusterFacts) -> Finding:
    """By what a job has its container: Apptainer, Singularity, pyxis with enroot, or rootless podman, in this order.

    Without any of them a job takes the Python of the shared file system as it is.
    """
    node = facts.node
    if node is None:
        return skipped(NO_NODE)
    choice = choose_runtime(node)
    broken = [why_not(node, one.name) for one in node.runtimes if one.name in ORDER and one.why_not]
    if choice.name == VENV:
        said = "; ".join(broken) or choice.why
        return warn(
            f"{said}: jobs take the Python of the shared file system", "apt-get install apptainer   # on the nodes"
        )
    return ok(f"{choice.name}: {choice.why}")


def shared(facts: ClusterFacts) -> Finding:
    """Does the node see the home folder, may it write there, and do locks of one machine count on the other?

    Runs, models and checkpoints lie there. Lustre needs the mount option `flock`; NFS has locks from version 4 on.
    """
    if isinstance(facts.node_error, SharingError):
        return fail(f"{facts.node_error.where}: {facts.node_error.what}", HOME)
    node = facts.node
    if node is None:
        return skipped(NO_NODE)
    kind = node.shared.kind or "a file system"
    if not node.shared.writable:
        return fail("the node may not write there", HOME)
    if node.shared.locks:
        option = "mount -o remount,flock …   # on every node" if kind == "lustre" else HOME
        return fail(f"{kind}: {node.shared.locks}; two processes could write one run", option)
    return ok(f"{kind}: seen, written and locked by the node")


def clocks(facts: ClusterFacts) -> Finding:
    """Do the clocks of the node, of this host and of the file system agree, to some seconds?"""
    node = facts.node
    if node is None:
        return skipped(NO_NODE)
    told = (("this host's", node.shared.clock_offset), ("the file system's", node.shared.mtime_offset))
    off = [
        f"{abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} {what}"
        for what, offset in told
        if _is_off(offset)
    ]
    if off:
        return warn(f"the node's clock is {' and '.join(off)}", "timedatectl set-ntp true   # on the node, and here")
    return ok("they agree")


def room(facts: ClusterFacts) -> Finding:
    """Is there room for runs in the shared folder? A merged 8B model is 15 GiB."""
    free = facts.node.shared.free if facts.node else None
    if free is None:
        return skipped(NO_NODE if facts.node is None else "not known")
    if free < LEAST_HOME:
        return warn(f"{format_size(free)} free for runs; a merged 8B model is 15 GiB", "radeon-stack runs list")
    return ok(f"{format_size(free)} free for runs")


def network(facts: ClusterFacts) -> Finding:
    """By which network do nodes reach each other? A job of several nodes needs one beside the loopback."""
    node = facts.node
    if node is None or facts.partition is None:
        return skipped(NO_NODE)
    several = facts.partition.nodes > 1
    found = [_interface(one) for one in node.network if one.physical or len(node.network) == 1]
    found = found or [_interface(one) for one in node.network]
    found += [f"{port.name} ({port.link}, {port.rate})" for port in node.rdma if port.state == "ACTIVE"]
    if not found:
        said = "the node has no address but the loopback's"
        return fail(f"{said}: no job can span nodes", "ip -4 address   # on the node") if several else ok(said)
    return ok(", ".join(found[:4]))


def visible(facts: ClusterFacts) -> Finding:
    """By which variable is a job told its GPUs? ROCR_VISIBLE_DEVICES alone is right for ROCm.

    Without flags in gres.conf Slurm sets CUDA_VISIBLE_DEVICES too, which ROCm counts within what the first has left:
    a job that was given card 1 alone then has none.
    """
    node = facts.node
    if node is None or not node.gpus_asked:
        return skipped(NO_NODE if node is None else "no GPUs are counted")
    ours, others = node.environment.get(VISIBLE), [name for name in WITHIN if node.environment.get(name)]
    if ours is None:
        return warn(f"a job is not told by {VISIBLE}", "AutoDetect=rsmi   # gres.conf, or Flags=amd_gpu_env")
    if others:
        return warn(f"{VISIBLE}={ours}, and {', '.join(others)} too", "Flags=amd_gpu_env   # gres.conf, at Name=gpu")
    return ok(f"{VISIBLE}={ours}")


def _interface(one: Interface) -> str:
    return f"{one.name} {', '.join(one.addresses)}" + (f" ({one.speed} Mbit/s)" if one.speed else "")


def _is_off(offset: float) -> bool:
    return abs(offset) > CLOCK_SECONDS


CHECKS: tuple[Check[ClusterFacts], ...] = (
    Check("RS512", "a job on a node", asked),
    Check("RS513", "Python on the node", python),
    Check("RS514", "container runtime", runtime),
    Check("RS515", "shared folder", shared),
    Check("RS516", "clocks", clocks),
    Check("RS517", "disk of the shared folder", room),
    Check("RS518", "network of the node", network),
    Check("RS519", "variables of a job's GPUs", visible),
)
