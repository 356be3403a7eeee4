"""Is there a Slurm here that runs our jobs, lets them save, and counts its GPUs?"""

from __future__ import annotations

from radeon_stack.catalog.versions import version
from radeon_stack.host.checks import cluster_node
from radeon_stack.host.checks.finding import Check, Finding, fail, ok, skipped, warn
from radeon_stack.host.cluster import Cluster, Partition
from radeon_stack.host.cluster_facts import COMMANDS, ClusterFacts

SAVING_SECONDS = 120
"""What a run is given to save itself before it is killed: `launch.planner` has it for every engine."""
TOLD_SECONDS = SAVING_SECONDS + 60  # launch.sbatch: Slurm may be a minute late with the signal
LEAST_SLURM = "20.11"  # its commands' output is what host.cluster reads; tried with 22.05
SHORT_MINUTES = 30
MOST_TOLD = 4
ADMIN = "# for whoever runs the cluster"
NO_CLUSTER = "no cluster answers (RS502)"
LOOSE = ("proctrack/linuxproc", "proctrack/pgid")


def client(facts: ClusterFacts) -> Finding:
    """Are Slurm's commands here? Jobs are submitted by them, as on any login node."""
    if not facts.missing:
        return ok(", ".join(COMMANDS))
    return fail(
        f"there is no {', '.join(facts.missing)} here: is this a login node of the cluster?",
        "apt-get install slurm-client   # with the cluster's slurm.conf and munge key",
    )


def controller(facts: ClusterFacts) -> Finding:
    """Does the controller answer, and which cluster is it?"""
    if facts.missing:
        return skipped("no client here (RS501)")
    if facts.cluster is None:
        return fail(facts.why_not, "scontrol ping", "journalctl --unit munge --since -10min")
    return ok(f"{facts.cluster.name or 'a cluster without a name'}, {len(facts.cluster.partitions)} partitions")


def release(facts: ClusterFacts) -> Finding:
    """Slurm's release. Older ones than 20.11 print what we have not seen; the tests run with 22.05."""
    if facts.cluster is None:
        return skipped(NO_CLUSTER)
    found, least = version(facts.cluster.version), version(LEAST_SLURM)
    if found is None or least is None:
        return warn(f"'{facts.cluster.version}' is no version that we can read")
    if found < least:
        return warn(f"{facts.cluster.version} is older than {LEAST_SLURM}: what it prints was never read by us")
    return ok(facts.cluster.version)


def partition(facts: ClusterFacts) -> Finding:
    """The partition that jobs go to: `--partition`, else the cluster's default one. Is it up, for how long are jobs?"""
    one = facts.partition
    if one is None:
        return skipped(NO_CLUSTER)
    if not one.up:
        others = [other.name for other in facts.cluster.partitions if other.up] if facts.cluster else []
        return fail(
            f"{one.name} is {one.state.lower()}",
            *(f"radeon-stack doctor --engine slurm --partition {name}" for name in others[:1]),
            f"scontrol show partition {one.name}",
        )
    limit = "without a time limit" if one.max_minutes is None else f"jobs of {one.max_minutes} min at most"
    return ok(f"{one.name}{' (the default one)' if one.default else ''}: {one.nodes} nodes, {one.idle} idle, {limit}")


def members(facts: ClusterFacts) -> Finding:
    """Nodes that are down or drained, with the reason that `sinfo -R` gives."""
    one = facts.partition
    if one is None:
        return skipped(NO_CLUSTER)
    broken = [node for node in one.members if node.broken]
    if not broken:
        return ok(f"{one.nodes} nodes, none of them down") if one.nodes else fail(f"{one.name} has no nodes")
    told = "; ".join(
        f"{node.name} {node.state}" + f": {node.reason}" * bool(node.reason) for node in broken[:MOST_TOLD]
    )
    more = f"; and {len(broken) - MOST_TOLD} more" if len(broken) > MOST_TOLD else ""
    remedy = ("sinfo -R", f"scontrol update NodeName={broken[0].name} State=RESUME   # once it is mended")
    if len(broken) == one.nodes:
        return fail(f"no node of {one.name} can be used: {told}{more}", *remedy)
    return warn(f"{len(broken)} of {one.nodes}: {told}{more}", *remedy)


