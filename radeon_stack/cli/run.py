"""`run`, and the options that it shares with `explain` and `export`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from radeon_stack.catalog.load import Effective, RecipeFile, read, resolve
from radeon_stack.catalog.merge import Tree
from radeon_stack.cli.cluster import CLUSTER_OPTIONS, wanted_of
from radeon_stack.cli.estimate import tell
from radeon_stack.cli.serving import announced
from radeon_stack.cli.steps import step_view
from radeon_stack.contracts import SOURCES, WORKLOADS
from radeon_stack.errors import Exit, UsageError
from radeon_stack.host.bundle import is_here, opened
from radeon_stack.images.making import make
from radeon_stack.launch.circumstances import Asked, find_out
from radeon_stack.launch.cluster import dependency
from radeon_stack.launch.engine import engine_named
from radeon_stack.launch.launcher import Draft, detach, draft, paste_lines, read_plan, resumable, write_records
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.supervise import carry_out
from radeon_stack.runs.compare import Side, as_data, compare, side
from radeon_stack.runs.compare import lines as comparison_lines
from radeon_stack.runs.events import read_events
from radeon_stack.runs.outcome import Outcome, recorded
from radeon_stack.runs.sources import LAST, find_source
from radeon_stack.runs.store import Run, RunStore, home
from radeon_stack.runs.summary import lines, summary
from radeon_stack.runs.view import view_for
from radeon_stack.text import even_unheard, print_line

Command = Callable[..., Any]
AS_IT_WAS = ("recipe", "preset", "model", "data", "source", "server")  # of a run that is continued
SOURCE_SETS = ("source=", "config.source=")  # a folder named by --set, in place of --from


def not_empty(_: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """An option's value. An empty one is an unset variable, and no wish for what goes without the option."""
    if value == "":
        raise UsageError("is empty", where=option.opts[0], remedy="give a value, or leave the option out")
    return value


def plan_options(command: Command) -> Command:
    """The options that decide a plan."""
    return _with(
        command,
        click.option("--preset", metavar="NAME", callback=not_empty, help="A preset of the recipe, such as demo."),
        click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="A value: train.steps=50."),
        click.option("--model", metavar="PATH", callback=not_empty, help="The model's folder."),
        click.option(
            "--data", metavar="FILE", callback=not_empty, help="A .jsonl, .json or .parquet file of chats or texts."
        ),
        click.option(
            "--from",
            "source",
            metavar="RUN",
            callback=not_empty,
            help="What was made before: a run, 'last', or a folder (export-check, serve).",
        ),
        click.option("--with", "server", metavar="PROGRAM", callback=not_empty, help="What serves: llama.cpp or vllm."),
        click.option(
            "--engine", type=click.Choice(["auto", "docker", "local", "slurm"]), default=None, help="Default: auto."
        ),
        click.option(
            "--image", metavar="REF", callback=not_empty, help="A particular image instead of the newest that fits."
        ),
        click.option(
            "--gpus",
            metavar="WHICH",
            callback=not_empty,
            help="0,2 or all or gfx1201 or '>=24GiB'. Default: free ones.",
        ),
        click.option("--share", is_flag=True, help="Have the GPUs together with other runs."),
        click.option("--without", multiple=True, metavar="RS-KI-…", help="Leave this known issue's mitigation out."),
        click.option("--sysroot", metavar="DIR", default="/", help="Look at this tree as the machine."),
        *CLUSTER_OPTIONS,
    )


def resume_options(command: Command) -> Command:
    """The options that take up a run in place of a recipe."""
    return _with(
        command,
        click.option(
            "--resume",
            metavar="RUN",
            help="Continue a run ('last' works) from its last checkpoint, on GPUs chosen anew.",
        ),
        click.option("--after-fault", is_flag=True, help="With --resume: though its GPU faulted in this boot."),
    )


