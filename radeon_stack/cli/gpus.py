"""`gpus`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from radeon_stack.catalog.sizes import format_size
from radeon_stack.errors import Exit
from radeon_stack.host.bundle import opened
from radeon_stack.host.gpus import Gpu
from radeon_stack.host.machine import look
from radeon_stack.launch.leases import busy, lease_folder
from radeon_stack.launch.supervise import going_on
from radeon_stack.runs.store import home

COLUMNS = ("gpu", "name", "gfx", "memory", "CUs", "node", "PCI", "state")
NUMBERS = ("gpu", "memory", "CUs")
FIRST_DOMAIN, VENDOR = "0000:", "AMD "


@click.command()
@click.option("--sysroot", metavar="DIR", default="/", help="Look at this tree, or bundle, as the machine.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def gpus(sysroot: str, as_json: bool) -> int:
    """The GPUs that ROCm sees: what they are, their numbers for --gpus, and who has them.

    \b
      radeon-stack gpus
      radeon-stack gpus --json | jq '.gpus[] | {index, gfx, memory, render_node, state}'
    """
    with opened(sysroot) as place:
        machine = look(place)
        owners = busy(machine.gpus, lease_folder(home()), going_on) if place.live else {}
    cards = any(not gpu.integrated for gpu in machine.gpus)
    states = [_state(gpu, owners, cards) for gpu in machine.gpus]
    if as_json:
        told = [_record(gpu, state) for gpu, state in zip(machine.gpus, states, strict=True)]
        click.echo(json.dumps({"gpus": told, "problems": list(machine.topology.problems)}, indent=2))
        return Exit.OK
    if machine.gpus:
        _print(machine.gpus, states)
    else:
        click.echo("no GPU that ROCm sees; why: radeon-stack doctor", err=True)
    for problem in machine.topology.problems:
        click.echo(problem, err=True)
    return Exit.OK


def _state(gpu: Gpu, owners: dict[int, str], cards: bool) -> str:
    if gpu.problem:
        return gpu.problem
    if gpu.index in owners:
        return f"in use by {owners[gpu.index]}"
    return "integrated" if gpu.integrated and cards else "free"


def _record(gpu: Gpu, state: str) -> dict[str, Any]:
    return dataclasses.asdict(gpu) | {"memory": gpu.memory, "state": state}


def _print(found: tuple[Gpu, ...], states: list[str]) -> None:
    """What fits 80 columns; --json has all."""
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in NUMBERS else "left", no_wrap=column != "state")
    for gpu, state in zip(found, states, strict=True):
        node = gpu.render_node.rpartition("/")[2]
        place = gpu.pci.removeprefix(FIRST_DOMAIN) + ("" if gpu.partition is None else f"/{gpu.partition}")
        cells = (
            gpu.name.removeprefix(VENDOR),
            gpu.gfx,
            format_size(gpu.memory),
            str(gpu.compute_units),
            node,
            place,
            state,
        )
        table.add_row(str(gpu.index), *map(Text, cells))
    Console().print(table)