def account(facts: ClusterFacts) -> Finding:
    """Does the cluster run jobs of accounts alone (AccountingStorageEnforce), and have you one?"""
    if facts.cluster is None:
        return skipped(NO_CLUSTER)
    if not facts.enforces:
        return ok("none is needed")
    if facts.accounts is None:
        return skipped("one is needed, and sacctmgr does not tell yours")
    if not facts.accounts:
        return fail(
            f"jobs need an account, and {facts.user} has none",
            f"sacctmgr add user {facts.user} account=ACCOUNT   {ADMIN}",
        )
    return ok(f"yours: {', '.join(facts.accounts[:MOST_TOLD])}")


def requeue(facts: ClusterFacts) -> Finding:
    """May a job be queued again? One whose node fails, or that makes room for another, goes on from its checkpoint."""
    if facts.cluster is None:
        return skipped(NO_CLUSTER)
    told = facts.cluster.settings.get("JobRequeue", "")
    if told == "0":
        return warn("JobRequeue=0: only a job that asks for it (sbatch --requeue) is queued again")
    return ok("jobs whose node fails are queued again") if told else skipped("JobRequeue is not told")


def saving(facts: ClusterFacts) -> Finding:
    """Has a run time to save itself before it is killed? It takes two minutes at most.

    A preempted job has its partition's GraceTime, then KillWait, between SIGTERM and SIGKILL. Before a time limit
    we are signalled by `--signal`, as early as we ask; a limit of a few minutes leaves little to do between.
    """
    one = facts.partition
    if one is None or facts.cluster is None:
        return skipped(NO_CLUSTER)
    wait = _seconds(facts.cluster.settings.get("KillWait", ""))
    if one.max_minutes is not None and one.max_minutes * 60 <= 2 * SAVING_SECONDS:
        return fail(
            f"{one.name} ends jobs after {one.max_minutes} min: a run does little else than start and save",
            f"scontrol update PartitionName={one.name} MaxTime=24:00:00   {ADMIN}",
        )
    if _preempts(one, facts.cluster) and one.grace + wait < SAVING_SECONDS:
        return warn(
            f"a job that makes room for another is killed after {one.grace + wait} s (GraceTime {one.grace}, KillWait "
            f"{wait}): a save that takes longer is lost, and the run goes on from the checkpoint before",
            f"scontrol update PartitionName={one.name} GraceTime={SAVING_SECONDS}   {ADMIN}",
        )
    if one.max_minutes is not None and one.max_minutes < SHORT_MINUTES:
        return warn(f"{one.name} ends jobs after {one.max_minutes} min: a long run is many jobs, each of them queued")
    return ok(f"KillWait {wait} s, GraceTime {one.grace} s; a run is told {TOLD_SECONDS} s before its time is up")


def tracking(facts: ClusterFacts) -> Finding:
    """Does Slurm find all processes of a job when it ends? By cgroups it does.

    By their parents or process groups it does not: a worker that has left them stays, and holds its GPU's memory.
    """
    if facts.cluster is None:
        return skipped(NO_CLUSTER)
    told = facts.cluster.settings.get("ProctrackType", "")
    if told in LOOSE:
        return warn(
            f"{told}: processes that leave their parent outlive the job",
            f"ProctrackType=proctrack/cgroup   {ADMIN}: slurm.conf",
        )
    return ok(told) if told else skipped("ProctrackType is not told")