def _with(command: Command, *options: Callable[[Command], Command]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("recipe", required=False)
@plan_options
@resume_options
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="KEY=A,B,…",
    help="A run for each value, compared in one report; given again, for each combination.",
)
@click.option("--dry-run", is_flag=True, help="Print the commands that would be run, and do nothing.")
@click.option(
    "--estimate", "only_estimate", is_flag=True, help="Print how much GPU memory it would take, and do nothing."
)
@click.option("--detach", "detached", is_flag=True, help="Start it and come back; watch it with: runs attach.")
@click.option("--compare", "earlier", metavar="RUN", help="Of a benchmark: exit 7 when a figure is worse than there.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout at the end; progress on stderr.")
def run(
    dry_run: bool,
    only_estimate: bool,
    detached: bool,
    earlier: str | None,
    as_json: bool,
    sweeps: tuple[str, ...],
    **options: Any,
) -> int:
    """Run a recipe and record it.

    Ctrl-C stops it, cleanly: exit 130, also of `serve`, which ends in no other way.

    \b
      radeon-stack run train-llama --preset demo
      radeon-stack run train-llama --model ./Meta-Llama-3.1-8B-Instruct --set train.steps=200 --gpus gfx1201
      radeon-stack run train-llama --preset demo --data chats.jsonl --set data.loss_on=assistant
      radeon-stack run train-llama --preset demo --engine docker --dry-run
      radeon-stack run train-llama --model ./Meta-Llama-3.1-8B-Instruct --estimate
      radeon-stack run export-check --from last
      radeon-stack run serve --from last --with llama.cpp
      radeon-stack run bench-attention --compare last
      radeon-stack run --resume last
      radeon-stack run --resume last --set train.learning_rate=1e-5
      radeon-stack run train-llama --preset demo --sweep train.learning_rate=1e-4,2e-4,5e-4,1e-3
    """
    if sweeps or _resumes_sweep(options):
        from radeon_stack.cli.sweep import run_sweep

        if only_estimate or earlier is not None:
            raise click.UsageError("a sweep takes neither --estimate nor --compare: give these with a run of their own")
        return run_sweep(sweeps, options, dry_run=dry_run, detached=detached, as_json=as_json)
    if earlier is not None and detached:
        raise click.UsageError("--compare waits for the end: leave --detach out, and use: runs compare")
    if only_estimate:
        values = {name: options[name] for name in ("recipe", "preset", "sets", "model", "data", "source", "server")}
        with opened(options["sysroot"]) as place:
            return tell(asked_recipe(**values), place, options["gpus"], as_json=as_json)
    if not dry_run and not is_here(options["sysroot"]):
        raise UsageError("a run for another machine can only be looked at", where="--sysroot", remedy="add --dry-run")
    store = RunStore(home())
    old = _side(store.find(earlier)) if earlier is not None else None
    drafted, why = drafted_from(store, **options)
    if dry_run:
        record = {"command": engine_named(drafted.plan.engine).render(drafted.plan), **drafted.plan.as_record()}
        if (environment := drafted.environment) is not None:
            record["environment"] = {"folder": str(environment.folder), "ready": environment.ready}
        click.echo(json.dumps(record, indent=2) if as_json else "\n".join(paste_lines(drafted, store)))
        return Exit.OK
    require_environment(drafted)
    write_records(drafted, store)
    click.echo(f"engine {why}" if detached else f"{drafted.run.id}\nengine {why}", err=True)  # detached: on stdout
    if detached:
        detach(drafted.run, drafted.plan)
        status = drafted.run.status()
        if status is not None and status.what:
            return end(drafted.run, recorded(status), as_json)
        click.echo(json.dumps({"run": drafted.run.id}) if as_json else drafted.run.id)
        if drafted.plan.ports:
            click.echo(f"how to call it, once it has loaded: radeon-stack runs show {drafted.run.id}", err=True)
        return Exit.OK
    with view_for(sys.stderr if as_json else sys.stdout) as view:
        outcome = carry_out(drafted.run, drafted.plan, announced(view, drafted.run), view.say)
    return end(drafted.run, outcome, as_json, old)


def _resumes_sweep(options: Mapping[str, Any]) -> bool:
    """Is it a sweep that is continued? What cannot stand beside --resume is a mistake, whatever is named."""
    alone = all(options[name] is None for name in AS_IT_WAS)
    return alone and options["resume"] is not None and RunStore(home()).find(options["resume"]).is_sweep


