"""The model card of what is handed over: Markdown, from what the runs told. Their texts are untrusted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radeon_stack import __version__
from radeon_stack.contracts.sections import is_made
from radeon_stack.runs.events import Event, Fact, Loaded
from radeon_stack.runs.loaded import figures, loaded_of
from radeon_stack.runs.report import number, rows, utc
from radeon_stack.runs.store import Run
from radeon_stack.runs.summary import last_result
from radeon_stack.text import one_line

LONGEST = 300  # characters of a cell
SETTINGS = ("backend", "quantization", "lora", "train", "speed", "data")


@dataclass(frozen=True)
class Told:
    """A run and what it told."""

    run: Run
    events: list[Event]

    @property
    def facts(self) -> dict[str, Any]:
        return {event.name: event.value for event in self.events if isinstance(event, Fact)}

    @property
    def config(self) -> dict[str, Any]:
        recipe = self.run.read_json(self.run.config).get("recipe")
        config = recipe.get("config") if isinstance(recipe, dict) else None
        return config if isinstance(config, dict) else {}

    def planned(self, field: str) -> str:
        fields = self.run.read_json(self.run.plan).get("fields")
        found = fields.get(field) if isinstance(fields, dict) else None
        return str(found.get("value") or "") if isinstance(found, dict) else ""


def card(training: Told | None, check: Told | None, parts: Mapping[str, str], licences: Sequence[str]) -> str:
    """The card's text. `parts`: what each folder is for; `licences`: the base's files that go along."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - Markdown, whose cells are made plain below
    )
    base = _base(training)
    exports = [one for one in loaded_of(check.events) if one.state != "missing"] if check else []
    return environment.get_template("card.md.j2").render(
        title=f"{base or 'A model'}, fine-tuned",
        sentence=_sentence(training, base),
        base=base,
        adapter="adapter" in parts,
        ggufs="gguf" in parts,
        facts=_facts(training, check),
        here=[f"`{name}`: {what}" for name, what in parts.items()],
        data=_data(training),
        columns=[figure.name for figure in figures(Loaded(loader="any"))],
        loaded=[
            {"name": plain(one.loader), "cells": [plain(figure.text) for figure in figures(one)]} for one in exports
        ],
        settings=_settings(training),
        licence=_licence(base, licences),
    )


def plain(text: object) -> str:
    """A value in a cell of a table: one line, and nothing that Markdown or HTML would take for its own."""
    return re.sub(r"([|`*_<>\[\]\\])", r"\\\1", one_line(str(text), LONGEST))


def _base(training: Told | None) -> str:
    model = str(training.config.get("model") or "") if training else ""
    if not model:
        return ""
    return one_line(model.partition(":")[2] if is_made(model) else Path(model).name, 100)


def _sentence(training: Told | None, base: str) -> str:
    if training is None:
        return "Merged and converted by radeon-stack; how it was trained is not known here."
    result, losses = last_result(training.events), training.facts.get("trainer_output")
    loss = losses.get("train_loss") if isinstance(losses, dict) else None
    steps = result.get("steps")
    told = f" in {number(steps)} steps" if steps is not None else ""
    mean = f", mean training loss {number(loss)}" if isinstance(loss, float) else ""
    return f"{plain(base or 'A model')} with a LoRA adapter, trained{told}{mean}, by radeon-stack {__version__}."


def _facts(training: Told | None, check: Told | None) -> list[tuple[str, str]]:
    found = []
    for name, told in (("trained by", training), ("checked by", check)):
        if told is None:
            continue
        status = told.run.status()
        found.append((name, told.run.id))
        if status is not None:
            found.append((f"{name.partition(' ')[0]} on", utc(status.started)))
        found.append((f"{name.partition(' ')[0]} in", told.planned("image") or "no container (engine local)"))
    environment = training.facts.get("environment") if training else None
    for name in ("device", "torch", "transformers", "peft", "trl", "bitsandbytes"):
        if isinstance(environment, dict) and environment.get(name):
            found.append((name, str(environment[name])))
    return [(name, plain(value)) for name, value in found]


def _data(training: Told | None) -> list[tuple[str, str]]:
    data = training.facts.get("data") if training else None
    shown = ("name", "form", "rows", "rows_held_back", "tokens_mean")
    return [
        (name.replace("_", " "), plain(number(data[name]))) for name in shown if isinstance(data, dict) and name in data
    ]


def _settings(training: Told | None) -> list[tuple[str, str]]:
    config = dict(training.config) if training else {}
    if isinstance(data := config.get("data"), dict):  # the place of a file is the trainer's own affair
        config["data"] = data | {"dataset": Path(str(data.get("dataset"))).name}
    return [(name, plain(value)) for key in SETTINGS if key in config for name, value in rows({key: config[key]})]


def _licence(base: str, licences: Sequence[str]) -> str:
    if licences:
        return f"The weights are under the licence of their base: {', '.join(f'`{name}`' for name in licences)}."
    return (
        f"The licence of {plain(base or 'the base')} holds for these weights; its folder brought no licence file along."
    )
