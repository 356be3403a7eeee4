"""What is asked of a cluster: so many nodes, of which kind, for how long, after what; decided with reasons."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from radeon_stack.catalog.load import Effective
from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.contracts.sections import Listens
from radeon_stack.errors import UsageError
from radeon_stack.host.cluster import minutes as in_slurms_words
from radeon_stack.host.runtimes import VENV
from radeon_stack.launch.confinement import Reasoned
from radeon_stack.launch.plan import Job, LaunchPlan
from radeon_stack.launch.supervise import settle
from radeon_stack.runs.store import RunStore, State
from radeon_stack.text import one_line

MOST_NODES = 128
CPUS_A_PROCESS = 16  # data loading and tokenising take no more; a whole node of 128 is left to others
SHORT = re.compile(r"([0-9]{1,9})([mhd])")
LONGEST = 366 * 1440  # minutes
UNITS = {"m": 1, "h": 60, "d": 1440}
AFTER = re.compile(r"(after|afterany|afterok|afternotok|aftercorr|singleton)(:[0-9_:+]+)?")


@dataclass(frozen=True)
class Wanted:
    """What a person asks of the cluster; None: not said."""

    nodes: int | None = None
    gpus: int | None = None
    partition: str | None = None
    account: str | None = None
    minutes: int | None = None
    after: str | None = None
    requeue: bool | None = None
    container: str | None = None
    more: tuple[str, ...] = ()

    def or_by(self, environ: Mapping[str, str]) -> Wanted:
        """With what is not said as sbatch's variables say it: they would not be seen from a script."""
        partition = self.partition or environ.get("SBATCH_PARTITION") or None
        return replace(self, partition=partition, account=self.account or environ.get("SBATCH_ACCOUNT") or None)

    def or_as(self, before: LaunchPlan) -> Wanted:
        """With what is not said as it was in an earlier plan; what the run waited for has been."""
        job = before.job
        if job is None:
            return self
        return Wanted(
            self.nodes or job.nodes,
            job.gpus if self.gpus is None else self.gpus,
            self.partition or job.partition,
            self.account or job.account,
            self.minutes or job.minutes,
            self.after,
            job.requeue if self.requeue is None else self.requeue,
            self.container or before.client or VENV,
            self.more or job.more,
        )


def minutes(text: str) -> int:
    """`90m`, `4h`, `2d`, or Slurm's own forms: minutes, hours:minutes:seconds, days-hours. UsageError for any other."""
    short = SHORT.fullmatch(text)
    found = int(short[1]) * UNITS[short[2]] if short else in_slurms_words(text) or 0
    if not 0 < found <= LONGEST:
        raise UsageError(f"'{one_line(text)}' is no time", where="--time", remedy="--time 4h, 90m, 2d or 1-12:00:00")
    return found


def dependency(text: str | None, store: RunStore) -> str | None:
    """What a job waits for, in Slurm's words: those, or a run that has to have ended well."""
    if text is None or AFTER.fullmatch(text):
        return text
    run = store.find(text)
    status = run.status()
    job = str(status.handle.get("job", "")) if status else ""
    if not job:
        raise UsageError(f"{run.id} is no job of a cluster", where="--after", remedy="a run with --engine slurm")
    outcome = settle(run)
    if outcome.state is State.DONE:  # its controller forgets such a job in minutes
        return None
    if outcome.state is not State.RUNNING:
        what = f"{run.id} has {outcome.state}: nothing will ever come after it"
        raise UsageError(what, where="--after", remedy=outcome.remedy or "leave it out")
    return f"afterok:{job}"


def processes_of(effective: Effective, gpus: int) -> int:
    """Of one node: one a GPU, or what the recipe says for CPUs."""
    if gpus:
        return gpus
    return (effective.config.train.processes or 1) if isinstance(effective.config, FinetuneConfig) else 1


def job_for(effective: Effective, wanted: Wanted, gpus: int, cpus: int, after: str | None) -> tuple[Job, Reasoned]:
    """The job, and a reason for each of its fields. `gpus` are chosen of a node that has `cpus` processors for them."""
    nodes = wanted.nodes or 1
    if not 1 <= nodes <= MOST_NODES:
        raise UsageError(f"found {nodes}; 1 to {MOST_NODES}", where="--nodes")
    if nodes > 1 and not isinstance(effective.config, FinetuneConfig):
        raise UsageError(f"{effective.name} takes one node", where="--nodes", remedy="leave it out")
    if isinstance(effective.config, Listens):
        raise UsageError(f"{effective.name} is called at this machine", where="--engine slurm", remedy="leave it out")
    processes = processes_of(effective, gpus)
    each = f"{processes} process{'es' * (processes > 1)}"
    share = min(cpus, CPUS_A_PROCESS * processes)
    unsaid = "the cluster's own choice"
    fields: Reasoned = {
        "nodes": (nodes, "asked for" if wanted.nodes else "one is enough unless more are asked for"),
        "gpus": (gpus, "of each node, one a process" if gpus else "the recipe takes none"),
        "cpus": (share, f"of each node: up to {CPUS_A_PROCESS} for each of {each}"),
        "partition": (wanted.partition, "asked for" if wanted.partition else unsaid),
        "account": (wanted.account, "asked for" if wanted.account else unsaid),
        "minutes": (wanted.minutes, "asked for" if wanted.minutes else "as long as the partition gives"),
        "after": (after, "asked for" if after else "it waits for nothing"),
        "requeue": (
            wanted.requeue is not False,
            "you leave it out"
            if wanted.requeue is False
            else "begun again from its last checkpoint after its time, a preemption or a node's death",
        ),
        "more": (wanted.more, "asked for" if wanted.more else "nothing more is asked"),
    }
    return Job(**{name: value for name, (value, _) in fields.items()}), fields
