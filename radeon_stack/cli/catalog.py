"""`list` and `show`."""

from __future__ import annotations

import json
from typing import Any

import click

from radeon_stack.catalog.load import RecipeFile, read, recipe_paths, resolve
from radeon_stack.catalog.merge import flatten
from radeon_stack.catalog.sizes import format_size
from radeon_stack.errors import StackError

SIZES = ("resources.memory", "resources.shm")


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
def list_recipes(as_json: bool) -> None:
    """The recipes there are, with their presets."""
    found = [_summary(path.stem) for path in recipe_paths()]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for entry in found:
        click.echo(f"{entry['name']:<20} {entry['summary'] or entry['error']}")
        for name, summary in entry["presets"].items():
            click.echo(f"  --preset {name:<9} {summary}")


@click.command()
@click.argument("recipe")
@click.option("--preset", metavar="NAME", help="A preset of the recipe, such as demo.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="A value, such as train.steps=50.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def show(recipe: str, preset: str | None, sets: tuple[str, ...], as_json: bool) -> None:
    """A recipe's effective values, and where each came from.

    \b
      radeon-stack show train-llama
      radeon-stack show train-llama --preset demo --set train.steps=50 --json
    """
    effective = resolve(read(recipe), preset, sets)
    rows = [(key, value, effective.origin.get(key, "default")) for key, value in flatten(effective.tree())]
    if as_json:
        values = {key: {"value": value, "from": origin} for key, value, origin in rows}
        click.echo(json.dumps({"recipe": effective.name, "preset": preset, "values": values}, indent=2))
        return
    width = max(len(key) for key, _, _ in rows)
    file = str(effective.path)
    for key, value, origin in rows:
        shown = format_size(value) if key in SIZES else value if isinstance(value, str) else json.dumps(value)
        click.echo(f"{key:<{width}}  {shown!s:<32}  {origin.replace(file, effective.path.name)}")


def _summary(name: str) -> dict[str, Any]:
    """What a recipe says of itself; a broken one is listed with its error."""
    entry: dict[str, Any] = {"name": name, "summary": "", "presets": {}, "error": ""}
    try:
        source: RecipeFile = read(name)
        entry["summary"] = resolve(source).recipe.summary
        entry["presets"] = {preset: resolve(source, preset).recipe.summary for preset in source.presets}
    except StackError as error:
        entry["error"] = str(error)
    return entry
