"""What `run --sweep` and `runs …` do with a sweep: several runs, compared in one report."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from radeon_stack.catalog.load import Effective
from radeon_stack.catalog.merge import flatten
from radeon_stack.catalog.sweep import OPTION, Point, flags_of, points, tree_of
from radeon_stack.cli.cluster import FLAGS, wanted_of
from radeon_stack.cli.run import asked_recipe, drafted_from, require_environment, waiting
from radeon_stack.errors import Exit, MachineError, StackError, UsageError
from radeon_stack.host.bundle import is_here, opened
from radeon_stack.launch.circumstances import Asked, find_out
from radeon_stack.launch.cluster import dependency
from radeon_stack.launch.engine import engine_named
from radeon_stack.launch.launcher import Draft, draft, paste_lines
from radeon_stack.launch.supervise import settle
from radeon_stack.launch.sweeping import (
    Silent,
    attach_sweep,
    carrier_for,
    keep,
    settle_sweep,
    stop_sweep,
    write_sweep_records,
)
from radeon_stack.runs.outcome import Outcome
from radeon_stack.runs.store import Run, RunStore, State, home
from radeon_stack.runs.summary import summary
from radeon_stack.runs.sweep import Member, Sweep, label, members_of, read_sweep
from radeon_stack.runs.sweep_table import as_data, best_of, by_what, counted, judged_by, rows_of, table_lines, verdict
from radeon_stack.runs.sweep_view import sweep_view
from radeon_stack.text import even_unheard, print_line

ASKED = ("recipe", "preset", "sets", "model", "data", "source", "server")
Prepared = tuple[Run, Sweep, list[Draft], str]


def run_sweep(
    sweeps: Sequence[str], options: Mapping[str, Any], *, dry_run: bool, detached: bool, as_json: bool
) -> int:
    """Draft every member, and only then carry any of them out; exit code of the first that is not done, or 0."""
    if not dry_run and not is_here(options["sysroot"]):
        raise UsageError("a sweep for another machine can only be looked at", where="--sysroot", remedy="add --dry-run")
    store = RunStore(home())
    if options["resume"] is None:
        sweep, record, drafts, why = drafted_members(store, points(sweeps, options["sets"]), options)
    else:
        sweep, record, drafts, why = drafted_again(store, sweeps, options)
    if dry_run:
        lines, data = dry(record, drafts, store)
        click.echo(json.dumps(data, indent=2) if as_json else "\n".join(lines))
        return Exit.OK
    for one in {one.environment and one.environment.folder: one for one in drafts}.values():  # made once for them all
        require_environment(one)
    write_sweep_records(sweep, record, drafts, store)
    names = [label(member.values) for member in record.members]
    begun = f"engine {why}; {len(drafts)} of {len(names)} runs to do" if options["resume"] else f"engine {why}"
    click.echo(begun if detached else f"{sweep.id}\n{begun}", err=True)
    carrier = carrier_for(drafts)
    if detached:
        carrier.leave(sweep, drafts)
        told = {"run": sweep.id, "members": [one.run for one in record.members]}
        click.echo(json.dumps(told) if as_json else sweep.id)
        return Exit.OK
    with sweep_view(sys.stderr if as_json else sys.stdout, names) as view:
        outcome = carrier.carry_out(sweep, drafts, view)
    return end_sweep(sweep, outcome, as_json)


def drafted_members(store: RunStore, wanted: Sequence[Point], options: Mapping[str, Any]) -> Prepared:
    """A new sweep with a draft for each point. UsageError names the member, key and value that cannot be."""
    effectives = [checked(point, number, len(wanted), options) for number, point in enumerate(wanted, 1)]
    sweep = store.new(effectives[0].name)
    wanted_job = wanted_of(**{name: options[name] for name in FLAGS})
    asked = Asked(
        options["gpus"],
        options["engine"] or "auto",
        options["image"],
        options["share"],
        options["without"],
        cluster=wanted_job,
        after=dependency(wanted_job.after, store),
    )
    drafts: list[Draft] = []
    why = ""
    with opened(options["sysroot"]) as place:
        for number, effective in enumerate(effectives, 1):
            here = find_out(effective, place, asked, store.home, waiting)
            drafts.append(draft(effective, here, store, sweep.member(number)))
            why = why or here.choice.why
    require_alike(drafts)
    require_one_job(drafts)
    record = Sweep(
        keys=tuple(wanted[0]),
        members=tuple(
            Member(run=sweep.member(number).id, values=in_json(point, effective))
            for number, (point, effective) in enumerate(zip(wanted, effectives, strict=True), 1)
        ),
    )
    return sweep, record, drafts, why


def checked(point: Point, number: int, of: int, options: Mapping[str, Any]) -> Effective:
    """The member's recipe, every value of it checked."""
    told = ", ".join(f"{key}={value}" for key, value in point.items())
    try:
        effective = asked_recipe(**{name: options[name] for name in ASKED}, varied=flags_of(point))
    except UsageError as error:
        if error.where.startswith("--") and not error.where.startswith(OPTION):
            raise  # it is about what every member has
        raise UsageError(
            f"{error.what} (member {number} of {of}: {told})", where=error.where, remedy=error.remedy
        ) from error
    for key, value in point.items():
        for leaf, _ in flatten(tree_of(key, value)):
            by = effective.origin.get(leaf, "")
            if by.startswith("--") and by != f"{OPTION} {key}":
                raise UsageError(f"is given by {by} too", where=f"{OPTION} {key}", remedy="leave one of them out")
    return effective


