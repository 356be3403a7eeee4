"""`runs`: the runs there were."""

from __future__ import annotations

import json
import sys
import time

import click

from radeon_stack.cli.run import end
from radeon_stack.cli.serving import announced, calling
from radeon_stack.cli.sweep import (
    attach_to_sweep,
    compare_sweep,
    goes_on,
    show_sweep,
    stop_whole_sweep,
    supervise_sweep,
    sweep_row,
    with_members,
)
from radeon_stack.errors import Exit, MachineError, UsageError
from radeon_stack.launch.launcher import read_plan
from radeon_stack.launch.supervise import Pace, attach, carry_out, settle, stop
from radeon_stack.launch.sweeping import settle_sweep
from radeon_stack.launch.watching import standing_of
from radeon_stack.runs.compare import MARGIN, compare, side
from radeon_stack.runs.compare import as_data as comparison_data
from radeon_stack.runs.compare import lines as comparison_lines
from radeon_stack.runs.events import read_events
from radeon_stack.runs.measurements import counted, measurements_of
from radeon_stack.runs.report import write as write_report
from radeon_stack.runs.store import Run, RunStore, State, home
from radeon_stack.runs.summary import last_result, lines, summary
from radeon_stack.runs.sweep import members_of
from radeon_stack.runs.sweep_report import write_sweep_report
from radeon_stack.runs.view import view_for
from radeon_stack.text import print_line, print_wrapped

FOLLOW_SECONDS = 0.2
TO_DELETE = 4  # characters of an id


@click.group()
def runs() -> None:
    """The runs there were: list, watch, stop, report.

    \b
    RUN is an id, its beginning or end, or 'last'; a sweep's members are runs too, ID-1, ID-2 and so on:
      radeon-stack runs list
      radeon-stack runs attach last
      radeon-stack runs report last
    """


def _store() -> RunStore:
    return RunStore(home())


