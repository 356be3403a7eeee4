"""`export`: a run as files, and what runs have made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from radeon_stack import atomic
from radeon_stack.catalog.load import read
from radeon_stack.cli.run import drafted_from, not_empty, plan_options, require_environment
from radeon_stack.errors import Exit, UsageError
from radeon_stack.launch.endpoint import write_key
from radeon_stack.launch.exports import EXECUTABLE, FORMS
from radeon_stack.launch.launcher import config_record
from radeon_stack.runs.handover import PARTS, gathered, hand_over
from radeon_stack.runs.sources import find_source
from radeon_stack.runs.store import Run, RunStore, home
from radeon_stack.text import print_line


@click.command()
@click.argument("recipe", required=False)
@click.option("--as", "form", type=click.Choice(list(FORMS)), help="Of a recipe: what kind of file.")
@click.option(
    "--to", "to", metavar="DIR", callback=not_empty, help="With --from: where what was made goes; new, or empty."
)
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
def export(
    recipe: str | None,
    form: str | None,
    to: str | None,
    output: str | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """A run as files that do not need us; or what runs have made, in a folder for other programs.

    \b
      radeon-stack export --from last --to ./my-model      # adapter, merged model, GGUF, model card, sums
      radeon-stack export train-llama --preset demo --as shell -o ./mine && ./mine/run.sh
      radeon-stack export train-llama --preset demo --as compose -o ./mine && docker compose -f mine/compose.yaml up
      radeon-stack export train-llama --preset demo --as quadlet --dry-run
      radeon-stack export train-llama --preset demo --as sbatch --nodes 2 --time 1h -o ./mine && sbatch mine/job.sh
    """
    if to is not None:
        if recipe is not None or form is not None or options["source"] is None:
            raise click.UsageError("--to hands over what a run made: radeon-stack export --from RUN --to DIR")
        return handed_over(options["source"], Path(to).absolute(), dry_run=dry_run, as_json=as_json)
    if recipe is None or form is None:
        raise click.UsageError("which recipe, as what? export RECIPE --as shell, or export --from RUN --to DIR")
    called = read(recipe).name
    folder = Path(output or f"{called}-{form}").absolute()
    if not dry_run:
        _require_new(folder, "--output")
    if form == "sbatch" and options["engine"] is None:
        options["engine"] = "slurm"
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
    if drafted.plan.ports:
        write_key(folder)
    atomic.write_text(folder / "config.json", json.dumps(config_record(drafted.effective), indent=2) + "\n")
    atomic.write_text(folder / name, text)
    if form in EXECUTABLE:
        (folder / name).chmod(0o755)
    click.echo(json.dumps({"file": str(folder / name)}) if as_json else str(folder / name))
    return Exit.OK


def handed_over(source: str, folder: Path, *, dry_run: bool, as_json: bool) -> int:
    """Copy what a run made into a new folder; tells each file on stderr."""
    _require_new(folder, "--to")
    place = find_source(RunStore(home()), source, tuple(PARTS), lambda text: print_line(text, sys.stderr))["source"]
    found = gathered(Path(place))
    told = {
        "folder": str(folder),
        "bytes": found.size,
        "parts": {name: str(place) for name, place in found.parts.items()},
    }
    if not dry_run:
        hand_over(
            found, folder, lambda what, done, total: click.echo(f"{100 * done // (total or 1):>3} % {what}", err=True)
        )
    lines = [f"{name:<8} {place}" for name, place in found.parts.items()]
    click.echo(json.dumps(told) if as_json else "\n".join(lines) if dry_run else str(folder))
    return Exit.OK


def _require_new(folder: Path, where: str) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty", where=where, remedy="name a new folder")