def in_json(point: Point, effective: Effective) -> dict[str, Any]:
    """The point as a record can hold it: what is no plain value is taken as the recipe has it, where a date is text."""
    tree = effective.tree()
    found: dict[str, Any] = {}
    for key, value in point.items():
        at: Any = tree
        for part in next(flatten(tree_of(key, None)))[0].split("."):
            at = at.get(part) if isinstance(at, dict) else None
        found[key] = value if isinstance(value, str | bool | int | float) else at
    return found


def require_alike(drafts: Sequence[Draft]) -> None:
    """UsageError for members that cannot go one after the other, or not by one engine."""
    if any(one.plan.ports for one in drafts):
        raise UsageError(
            f"{drafts[0].effective.name} goes on until it is stopped: no other member would have its turn",
            where=OPTION,
            remedy="sweep a recipe that ends",
        )
    engines = sorted({one.plan.engine for one in drafts})
    if len(engines) > 1:
        raise UsageError(
            f"its members would have different engines: {', '.join(engines)}", where=OPTION, remedy="choose: --engine"
        )


def require_one_job(drafts: Sequence[Draft]) -> None:
    """UsageError for members that cannot be tasks of one job array: they ask a cluster for different things."""
    if drafts[0].plan.job is not None and len({(one.plan.job, one.plan.memory) for one in drafts}) > 1:
        raise UsageError(
            "its members ask the cluster for different things", where=OPTION, remedy="sweep that key with runs apart"
        )


def drafted_again(store: RunStore, sweeps: Sequence[str], options: Mapping[str, Any]) -> Prepared:
    """A sweep that has ended, with a draft for each member that is not done."""
    sweep = store.find(options["resume"])
    record = read_sweep(sweep)
    if sweeps:
        raise UsageError(
            f"{options['resume']} is continued with its own values", where=OPTION, remedy="start a new sweep"
        )
    state = settle_sweep(sweep).state
    if state is State.RUNNING:
        raise UsageError(f"{sweep.id} is still running", remedy=f"watch it: radeon-stack runs attach {sweep.id}")
    if state is State.DONE:
        raise UsageError(f"{sweep.id} is done; there is nothing to continue", where="--resume")
    require_own_values(record, options["sets"])
    drafts, why = [], ""
    for run in members_of(sweep):
        if settle(run).state is not State.DONE:
            one, why = drafted_from(store, **{**options, "resume": run.id})
            drafts.append(one)
    return sweep, record, drafts, why


def require_own_values(record: Sweep, sets: Sequence[str]) -> None:
    """UsageError for a `--set` of what the sweep varies: its records would tell other values than were trained with."""
    for text in sets:
        key = text.partition("=")[0].strip().removeprefix("config.")
        if key in record.keys:
            raise UsageError("is what the sweep varies", where=f"--set {key}", remedy="start a new sweep")


def dry(record: Sweep, drafts: Sequence[Draft], store: RunStore) -> tuple[list[str], dict[str, Any]]:
    """Each member's commands, as lines and as data."""
    values = {member.run: member.values for member in record.members}
    lines, data = [], []
    for one in drafts:
        lines += [f"# {one.run.id}: {label(values[one.run.id])}", *paste_lines(one, store), ""]
        command = engine_named(one.plan.engine).render(one.plan)
        data.append({"run": one.run.id, "values": values[one.run.id], "command": command, **one.plan.as_record()})
    return lines[:-1], {"keys": list(record.keys), "members": data}


def end_sweep(sweep: Run, outcome: Outcome, as_json: bool) -> int:
    """Print what a sweep came to; its exit code."""
    with even_unheard():
        if as_json:
            click.echo(json.dumps(sweep_summary(sweep, outcome), indent=2))
        else:
            for line in sweep_lines(sweep, outcome):
                print_line(line)
    with even_unheard():
        if outcome.what:
            print_line(f"radeon-stack: {outcome.what}" + (f"; {outcome.remedy}" if outcome.remedy else ""), sys.stderr)
    return int(outcome.exit_code)