def counted(facts: ClusterFacts) -> Finding:
    """Does the cluster count its GPUs as generic resources, and as many as the node has?

    A job can only ask for what is counted: without it, two jobs on a node take the same card.
    """
    one, machine = facts.partition, facts.machine
    if one is None:
        return skipped(NO_CLUSTER)
    if machine is None:
        return ok(f"{one.gpus} on a node at most") if one.gpus else skipped("no node told what it has (RS512)")
    cards = [gpu for gpu in machine.gpus if not gpu.integrated]
    member = facts.member
    count = member.gpus if member else one.gpus
    name = member.name if member else "NODE"
    if cards and not count:
        return fail(
            f"{name} has {len(cards)} Radeons, and Slurm counts none",
            f"GresTypes=gpu   {ADMIN}: slurm.conf",
            f"NodeName={name} … Gres=gpu:{len(cards)}   # slurm.conf, to the node's line",
            "AutoDetect=rsmi   # gres.conf, where Slurm was built with ROCm SMI; else a line for each card:",
            *(f"Name=gpu File={gpu.render_node} Flags=amd_gpu_env   # gres.conf" for gpu in cards),
        )
    if not cards and not count:
        return (
            ok("neither the node nor Slurm has any: presets for the CPU")
            if not one.gpus
            else ok(f"none on {name}, {one.gpus} on others")
        )
    if len(cards) != count:
        look = f"radeon-stack doctor --sysroot {facts.bundle}"
        found = f"Slurm counts {count} GPUs on {name}, and {len(cards)} Radeons are there for ROCm"
        return warn(found, look) if cards else fail(found, look)
    return ok(f"{count} on {name}: {', '.join(f'{gres.name}:{gres.type}' for gres in one.gres if gres.type) or 'gpu'}")


def constrained(facts: ClusterFacts) -> Finding:
    """Is a job kept from the GPUs that others were given? By cgroups (task/cgroup, ConstrainDevices) it is.

    Else ROCR_VISIBLE_DEVICES alone tells a job its cards, and a program that does not heed it takes another's.
    """
    if facts.cluster is None or facts.partition is None:
        return skipped(NO_CLUSTER)
    if not facts.partition.gpus:
        return skipped("no GPUs are counted")
    settings = facts.cluster.settings
    if "task/cgroup" in settings.get("TaskPlugin", "") and settings.get("ConstrainDevices", "").lower() == "yes":
        return ok("task/cgroup with ConstrainDevices")
    return warn(
        "nothing keeps a job from the GPUs of another one",
        f"TaskPlugin=task/cgroup,task/affinity   {ADMIN}: slurm.conf",
        "ConstrainDevices=yes   # cgroup.conf",
    )


def _preempts(one: Partition, cluster: Cluster) -> bool:
    """Can a job of this partition be ended for another one?"""
    usual = cluster.settings.get("PreemptType", "preempt/none")
    mode = (one.preempt or cluster.settings.get("PreemptMode", "OFF")).upper()
    return usual != "preempt/none" and any(word in mode for word in ("REQUEUE", "CANCEL"))


def _seconds(text: str) -> int:
    word = text.split()[0] if text.split() else ""
    return int(word) if word.isdigit() and len(word) < 10 else 0


CHECKS: tuple[Check[ClusterFacts], ...] = (
    Check("RS501", "Slurm's client", client),
    Check("RS502", "Slurm's controller", controller),
    Check("RS503", "Slurm's release", release),
    Check("RS504", "partition", partition),
    Check("RS505", "nodes of the partition", members),
    Check("RS506", "account", account),
    Check("RS507", "GPUs that Slurm counts", counted),
    Check("RS508", "requeueing", requeue),
    Check("RS509", "time to save", saving),
    Check("RS510", "processes of a job", tracking),
    Check("RS511", "devices of a job", constrained),
    *cluster_node.CHECKS,
)


def examine_cluster(facts: ClusterFacts) -> list[tuple[Check[ClusterFacts], Finding]]:
    """Every check with what it finds."""
    return [(check, check.evaluate(facts)) for check in CHECKS]
