"""The options that say what is asked of a cluster."""

from __future__ import annotations

import click

from radeon_stack.errors import UsageError
from radeon_stack.host.runtimes import ORDER, VENV
from radeon_stack.launch.cluster import Wanted, minutes

FLAGS = {
    "nodes": "--nodes",
    "gpus_per_node": "--gpus-per-node",
    "partition": "--partition",
    "account": "--account",
    "time": "--time",
    "after": "--after",
    "no_requeue": "--no-requeue",
    "container": "--container",
    "sbatch": "--sbatch",
}
CONTAINERS = (*ORDER, VENV)
CLUSTER_OPTIONS = (
    click.option("--nodes", type=click.IntRange(1), help="Of a cluster: so many, each with as many GPUs."),
    click.option("--gpus-per-node", type=click.IntRange(0), help="Of a cluster. Default: what the recipe wants."),
    click.option("--partition", metavar="NAME", help="Of a cluster. Default: its own."),
    click.option("--account", metavar="NAME", help="Of a cluster: who pays."),
    click.option("--time", metavar="4h", help="Of a cluster: then it saves, queues again and goes on."),
    click.option("--after", metavar="RUN", help="Of a cluster: begin when that run has ended well; or afterany:JOB."),
    click.option("--no-requeue", is_flag=True, help="Of a cluster: when it is ended before its time, that is its end."),
    click.option("--container", type=click.Choice(CONTAINERS), help="Of a cluster. Default: what its nodes have."),
    click.option("--sbatch", multiple=True, metavar="OPTION", help="Of a cluster: one more of sbatch's: --qos=high."),
)


def wanted_of(
    *,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    partition: str | None = None,
    account: str | None = None,
    time: str | None = None,
    after: str | None = None,
    no_requeue: bool = False,
    container: str | None = None,
    sbatch: tuple[str, ...] = (),
) -> Wanted:
    """What these options say. UsageError for a value that makes no sense."""
    given = {"partition": partition, "account": account, "time": time, "after": after}
    for name, value in given.items():
        if value == "":
            raise UsageError("is empty", where=FLAGS[name], remedy="give a value, or leave the option out")
    return Wanted(
        nodes,
        gpus_per_node,
        partition,
        account,
        minutes(time) if time is not None else None,
        after,
        False if no_requeue else None,
        container,
        sbatch,
    )
