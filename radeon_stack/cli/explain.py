"""`explain`."""

from __future__ import annotations

import json
import shlex
from typing import Any

import click

from radeon_stack.catalog.sizes import format_size
from radeon_stack.cli.run import drafted_from, plan_options, resume_options
from radeon_stack.errors import Exit
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.planner import NO_CONTAINER
from radeon_stack.runs.store import RunStore, home
from radeon_stack.text import print_line

SIZES = ("memory", "shm")


@click.command()
@click.argument("recipe", required=False)
@plan_options
@resume_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def explain(as_json: bool, **options: Any) -> int:
    """Why a run would be launched as it would.

    \b
      radeon-stack explain train-llama --preset demo
      radeon-stack explain train-llama --preset demo --engine docker --json
      radeon-stack explain train-llama --model ./Meta-Llama-3.1-8B-Instruct --gpus '>=24GiB'
    """
    drafted, _ = drafted_from(RunStore(home()), **options)
    if as_json:
        click.echo(json.dumps(drafted.plan.as_record(), indent=2))
        return Exit.OK
    for line in lines(drafted.plan):
        print_line(line)
    return Exit.OK


def lines(plan: LaunchPlan) -> list[str]:
    """Each field with its value and its reason; the items of a field below it, each with its own."""
    found = []
    for name in plan.field_names():
        reason = plan.reasons[name]
        items = _items(plan, name)
        if items:
            found += [f"{name:<14}  {reason}", *(f"    {item}" for item in items)]
        elif reason != NO_CONTAINER:
            found += [f"{name:<14}  {_value(plan, name)}", f"    {reason}"]
    without = [name for name in plan.field_names() if plan.reasons[name] == NO_CONTAINER]
    return [*found, *([f"{NO_CONTAINER}: no {', '.join(without)}"] if without else [])]


def _items(plan: LaunchPlan, name: str) -> list[str]:
    if name == "env":
        return [f"{key}={text}: {plan.reasons[f'env.{key}']}" for key, text in plan.env]
    if name == "mounts":
        return [
            f"{m.source} → {m.target}{' (read-only)' * m.read_only}: {plan.reasons[f'mounts.{m.target}']}"
            for m in plan.mounts
        ]
    if name == "choices":
        return [f"{key}={text}: {plan.reasons[f'choices.{key}']}" for key, text in plan.choices]
    return [f"{key}={text}" for key, text in getattr(plan, name)] if name in ("labels", "subject") else []


def _value(plan: LaunchPlan, name: str) -> str:
    value = getattr(plan, name)
    if isinstance(value, tuple):
        return shlex.join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format_size(value) if name in SIZES else str(value)
