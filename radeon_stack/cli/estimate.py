"""`run RECIPE --estimate`: how much memory a fine-tune would take, and which of this machine's GPUs has it."""

from __future__ import annotations

import json
import sys

import click

from radeon_stack.catalog.load import Effective
from radeon_stack.catalog.sizes import format_size
from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.errors import Exit, UsageError
from radeon_stack.host.gpus import Gpu
from radeon_stack.host.machine import look
from radeon_stack.host.selection import select
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.launch.estimate import RUNTIME, Estimate
from radeon_stack.launch.placement import ONE, WHERE, Placement, as_data, estimated, fit, room
from radeon_stack.launch.recomputation import chosen
from radeon_stack.text import one_line, print_line


def tell(effective: Effective, place: Sysroot, asked: str | None, *, as_json: bool) -> int:
    """Print the estimate of one card; where the base is shared out, of each that is `asked` for, else of all there are.

    UsageError for a recipe that does not train, for a model that is not at hand, and for shares of unknown number.
    """
    config = effective.config
    if not isinstance(config, FinetuneConfig):
        raise UsageError("memory is estimated of fine-tunes alone", where=effective.name)
    gpus = look(place).gpus
    shares = _shares(config, gpus, asked) if config.train.parallel == "sharded" else 1
    decided, _ = chosen(config, Placement("sharded", shares, "asked for") if shares > 1 else ONE, gpus[:1])
    where = effective.origin.get("config.model", "") + ": config.model"
    found = estimated(decided, shares, shares, where=where)
    if as_json:
        cards = [{"index": g.index, "name": g.name, "room": room(g), "fit": fit(found.total, room(g))} for g in gpus]
        click.echo(json.dumps(as_data(found) | {"gpus": cards}, indent=2))
        return Exit.OK
    for line in lines(found, gpus, shares):
        print_line(line, sys.stdout)
    return Exit.OK


def _shares(config: FinetuneConfig, gpus: tuple[Gpu, ...], asked: str | None) -> int:
    chosen = select(gpus, asked, least=1, most=len(gpus)).gpus if asked is not None else gpus
    count = config.train.processes or len(chosen)
    if count < 2:
        raise UsageError(
            "the base is shared out among several cards: among how many?",
            where=WHERE,
            remedy="say it: --gpus 0,1 or --set train.processes=2" if len(gpus) > 1 else "--set train.processes=2",
        )
    return count


def lines(found: Estimate, gpus: tuple[Gpu, ...], shares: int = 1) -> list[str]:
    """A line a kind, their sum, and what each GPU says to it."""
    rows = [(name, size, found.reasons[name]) for name, size in found.parts.items() if size]
    rows += [("tensors", found.tensors, "the peak that torch's allocator reports")]
    rows += [("runtime", RUNTIME, "contexts, workspaces, gaps: taken, not measured")]
    if found.spare:
        rows += [("can be spared", found.spare, "kept products: where they do not fit, a run does without")]
    rows += [("in all", found.total, "on one card" if shares == 1 else f"on each of {shares} cards")]
    if found.merged:
        rows += [("merged model", found.merged, "in 16 bit, read back when training is over and its memory is free")]
    told = [f"{name:<18}{format_size(size):>10}  {why}" for name, size, why in rows]
    return told + [
        f"GPU {gpu.index}: {one_line(gpu.name)} has {format_size(room(gpu))} for it: {fit(found.total, room(gpu))}"
        for gpu in gpus
    ]
