"""Finds recipe files, reads them and gives the effective, typed recipe."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from radeon_stack.catalog.folders import data_folder
from radeon_stack.catalog.merge import Layers, Tree, flatten, parse_assignment
from radeon_stack.catalog.problems import explain, nearest
from radeon_stack.catalog.recipe import Recipe
from radeon_stack.contracts import WORKLOADS
from radeon_stack.errors import UsageError

MAX_RECIPE_BYTES = 1 << 20


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it was read: not yet merged, not yet typed."""

    name: str
    path: Path
    tree: Mapping[str, Any]

    @property
    def presets(self) -> Mapping[str, Any]:
        presets = self.tree.get("presets", {})
        if not isinstance(presets, Mapping) or not all(isinstance(p, Mapping) for p in presets.values()):
            raise UsageError("must be a table of tables", where=f"{self.path}: presets")
        return presets


@dataclass(frozen=True)
class Effective:
    """A recipe with every layer merged and every value checked."""

    name: str
    preset: str | None
    path: Path
    recipe: Recipe
    config: BaseModel
    origin: Mapping[str, str]

    @property
    def image_kind(self) -> str:
        """The kind of image it runs in: the recipe's, or that with the layer that its configuration asks for."""
        layer = getattr(self.config, "layer", "")
        return f"{self.recipe.image}-{layer}" if layer else self.recipe.image

    def tree(self) -> dict[str, Any]:
        """All effective values, defaults included, as plain data."""
        tree = self.recipe.model_dump(mode="json")
        tree["config"] = self.config.model_dump(mode="json")
        return tree


def recipe_paths(folder: Path | None = None) -> Iterator[Path]:
    """The recipe files there are, by name."""
    yield from sorted((folder or data_folder("recipes")).glob("*.toml"), key=lambda path: path.stem)


def read(wanted: str, folder: Path | None = None) -> RecipeFile:
    """A recipe by name, or by path when it ends in `.toml`. UsageError names the file and the nearest name."""
    if wanted.endswith(".toml"):
        path = Path(wanted)
    else:
        known = {path.stem: path for path in recipe_paths(folder)}
        if wanted not in known:
            raise UsageError(f"no recipe '{wanted}'; {nearest(wanted, list(known))}", remedy="see: radeon-stack list")
        path = known[wanted]
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise UsageError("too large for a recipe (over 1 MiB)", where=str(path))
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read it: {error.strerror}", where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"not valid TOML: {error}", where=str(path)) from error
    return RecipeFile(path.stem, path, tree)


def resolve(
    source: RecipeFile,
    preset: str | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Mapping[str, Any]] | None = None,
) -> Effective:
    """Merge recipe ← preset ← `--set` ← flags, and check the whole.

    `sets` are `a.b=v` below `config`; a key that begins with a table of the recipe itself
    (`resources.memory=…`) is taken from there. `flags` maps a flag's name to the tree it sets.
    """
    layers = Layers()
    layers.add({key: value for key, value in source.tree.items() if key != "presets"}, str(source.path))
    if preset is not None:
        if preset not in source.presets:
            raise UsageError(
                f"no preset '{preset}'; {nearest(preset, list(source.presets))}", where=f"{source.path}: presets"
            )
        layers.add(source.presets[preset], f"{source.path}: presets.{preset}")
    _add_sets(layers, sets)
    for flag, values in (flags or {}).items():
        layers.add(values, flag)
    return _checked(source, preset, layers)


def from_record(
    record: Mapping[str, Any], path: Path, sets: Sequence[str] = (), allowed: Sequence[str] = ()
) -> Effective:
    """The effective recipe that a run wrote down in its `config.json`, with the `sets` among the `allowed` keys."""
    recipe, preset = record.get("recipe"), record.get("preset")
    tree: dict[str, Any] = recipe if isinstance(recipe, dict) else {}
    layers = Layers(tree, {})
    for key in _add_sets(layers, sets):
        if key not in allowed:
            raise UsageError(
                "cannot change while a run is continued",
                where=f"--set {key.removeprefix('config.')}",
                remedy=_others(allowed),
            )
    source = RecipeFile(str(record.get("name")), path, {})
    return _checked(source, preset if isinstance(preset, str) else None, layers)


def _others(allowed: Sequence[str]) -> str:
    names = ", ".join(name.removeprefix("config.") for name in allowed)
    return f"these can: {names}; or start a new run" if names else "start a new run"


def _add_sets(layers: Layers, sets: Sequence[str]) -> list[str]:
    """Add a layer for each `--set`; their full keys."""
    keys: list[str] = []
    for text in sets:
        tree = in_recipe(parse_assignment(text))
        layers.add(tree, f"--set {text.partition('=')[0]}")
        keys += [key for key, _ in flatten(tree)]
    return keys


def in_recipe(tree: Tree) -> Tree:
    """Where a person's keys stand in a recipe: below `config`, unless they begin with a table of the recipe itself."""
    return tree if set(tree) <= set(Recipe.model_fields) else {"config": tree}


def _checked(source: RecipeFile, preset: str | None, layers: Layers) -> Effective:
    file = str(source.path)
    try:
        recipe = Recipe.model_validate(layers.tree)
    except ValidationError as error:
        raise explain(error, Recipe, layers.tree, layers.origin, file=file) from None
    model = WORKLOADS[recipe.workload]
    try:
        config = model.model_validate(recipe.config)
    except ValidationError as error:
        raise explain(error, model, recipe.config, layers.origin, file=file, prefix="config.") from None
    return Effective(source.name, preset, source.path, recipe, config, layers.origin)
