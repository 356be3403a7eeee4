"""What a plan is made in, found out in its order: cards, then engine and image, then the faults known of all three."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from radeon_stack.catalog.load import Effective
from radeon_stack.errors import ImageError, MachineError, UsageError
from radeon_stack.host.bundle import opened
from radeon_stack.host.choices import Choice as Taken
from radeon_stack.host.cluster import cluster, partition_named
from radeon_stack.host.gpus import Gpu
from radeon_stack.host.known_issues import Mitigation, Setup, mitigations
from radeon_stack.host.machine import Machine, look
from radeon_stack.host.node_record import NodeRecord
from radeon_stack.host.nodes import node_of
from radeon_stack.host.probes import Found, Subject
from radeon_stack.host.selection import Selection, select
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.launch.choose import Choice, choose, choose_for_nodes
from radeon_stack.launch.cluster import Wanted, job_for
from radeon_stack.launch.leases import busy, lease_folder
from radeon_stack.launch.node_access import storage_of
from radeon_stack.launch.placement import ONE, Placement
from radeon_stack.launch.plan import Job
from radeon_stack.launch.probing import found_for, subject_of
from radeon_stack.launch.supervise import going_on


@dataclass(frozen=True)
class Asked:
    """What a person asked for beyond the recipe."""

    gpus: str | None = None
    engine: str = "auto"
    image: str | None = None
    shared: bool = False
    without: tuple[str, ...] = ()
    """Known issues whose mitigations are left out."""
    as_many: int | None = None
    """So many GPUs where `gpus` does not say it: as the run had that is resumed."""
    cluster: Wanted = field(default_factory=Wanted)
    after: str | None = None
    """What a job waits for, in its cluster's words."""


@dataclass(frozen=True)
class Circumstances:
    """The machine, the cards chosen on it, the engine and image, what is known and was measured of these together."""

    machine: Machine
    selection: Selection
    choice: Choice
    mitigations: tuple[Mitigation, ...] = ()
    without: tuple[str, ...] = ()
    shared: bool = False
    sysroot: Sysroot = field(default_factory=Sysroot)
    setup: Setup = field(default_factory=lambda: Setup(frozenset(), 0))
    subject: Subject = ()
    probe: Found = field(default_factory=Found)
    choices: tuple[Taken, ...] = ()
    placement: Placement = ONE
    """What a draft decided for its recipe: `choices`, and how the work is shared."""
    job: Job | None = None
    job_reasons: Mapping[str, str] = field(default_factory=dict)
    record: NodeRecord | None = None
    """What is asked of a cluster; machine and selection are those of one of its nodes then, which has told the rest."""

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Of all nodes."""
        return self.selection.gpus * (self.job.nodes if self.job else 1)


def find_out(
    effective: Effective, sysroot: Sysroot, asked: Asked, home: Path, say: Callable[[str], None] = lambda text: None
) -> Circumstances:
    """Look at the machine and decide. MachineError or ImageError says what is missing and how to get it.

    `say` hears what has to be waited for.
    """
    if asked.engine == "slurm":
        return on_cluster(effective, sysroot, asked, home, say)
    if asked.cluster != Wanted():
        raise UsageError("is for a cluster", where="--nodes, --partition, …", remedy="add --engine slurm")
    machine = look(sysroot)
    wanted = effective.recipe.resources.gpus
    in_use = busy(machine.gpus, lease_folder(home), going_on) if sysroot.live and not asked.shared else {}
    most = wanted.max if asked.gpus is not None else asked.as_many or wanted.usual
    selection = select(
        machine.gpus, asked.gpus, least=wanted.min, most=most, busy=in_use, wsl=machine.wsl and wanted.min > 0
    )
    choice = choose(effective, selection, asked.engine, asked.image, home)
    _require_same_gfx(selection, choice)
    where = setup(machine, selection, choice)
    found = mitigations(where, asked.without)
    left_out = tuple(one.id for one in mitigations(where) if one.id in asked.without)
    subject = subject_of(selection, choice, where.rocm)
    probe = found_for(home, subject)
    return Circumstances(machine, selection, choice, found, left_out, asked.shared, sysroot, where, subject, probe)


def on_cluster(
    effective: Effective, sysroot: Sysroot, asked: Asked, home: Path, say: Callable[[str], None]
) -> Circumstances:
    """The same for a cluster, one of whose nodes is looked at in this machine's place."""
    if asked.gpus is not None or asked.shared:
        where = "--gpus" if asked.gpus is not None else "--share"
        raise UsageError("Slurm chooses the GPUs", where=where, remedy="say how many: --gpus-per-node 2")
    if not sysroot.live:
        raise UsageError("a cluster is asked itself", where="--sysroot", remedy="leave it out")
    wanted = effective.recipe.resources.gpus
    job_wanted = asked.cluster.or_by(os.environ)
    count = wanted.usual if job_wanted.gpus is None else job_wanted.gpus
    there = cluster()
    partition = partition_named(there, job_wanted.partition)
    more = (*([f"--account={job_wanted.account}"] if job_wanted.account else []), *job_wanted.more)
    # One GPU tells what the others are, and is free sooner than all.
    node = node_of(home, there, partition, min(count, 1), say=say, options=more)
    with opened(str(node.machine)) as place:
        machine = look(place)
    machine = replace(machine, memory=min(machine.memory, partition.memory or machine.memory))
    selection = select(machine.gpus, None, least=max(wanted.min, count), most=min(count, wanted.max))
    choice = choose_for_nodes(effective, selection, node.record, job_wanted.container, asked.image, home)
    _require_same_gfx(selection, choice)
    choice = replace(choice, engine="slurm", why=_where(there.name, partition.name, choice))
    if choice.image is None and not node.record.torch:
        raise MachineError(
            f"this Python lacks torch on {node.record.hostname}",
            where=f"partition {partition.name}",
            remedy="make setup on a file system that all nodes see",
        )
    cpus = node.record.all_cpus * count // max(len(machine.gpus), 1) if count else node.record.all_cpus
    job, fields = job_for(effective, job_wanted, len(selection.gpus), max(cpus, 1), asked.after)
    if choice.site is not None:
        job = replace(
            job,
            images=str(home.absolute()),
            download=choice.site.download,
            plain=choice.site.plain,
            storage=storage_of(choice.runtime),
        )
    met = setup(machine, selection, choice, job.nodes)
    found = mitigations(met, asked.without)
    left_out = tuple(one.id for one in mitigations(met) if one.id in asked.without)
    subject = subject_of(selection, choice, met.rocm)
    reasons = {name: why for name, (_, why) in fields.items()}
    return Circumstances(
        machine,
        selection,
        choice,
        found,
        left_out,
        setup=met,
        subject=subject,
        probe=found_for(home, subject),
        job=job,
        record=node.record,
        job_reasons=reasons,
    )