@runs.command("list")
@click.option("--all", "every", is_flag=True, help="The members of sweeps too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
def list_runs(every: bool, as_json: bool) -> None:
    """All runs, the newest last; a sweep of several is one of them."""
    store = _store()
    found = [run for run in store if every or store.sweep_of(run) is None]
    rows = [sweep_row(run) if run.is_sweep else _row(run) for run in found]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo("no runs yet; start one: radeon-stack run train-llama --preset demo", err=True)
    widest = max((len(run.id) for run in found), default=0)
    for row in rows:
        print_wrapped(f"{row['run']:<{widest}}  {row['state']:<9} {row['engine']:<7} {row['note']}".rstrip())


@runs.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def show(run: str, as_json: bool) -> int:
    """What a run came to, and where its outputs are."""
    found = _store().find(run)
    if found.is_sweep:
        return show_sweep(found, as_json)
    outcome = settle(found)
    standing = standing_of(found) if outcome.state is State.RUNNING else ""
    if as_json:
        click.echo(json.dumps(summary(found, outcome) | {"standing": standing}, indent=2))
        return Exit.OK
    for line in lines(found, outcome):
        print_line(line)
    if standing:
        print_line(f"  {standing}")
    for line in calling(found) if outcome.state is State.RUNNING else []:
        print_line(f"  {line}")
    if outcome.what:
        print_line(f"  why       {outcome.what}" + (f"; {outcome.remedy}" if outcome.remedy else ""))
    return Exit.OK


@runs.command("attach")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout at the end.")
def attach_run(run: str, as_json: bool) -> int:
    """Watch a run with its bars, from the beginning; Ctrl-C leaves it running."""
    found = _store().find(run)
    if found.is_sweep:
        return attach_to_sweep(found, as_json)
    try:
        with view_for(sys.stderr if as_json else sys.stdout) as view:
            outcome = attach(found, announced(view, found, "Ctrl-C leaves it running"), view.say)
    except KeyboardInterrupt:
        click.echo(f"{found.id} goes on; stop it with: radeon-stack runs stop {found.id}", err=True)
        return Exit.OK
    return end(found, outcome, as_json)


@runs.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
def logs(run: str, follow: bool) -> None:
    """All that the workload printed; of a sweep one member's after the other."""
    found = _store().find(run)
    for one in members_of(found) if found.is_sweep else [found]:
        if one != found:
            print_line(f"== {one.id}")
        _print_log(one, follow)


def _print_log(found: Run, follow: bool) -> None:
    offset, look = 0, Pace(found)
    while True:
        goes_on = follow and look().state is State.RUNNING
        if found.log.exists():
            with found.log.open("rb") as stream:
                stream.seek(offset)
                while block := stream.read(1 << 16):
                    offset += len(block)
                    sys.stdout.buffer.write(block)
        sys.stdout.flush()
        if not goes_on:
            return
        time.sleep(FOLLOW_SECONDS)


@runs.command("stop")
@click.argument("run")
@click.option("--force", is_flag=True, help="End it at once; what it did since its last checkpoint is lost.")
@click.option("--seconds", default=120, show_default=True, help="Time to save before it is ended.")
def stop_run(run: str, force: bool, seconds: int) -> int:
    """Stop a run: it ends its step, saves, and can be resumed. Of a sweep no other member is begun."""
    found = _store().find(run)
    if found.is_sweep:
        return stop_whole_sweep(found, seconds=seconds, force=force)
    if settle(found).state is not State.RUNNING:
        raise UsageError(f"{found.id} is not running")
    outcome = stop(found, seconds=seconds, force=force)
    if not outcome.state.ended:
        raise MachineError(f"{found.id} is {outcome.what}", remedy=f"see: radeon-stack runs show {found.id}")
    print_line(f"{outcome.state}  {found.id}  {outcome.what}")
    return Exit.OK


@runs.command()
@click.argument("run")
@click.option("--open", "browse", is_flag=True, help="Open it in the browser.")
def report(run: str, browse: bool) -> None:
    """Write the run's report.html anew and print its path."""
    found = _store().find(run)
    if found.is_sweep:
        settle_sweep(found)
        path = write_sweep_report(found)
    else:
        settle(found)
        path = write_report(found)
    click.echo(path)
    if browse:
        click.launch(path.as_uri())


@runs.command("compare")
@click.argument("old")
@click.argument("new", required=False)
@click.option(
    "--margin", default=MARGIN, show_default=True, type=click.FloatRange(0, 10), help="Share that is nothing."
)
@click.option("--common", is_flag=True, help="Be content with the cases that both have.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def compare_runs(old: str, new: str | None, margin: float, common: bool, as_json: bool) -> int:
    """The figures of a benchmark run against an OLD one's: exit 7 when one is worse beyond its spread.

    Runs on different cards, of different cases or timed in another way are refused: exit 2. NEW is 'last' where it is
    left out. A sweep stands alone: its members are compared with each other.
    """
    store = _store()
    before = store.find(old)
    if before.is_sweep:
        if new is not None:
            raise UsageError(f"{before.id} is a sweep: its members are compared with each other", where="NEW")
        return compare_sweep(before, as_json)
    sides = [side(run.id, read_events(run.events)) for run in (before, store.find(new or "last"))]
    found = compare(*sides, margin=margin, common=common)
    if as_json:
        click.echo(json.dumps(comparison_data(found), indent=2))
    else:
        for line in comparison_lines(found):
            print_line(line)
    return Exit.CHECK if found.worse else Exit.OK


@runs.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted.")
def remove(names: tuple[str, ...], dry_run: bool) -> None:
    """Delete runs with everything in them, models included; a sweep with its members."""
    store = _store()
    for found in [store.find(name, least=TO_DELETE) for name in names]:
        together = with_members(found) if found.is_sweep else [found]
        for one in together:
            if goes_on(one) if one.is_sweep else settle(one).state is State.RUNNING:
                raise UsageError(f"{one.id} is running", remedy=f"stop it first: radeon-stack runs stop {found.id}")
        for one in together:
            if not dry_run:
                store.remove(one)
            click.echo(f"{'would delete' if dry_run else 'deleted'} {one.path}")


@runs.command(hidden=True)
@click.argument("run")
def supervise(run: str) -> int:
    """Carry out a run whose records are written (what `run --detach` leaves behind)."""
    found = _store().find(run)
    if found.is_sweep:
        return supervise_sweep(found)
    outcome = carry_out(found, read_plan(found), lambda event: None, lambda text: None)
    return int(outcome.exit_code)


def _answering(run: Run, state: State) -> str:
    told = calling(run) if state is State.RUNNING else []
    return told[0] if told else ""


def _row(run: Run) -> dict[str, object]:
    outcome = settle(run)
    status = run.status()
    events = read_events(run.events)
    result = last_result(events)
    note = outcome.what or counted(measurements_of(events)) or _answering(run, outcome.state)
    if not note and "correct_after" in result:
        note = f"{result.get('correct_before', '?')} → {result['correct_after']} of {result.get('samples')} right"
    return {
        "run": run.id,
        "state": str(outcome.state),
        "recipe": status.recipe if status else "",
        "preset": status.preset if status else None,
        "engine": status.engine if status else "",
        "started": status.started if status else None,
        "exit_code": status.exit_code if status else None,
        "note": note,
    }