def drafted_from(
    store: RunStore,
    *,
    recipe: str | None,
    preset: str | None,
    sets: tuple[str, ...],
    model: str | None,
    data: str | None,
    source: str | None,
    server: str | None,
    engine: str | None,
    image: str | None,
    resume: str | None = None,
    after_fault: bool = False,
    gpus: str | None,
    share: bool,
    without: tuple[str, ...],
    sysroot: str,
    at: Run | None = None,
    cache: Path | None = None,
    **cluster: Any,
) -> tuple[Draft, str]:
    """The drafted launch, and why its engine; `at` another place than the store's next run directory.

    `cluster`: the values of `CLUSTER_OPTIONS`.
    """
    wanted = wanted_of(**cluster)
    resumed: Run | None = None
    as_many: int | None = None
    effective: Effective
    if resume is not None:
        if any(given is not None for given in (recipe, preset, model, data, source, server)):
            raise click.UsageError(
                "--resume continues a run as it was: give no recipe, preset, model, data, source or server"
            )
        resumed = store.find(resume)
        effective = resumable(resumed, sets, after_fault=after_fault)
        status = resumed.status()
        engine = engine or (status.engine if status else None)
        before = _plan_before(resumed)
        if before is not None:
            image = image or (before.image if engine == before.engine else None)
            as_many = len(before.gpus) or None
            share, without = share or before.shared, without or before.without
            wanted = wanted.or_as(before) if engine == before.engine else wanted
    else:
        effective = asked_recipe(recipe, preset, sets, model, data, source, server)
    after = dependency(wanted.after, store)
    asked = Asked(gpus, engine or "auto", image, share, without, as_many, wanted, after)
    with opened(sysroot) as place:
        here = find_out(effective, place, asked, store.home, waiting)
        return draft(effective, here, store, resumed or at, resume=resumed is not None, cache=cache), here.choice.why


def waiting(text: str) -> None:
    """Tell on stderr what has to be waited for."""
    print_line(text, sys.stderr)


def asked_recipe(
    recipe: str | None,
    preset: str | None,
    sets: tuple[str, ...],
    model: str | None,
    data: str | None,
    source: str | None = None,
    server: str | None = None,
    varied: Mapping[str, Tree] = MappingProxyType({}),
) -> Effective:
    """The recipe with its preset, values and flags laid over it; `varied`: by their flags, a sweep member's values."""
    if recipe is None:
        raise click.UsageError("which recipe? see: radeon-stack list")
    flags: dict[str, Tree] = {**varied}
    file = read(recipe)
    takes = config_fields(file)
    makes = SOURCES.get(str(file.tree.get("workload")))
    if source is not None and makes is None:
        raise UsageError(f"{file.name} takes nothing that a run made", where="--from", remedy="leave it out")
    named = any(text.startswith(SOURCE_SETS) for text in sets)
    varies = any("source" in tree.get("config", {}) for tree in varied.values())
    if makes is not None and not (named or varies):
        found = find_source(RunStore(home()), source or LAST, makes, lambda text: print_line(text, sys.stderr))
        flags["--from"] = {"config": {name: value for name, value in found.items() if name in takes}}
    if server is not None:
        if "server" not in takes:
            raise UsageError(f"{file.name} serves nothing", where="--with", remedy="leave it out")
        flags["--with"] = {"config": {"server": server}}
    if model is not None:
        flags["--model"] = {"config": {"model": model}}
    if data is not None:
        flags["--data"] = {"config": {"data": {"dataset": data}}}
    return resolve(file, preset, sets, flags)


def require_environment(drafted: Draft) -> None:
    """Make the environment whose Python the plan names, unless it is there; its steps go to stderr."""
    if drafted.environment is not None and not drafted.environment.ready:
        with step_view(sys.stderr) as steps:
            make(drafted.environment, steps)


def config_fields(file: RecipeFile) -> frozenset[str]:
    """What the configuration of a recipe's workload has; nothing for one that there is not."""
    model = WORKLOADS.get(str(file.tree.get("workload")))
    return frozenset(model.model_fields) if model else frozenset()


def _plan_before(run: Run) -> LaunchPlan | None:
    try:
        return read_plan(run)
    except UsageError:
        return None


def _side(run: Run) -> Side:
    return side(run.id, read_events(run.events))


def end(run: Run, outcome: Outcome, as_json: bool, old: Side | None = None) -> int:
    """Print what a run came to; the exit code is the run's, or 7 where it is worse than the `old` one."""
    comparison = compare(old, _side(run)) if old and outcome.exit_code == Exit.OK else None
    with even_unheard():
        if as_json:
            compared = {"comparison": as_data(comparison)} if comparison else {}
            click.echo(json.dumps(summary(run, outcome) | compared, indent=2))
        else:
            for line in [*lines(run, outcome), *(comparison_lines(comparison) if comparison else [])]:
                print_line(line)
    with even_unheard():
        if outcome.diagnosis and not as_json:
            print_line(f"  {outcome.diagnosis.signature}  {outcome.diagnosis.evidence}", sys.stderr)
            print_line(f"  cause: {outcome.diagnosis.cause}", sys.stderr)
        if outcome.what:
            place = f"{outcome.where}: " if outcome.where else ""
            remedy = f"; {outcome.remedy}" if outcome.remedy else ""
            print_line(f"radeon-stack: {place}{outcome.what}{remedy}", sys.stderr)
    return int(Exit.CHECK if comparison and comparison.worse else outcome.exit_code)