def _where(cluster: str, partition: str, choice: Choice) -> str:
    told = f"slurm: asked for; cluster {cluster}, partition {partition}"
    return told if choice.image else f"{told}; {choice.runtime_why}"


def setup(machine: Machine, selection: Selection, choice: Choice, nodes: int = 1) -> Setup:
    """What known issues are looked up for: the chosen cards, and what the image or the Python that is taken has."""
    gpus = selection.gpus
    torch = _torch(choice)
    rocm = choice.image.rocm if choice.image else _rocm_of(torch)
    return Setup(
        gfx=frozenset(gpu.gfx for gpu in gpus),
        gpus=len(gpus) * nodes,
        rocm=rocm,
        kernel=machine.kernel,
        components={"torch": torch},
        integrated=any(gpu.integrated for gpu in machine.gpus) and not all(gpu.integrated for gpu in machine.gpus),
        nodes=nodes,
    )


def _require_same_gfx(selection: Selection, choice: Choice) -> None:
    chosen = {gpu.gfx for gpu in selection.gpus}
    if choice.image is not None and choice.image.gfx and chosen and choice.image.gfx not in chosen:
        raise ImageError(
            f"{choice.image.name} has code for {choice.image.gfx}; the chosen GPU is {min(chosen)}",
            where="--image",
            remedy=f"make image ARCH={min(chosen)}, or choose another GPU: --gpus {choice.image.gfx}",
        )


def _torch(choice: Choice) -> str:
    if choice.image is not None:
        return choice.image.torch
    return choice.environment.spec.platform.torch if choice.environment else _installed("torch")


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _rocm_of(torch: str) -> str:
    """`7.1.1` of `2.9.1+rocm7.1.1.git351ff442`."""
    _, _, local = torch.partition("+rocm")
    return ".".join(part for part in local.split(".") if part.isdigit())