def sweep_summary(sweep: Run, outcome: Outcome) -> dict[str, Any]:
    """One JSON object: the comparison, and each member as `runs show --json` gives it."""
    status, record = sweep.status(), read_sweep(sweep)
    members = [
        {"values": member.values, **summary(run, settle(run))}
        for member, run in zip(record.members, members_of(sweep), strict=True)
    ]
    return {
        "run": sweep.id,
        "state": str(outcome.state),
        "exit_code": int(outcome.exit_code) if outcome.state.ended else None,
        "recipe": status.recipe if status else "",
        "preset": status.preset if status else None,
        "engine": status.engine if status else "",
        "error": {"what": outcome.what, "where": outcome.where, "remedy": outcome.remedy} if outcome.what else None,
        "keys": list(record.keys),
        "comparison": as_data(rows_of(sweep)),
        "members": members,
        "directory": str(sweep.path),
        "report": str(sweep.report) if sweep.report.exists() else None,
    }


def sweep_lines(sweep: Run, outcome: Outcome) -> list[str]:
    """The same for a person: the table, and where the report lies."""
    rows = rows_of(sweep)
    told = [f"{outcome.state}  {sweep.id}", *(f"  {line}" for line in table_lines(rows, read_sweep(sweep)))]
    told.append(f"  {verdict(rows)}")
    return [*told, f"  report    {sweep.report}"] if sweep.report.exists() else told


def show_sweep(sweep: Run, as_json: bool) -> int:
    outcome = settle_sweep(sweep)
    if as_json:
        click.echo(json.dumps(sweep_summary(sweep, outcome), indent=2))
        return Exit.OK
    for line in sweep_lines(sweep, outcome):
        print_line(line)
    if outcome.what:
        print_line(f"  why       {outcome.what}" + (f"; {outcome.remedy}" if outcome.remedy else ""))
    return Exit.OK


def attach_to_sweep(sweep: Run, as_json: bool) -> int:
    names = [label(member.values) for member in read_sweep(sweep).members]
    try:
        with sweep_view(sys.stderr if as_json else sys.stdout, names) as view:
            outcome = attach_sweep(sweep, view)
    except KeyboardInterrupt:
        click.echo(f"{sweep.id} goes on; stop it with: radeon-stack runs stop {sweep.id}", err=True)
        return Exit.OK
    return end_sweep(sweep, outcome, as_json)


def stop_whole_sweep(sweep: Run, *, seconds: int, force: bool) -> int:
    if settle_sweep(sweep).state is not State.RUNNING:
        raise UsageError(f"{sweep.id} is not running")
    outcome = stop_sweep(sweep, seconds=seconds, force=force)
    if not outcome.state.ended:
        raise MachineError(f"{sweep.id} is {outcome.what}", remedy=f"see: radeon-stack runs show {sweep.id}")
    print_line(f"{outcome.state}  {sweep.id}  {outcome.what}")
    return Exit.OK


def compare_sweep(sweep: Run, as_json: bool) -> int:
    """The table that the report has, as text."""
    settle_sweep(sweep)
    rows = rows_of(sweep)
    if as_json:
        click.echo(json.dumps(as_data(rows), indent=2))
        return Exit.OK
    for line in [*table_lines(rows, read_sweep(sweep)), verdict(rows)]:
        print_line(line)
    return Exit.OK


def supervise_sweep(sweep: Run) -> int:
    return int(keep(sweep, Silent()).exit_code)


def goes_on(sweep: Run) -> bool:
    """Does any of it go on? Of a damaged one that has no keeper nobody knows, and its members answer for themselves."""
    try:
        return settle_sweep(sweep).state is State.RUNNING
    except UsageError:
        return False


def with_members(sweep: Run) -> list[Run]:
    """The directories of a sweep that there are, its own last; of one with a damaged record, that alone."""
    try:
        runs = members_of(sweep)
    except UsageError:
        runs = []
    return [*(run for run in runs if run.path.is_dir()), sweep]


def sweep_row(sweep: Run) -> dict[str, object]:
    """A sweep in the list of runs: how many members, and the best of them."""
    status = sweep.status()
    shown = {
        "run": sweep.id,
        "state": str(State.LOST),
        "recipe": status.recipe if status else "",
        "preset": status.preset if status else None,
        "engine": status.engine if status else "",
        "started": status.started if status else None,
        "exit_code": None,
        "note": "",
    }
    try:
        outcome = settle_sweep(sweep)
        rows = rows_of(sweep)
    except StackError as error:
        return shown | {"note": error.what, "members": []}
    counts = ", ".join(f"{count} {state}" for state, count in counted(rows).items())
    best = best_of(rows)
    told = f"; best {best.label}: {by_what(best)} {judged_by(best):.4g}" if best else ""
    status = sweep.status()
    return shown | {
        "state": str(outcome.state),
        "exit_code": status.exit_code if status else None,
        "note": f"sweep of {len(rows)}: {counts}{told}",
        "members": [row.run for row in rows],
    }
