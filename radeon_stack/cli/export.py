"""`export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from radeon_stack import atomic
from radeon_stack.catalog.load import read
from radeon_stack.cli.run import drafted_from, not_empty, plan_options, require_environment
from radeon_stack.errors import Exit, UsageError
from radeon_stack.launch.exports import FORMS
from radeon_stack.launch.launcher import config_record
from radeon_stack.runs.store import Run, RunStore, home


@click.command()
@click.argument("recipe")
@click.option("--as", "form", type=click.Choice(list(FORMS)), required=True, help="What kind of file.")
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    callback=not_empty,
    help="Where to (default: ./RECIPE-FORM); it has to be empty or new.",
)
@click.option("--dry-run", is_flag=True, help="Print the file, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@plan_options
def export(recipe: str, form: str, output: str | None, dry_run: bool, as_json: bool, **options: Any) -> int:
    """A run as files that do not need us: the same plan as a script, a compose file or a systemd unit.

    \b
      radeon-stack export train-llama --preset demo --as shell -o ./mine && ./mine/run.sh
      radeon-stack export train-llama --preset demo --as compose -o ./mine && docker compose -f mine/compose.yaml up
      radeon-stack export train-llama --preset demo --as quadlet --dry-run
    """
    called = read(recipe).name
    folder = Path(output or f"{called}-{form}").absolute()
    if not dry_run and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty", where="--output")
    render, name = FORMS[form]
    name = name.format(name=called)
    store = RunStore(home())
    drafted, _ = drafted_from(store, recipe=recipe, at=Run(folder), cache=folder / "cache", **options)
    text = render(drafted.plan)
    if dry_run:
        click.echo(json.dumps({"file": str(folder / name), "text": text}) if as_json else text, nl=as_json)
        return Exit.OK
    require_environment(drafted)
    (folder / "artifacts").mkdir(parents=True, exist_ok=True)
    (folder / "cache").mkdir(exist_ok=True)
    (folder / "events.jsonl").touch()
    atomic.write_text(folder / "config.json", json.dumps(config_record(drafted.effective), indent=2) + "\n")
    atomic.write_text(folder / name, text)
    if form == "shell":
        (folder / name).chmod(0o755)
    click.echo(json.dumps({"file": str(folder / name)}) if as_json else str(folder / name))
    return Exit.OK
