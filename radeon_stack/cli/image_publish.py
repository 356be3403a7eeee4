"""`image push` and `image promote`."""

from __future__ import annotations

import json
import sys

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from radeon_stack.catalog.sizes import format_size
from radeon_stack.errors import CheckError
from radeon_stack.host.engines import require_engine
from radeon_stack.host.machine import look
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.images.published import STABLE
from radeon_stack.images.publishing import channel_tag, immutable_tag, published
from radeon_stack.images.publishing import promote as move
from radeon_stack.images.publishing import push as publish
from radeon_stack.images.references import repository, split
from radeon_stack.images.registry import Registry
from radeon_stack.images.resolve import local_image
from radeon_stack.launch.verification import require_ok, run_verification, verification_plan
from radeon_stack.text import print_line

REGISTRY_VARIABLE = "RADEON_STACK_REGISTRY"


@click.command()
@click.argument("image")
@click.option("--registry", envvar=REGISTRY_VARIABLE, required=True, metavar="HOST/NAME", help="Where to.")
@click.option("--dry-run", is_flag=True, help="Print where it would go, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def push(image: str, registry: str, dry_run: bool, as_json: bool) -> None:
    """Verify an image once more, push it by digest with its bill of materials, then tag it.

    Its tag, <kind>-<platform>-<key>, never moves. Who may push is Docker's own affair: docker login.

    \b
      radeon-stack image push radeon-stack/train:rocm7.1.1-gfx1201 --registry registry.example.org/radeon
    """
    where = repository(registry)
    require_engine()
    found = local_image(image)
    tag = immutable_tag(found.labels)
    if dry_run:
        click.echo(f"{where}:{tag}")
        return
    require_ok(run_verification(verification_plan(found, look(), Sysroot(), on_gpu=False)), image)
    print_line("✓ verified", sys.stderr)
    with _bars() as bars:
        tasks: dict[str, object] = {}

        def told(layer: str, done: int, total: int) -> None:
            if total and layer not in tasks:
                tasks[layer] = bars.add_task(layer, total=total)
            if total:
                bars.update(tasks[layer], completed=done, total=total)  # type: ignore[arg-type]

        result = publish(found, where, told)
    if as_json:
        click.echo(json.dumps({"repository": str(where), **vars(result)}, indent=2))
        return
    click.echo(
        f"{where}@{result.digest}\n  {where}:{result.tag}  {format_size(result.size)}, bill of materials {result.sbom}"
    )


@click.command()
@click.argument("reference")
@click.option("--channel", default=STABLE, show_default=True, help="The channel to move.")
@click.option("--dry-run", is_flag=True, help="Print what would move, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def promote(reference: str, channel: str, dry_run: bool, as_json: bool) -> None:
    """Move a channel onto a published image: `pull` takes it from then on.

    \b
      radeon-stack image promote registry.example.org/radeon:train-rocm7.1.1-gfx1201-0123456789abcdef
    """
    where, name = split(reference)
    if name.endswith(f"-{channel}"):
        raise CheckError(f"{name} is the channel itself", where=reference, remedy="name what it should point to")
    registry = Registry(where)
    if dry_run:
        found = published(registry, name)
        click.echo(f"{where}:{channel_tag(found.labels, channel)} → {found.manifest.digest}")
        return
    tag, before, after = move(registry, name, channel)
    if as_json:
        click.echo(json.dumps({"tag": f"{where}:{tag}", "before": before, "after": after}, indent=2))
        return
    moved = "was there already" if before == after else f"was {before or 'nothing'}"
    click.echo(f"{where}:{tag} → {after}\n  {moved}")


def _bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty(), transient=True)
