"""`pull`."""

from __future__ import annotations

import json
import sys

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from radeon_stack.catalog.sizes import format_size
from radeon_stack.errors import ImageError
from radeon_stack.host.bundle import opened
from radeon_stack.host.engines import require_engine
from radeon_stack.host.machine import look
from radeon_stack.images.download import PATIENCE_SECONDS
from radeon_stack.images.published import STABLE, Candidate, Choice, Wanted, first_fitting
from radeon_stack.images.publishing import published
from radeon_stack.images.pulling import Need, need, require_room
from radeon_stack.images.pulling import pull as fetch
from radeon_stack.images.references import split
from radeon_stack.images.registry import Registry
from radeon_stack.runs.store import home
from radeon_stack.text import print_line


@click.command()
@click.argument("reference", required=False)
@click.option(
    "--registry", "registries", envvar="RADEON_STACK_REGISTRY", multiple=True, metavar="HOST/NAME",
    help="Where from; several are tried in their order.",
)  # fmt: skip
@click.option("--kind", default="train", show_default=True, help="train or verify.")
@click.option("--arch", metavar="GFX", help="Instead of this machine's: gfx1201 …, or cpu.")
@click.option("--rocm", metavar="RELEASE", help="This release, instead of the newest that fits.")
@click.option("--channel", default=STABLE, show_default=True, help="The channel to take it from.")
@click.option("--patience", default=PATIENCE_SECONDS, show_default=True, help="Seconds to wait for a next byte.")
@click.option("--or-build", is_flag=True, help="Build it here when it cannot be had.")
@click.option("--sysroot", metavar="DIR", default="/", help="Look at this tree as the machine.")
@click.option("--dry-run", is_flag=True, help="Say what would be pulled, and why; do nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def pull(
    reference: str | None,
    registries: tuple[str, ...],
    kind: str,
    arch: str | None,
    rocm: str | None,
    channel: str,
    patience: float,
    or_build: bool,
    sysroot: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Take the published image that fits this machine: by its labels, not by its name.

    It says why it chose and what it turned down, how much is to download and how much room there is. A broken
    connection is continued where it broke; what arrives is held to its digests.

    \b
      export RADEON_STACK_REGISTRY=registry.example.org/radeon
      radeon-stack pull
      radeon-stack pull --arch gfx1201 --rocm 7.1.1 --dry-run
      radeon-stack pull registry.example.org/radeon@sha256:…
    """
    with opened(sysroot) as place:
        machine = look(place)
    cards = [gpu for gpu in machine.gpus if not gpu.integrated] or list(machine.gpus)
    wanted = Wanted(kind, arch or (cards[0].gfx if cards else "cpu"), machine.driver, rocm)
    require_engine()
    try:
        registry, choice = _find(reference, registries, wanted, channel)
        _take(registry, choice, patience, dry_run, as_json)
    except ImageError as error:
        if not or_build or dry_run:
            raise
        print_line(f"pull: {error}; building it here", sys.stderr)
        from radeon_stack.cli.image import build_images

        arguments = ["--kind", kind, "--arch", wanted.gfx, *(["--rocm", rocm] if rocm else [])]
        build_images.main([*arguments, *(["--json"] if as_json else [])], standalone_mode=False)


def _find(reference: str | None, registries: tuple[str, ...], wanted: Wanted, channel: str) -> tuple[Registry, Choice]:
    if reference:
        where, name = split(reference)
        registry = Registry(where)
        return registry, Choice(published(registry, name), "asked for by name", ())
    return first_fitting(registries, wanted, channel, lambda line: print_line(f"pull: {line}", sys.stderr))


def _take(registry: Registry, choice: Choice, patience: float, dry_run: bool, as_json: bool) -> None:
    one, where = choice.candidate, home()
    needed = need(one, where)
    print_line(
        f"{registry.repository}:{one.tag}" if ":" not in one.tag else f"{registry.repository}@{one.tag}", sys.stderr
    )
    print_line(f"  {one.manifest.digest}", sys.stderr)
    print_line(f"  why: {choice.why}", sys.stderr)
    for tag, why in choice.turned_down:
        print_line(f"  not {tag}: {why}", sys.stderr)
    print_line(f"  {_room(one, needed)}", sys.stderr)
    told = {
        "reference": f"{registry.repository}@{one.manifest.digest}",
        "why": choice.why,
        "turned_down": dict(choice.turned_down),
        "download": needed.download,
    }
    if dry_run:
        if as_json:
            click.echo(json.dumps(told, indent=2))
        return
    require_room(needed, where)
    columns = (TextColumn("  "), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty(), transient=True) as bars:
        task = bars.add_task("", total=needed.download or None)
        done = fetch(
            registry,
            one,
            needed,
            where,
            told=lambda size: bars.update(task, completed=size),
            waiting=lambda why, seconds: print_line(f"  {why}; again in {seconds:.0f} s", sys.stderr),
            patience=patience,
        )
    if as_json:
        click.echo(json.dumps({**told, "id": done.id, "image": done.reference, "tag": done.tag}, indent=2))
    else:
        click.echo(f"{done.reference}\n  as {done.tag}, held to its digests")


def _room(one: Candidate, needed: Need) -> str:
    if needed.here:
        return "nothing to download: the engine has it"
    missing = f"{len(needed.layers)} of {len(one.manifest.layers)} layers are missing"
    unpacked, free = format_size(needed.unpacked), format_size(needed.free)
    return f"{format_size(needed.download)} to download ({missing}), about {unpacked} unpacked, {free} free"
