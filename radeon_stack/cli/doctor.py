"""`doctor` and `diagnose`."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import click

from radeon_stack.errors import CheckError, Exit, MachineError, UsageError
from radeon_stack.host.bundle import is_here, opened, pack
from radeon_stack.host.checks import Check, Finding, State, examine
from radeon_stack.host.checks.cluster import examine_cluster
from radeon_stack.host.checks.finding import Fix
from radeon_stack.host.clients import baking_client, building_client
from radeon_stack.host.cluster_facts import gather_cluster
from radeon_stack.host.facts import Ways, gather
from radeon_stack.host.signatures import Match, diagnose
from radeon_stack.images.resolve import image_facts
from radeon_stack.launch.choose import WORK_PACKAGES
from radeon_stack.runs.store import home
from radeon_stack.text import print_line, printable

MARKS = {
    State.OK: ("✓", "green"),
    State.WARN: ("!", "yellow"),
    State.FAIL: ("✗", "red"),
    State.SKIPPED: ("-", "bright_black"),
}
PACKED = {
    b"\x1f\x8b": ("is compressed", "zcat LOG | radeon-stack diagnose -"),
    b"\x28\xb5\x2f\xfd": ("is compressed", "zstdcat LOG | radeon-stack diagnose -"),
    b"\xfd7zXZ": ("is compressed", "xzcat LOG | radeon-stack diagnose -"),
    b"\xff\xfe": ("is UTF-16", "iconv -f UTF-16 -t UTF-8 LOG | radeon-stack diagnose -"),
}
DOCUMENT = "docs/doctor.md"
Found = Sequence[tuple[Check[Any], Finding]]
NODE_SECONDS = 60  # for a node to be free


@click.command()
@click.option("--sysroot", metavar="DIR", default="/", help="Look at this tree, or bundle, as the machine.")
@click.option("--engine", type=click.Choice(["slurm"]), help="Look at the cluster, and at a node of it, instead.")
@click.option("--partition", metavar="NAME", help="With --engine slurm: which one; by default the cluster's own.")
@click.option("--bundle", metavar="FILE", help="Pack the facts, without names and serials, to be diagnosed elsewhere.")
@click.option("--fix", is_flag=True, help="Offer to run what is safe and reversible, showing it first.")
@click.option("--yes", is_flag=True, help="With --fix: run it without asking.")
@click.option("--dry-run", is_flag=True, help="With --fix: show it and do nothing.")
@click.option("-v", "--verbose", is_flag=True, help="What is fine, and what does not apply, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor(
    sysroot: str,
    engine: str | None,
    partition: str | None,
    bundle: str | None,
    fix: bool,
    yes: bool,
    dry_run: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """Is this machine ready? What exactly is wrong, and the command that mends it.

    Exit 3 when something fails; a warning is none. It reads files and asks the engine, for two seconds at most.

    \b
      radeon-stack doctor
      radeon-stack doctor -v                       # also what is fine, and the known issues of this setup
      radeon-stack doctor --fix
      radeon-stack doctor --bundle facts.tar.gz    # for somebody who helps: doctor --sysroot facts.tar.gz
      radeon-stack doctor --engine slurm           # asks the cluster, and one of its nodes by a short job
    """
    _require_sense(bundle, fix=fix, yes=yes, dry_run=dry_run, as_json=as_json)
    if engine is not None:
        _require_cluster_alone(bundle, fix=fix, sysroot=sysroot)
        return _cluster(partition, verbose=verbose, as_json=as_json)
    if partition is not None:
        raise UsageError(
            "is a word of --engine slurm", where="--partition", remedy="doctor --engine slurm --partition P"
        )
    with opened(sysroot) as place:
        facts = gather(place, home(), _ways())
        found = examine(facts)
        if bundle:
            names = pack(facts, place, Path(bundle))
            print_line(f"{bundle}: {len(names)} files; look into it before you send it: tar tzf {bundle}", sys.stderr)
        if as_json:
            click.echo(json.dumps(as_record(found), indent=2))
        else:
            _print(found, verbose)
        if fix and _fix(found, place.live, yes=yes, dry_run=dry_run):
            found = examine(gather(place, home(), _ways()))
            click.echo("\nafter that:")
            _print(found, verbose)
    return _ended(found)


def _cluster(partition: str | None, *, verbose: bool, as_json: bool) -> int:
    found = examine_cluster(gather_cluster(home(), partition, NODE_SECONDS))
    if as_json:
        click.echo(json.dumps(as_record(found), indent=2))
    else:
        _print(found, verbose)
    return _ended(found)


def _ended(found: Found) -> int:
    return int(Exit.MACHINE if any(finding.state is State.FAIL for _, finding in found) else Exit.OK)


@click.command(name="diagnose")
@click.argument("log", type=click.File("rb"))
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def diagnose_log(log: BufferedReader, as_json: bool) -> int:
    """What does this log say went wrong? Known error texts, nearest to the cause first.

    Exit 7 when something was found.

    \b
      radeon-stack diagnose train.log
      docker logs mine 2>&1 | radeon-stack diagnose -
    """
    _require_plain(log)
    matches = diagnose(log)
    if as_json:
        click.echo(json.dumps({"matches": [match_record(match) for match in matches]}, indent=2))
    for match in [] if as_json else matches:
        signature = match.signature
        click.echo(click.style(f"{signature.id}  {signature.title}", bold=True))
        print_line(f"  line     {match.line}\n  cause    {signature.cause}\n  remedy   {signature.remedy}")
        click.echo(f"  see      {signature.links[0]}\n")
    if not matches:
        click.echo("no error text that we know", err=True)
        return int(Exit.OK)
    if any(match.signature.fault for match in matches):
        raise CheckError("a GPU fault: reboot before anything else is started on that GPU")
    return int(Exit.CHECK)


def _require_sense(bundle: str | None, *, fix: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    if as_json and fix:
        raise UsageError("--fix asks and tells; give it without --json", where="--fix")
    if (yes or dry_run) and not fix:
        given = "--yes" if yes else "--dry-run"
        raise UsageError("is a word of --fix", where=given, remedy="radeon-stack doctor --fix")
    if bundle is None:
        return
    place = Path(bundle)
    if not bundle or place.exists() or place.is_symlink() or not place.absolute().parent.is_dir():
        said = "is there already" if bundle and place.exists() else "is no name for a new file"
        raise UsageError(f"'{bundle}' {said}", where="--bundle", remedy="name a file that is not there yet")


def _require_cluster_alone(bundle: str | None, *, fix: bool, sysroot: str) -> None:
    given = [("--bundle", bundle is not None), ("--fix", fix), ("--sysroot", not is_here(sysroot))]
    for where in (name for name, there in given if there):
        raise UsageError(
            "is of this machine, and --engine slurm looks at a cluster", where=where, remedy="leave one out"
        )


def _require_plain(log: BufferedReader) -> None:
    for magic, (what, remedy) in PACKED.items():
        if log.peek(len(magic)).startswith(magic):
            raise UsageError(what, where="LOG", remedy=remedy)


def as_record(found: Found) -> dict[str, Any]:
    """`--json`: each finding, and how many there are of each state."""
    checks = [
        {
            "code": check.code,
            "title": check.title,
            "state": str(finding.state),
            "evidence": finding.evidence,
            "remedy": list(finding.remedy),
            "document": document(check),
        }
        for check, finding in found
    ]
    return {"checks": checks, "states": {str(s): sum(f.state is s for _, f in found) for s in State}}


def document(check: Check[Any]) -> str:
    """Where more is said of a check."""
    return f"{DOCUMENT}#{check.code.lower()}"


def match_record(match: Match) -> dict[str, Any]:
    """A match for `--json` and `status.json`."""
    signature = match.signature
    fields = {name: getattr(signature, name) for name in ("id", "title", "cause", "remedy", "fault")}
    return fields | {"line": match.line, "offset": match.offset, "times": match.times, "links": list(signature.links)}


def _ways() -> Ways:
    def builds() -> bool:
        try:
            return bool(building_client())
        except MachineError:
            return False

    def lacking() -> tuple[str, ...]:
        return tuple(name for name in WORK_PACKAGES if importlib.util.find_spec(name) is None)

    return Ways(image_facts, builds, lambda: baking_client() is not None, lacking)


def _print(found: Found, verbose: bool) -> None:
    issues = [pair for pair in found if pair[0].code.startswith("RS-KI")]
    for check, finding in found:
        issue = check.code.startswith("RS-KI")
        quiet = finding.state is State.SKIPPED or (issue and finding.state is State.OK)
        if quiet and not verbose:
            continue
        mark, colour = MARKS[finding.state]
        # What it found may come from somebody else's machine: it must not drive this terminal.
        click.echo(f"{click.style(mark, fg=colour)} {check.code}  {check.title}: {printable(finding.evidence)}")
        for command in finding.remedy:
            click.echo(f"      {printable(command)}")
        if finding.state in (State.WARN, State.FAIL):
            click.echo(click.style(f"      see {document(check)}", fg="bright_black"))
    states = {state: sum(finding.state is state for _, finding in found) for state in State}
    handled = sum(finding.state is State.OK for _, finding in issues)
    more = f"; {handled} known issues of this setup are looked after" if handled and not verbose else ""
    said = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    hint = "" if verbose else "  (all: -v)"
    click.echo(f"\n{said}{more}{hint}\n{_verdict(found)}")


def _verdict(found: Found) -> str:
    failed = [check.code for check, finding in found if finding.state is State.FAIL]
    warned = [check.code for check, finding in found if finding.state is State.WARN]
    if failed:
        return click.style(f"not ready: {' '.join(failed)}", fg="red")
    return click.style("ready", fg="green") + (f", with warnings: {' '.join(warned)}" if warned else "")


def _fix(found: Found, live: bool, *, yes: bool, dry_run: bool) -> bool:
    """Show every command and its undoing, then run them one by one, as root where we are not. Was anything run?"""
    fixes = [(check, fix) for check, finding in found for fix in finding.fixes]
    if not live:
        raise MachineError("this is a tree or bundle of another machine", where="--fix")
    if not fixes:
        click.echo("nothing that we would mend by ourselves")
        return False
    for check, fix in fixes:
        click.echo(f"{check.code}  {shlex.join(_rooted(fix.run))}   (undo: {shlex.join(_rooted(fix.undo))})")
    if dry_run:
        return False
    if not yes and not (sys.stdin.isatty() and click.confirm("run these?")):
        click.echo("nothing was done; --yes runs them without asking", err=True)
        return False
    for check, fix in fixes:
        _run(check, fix)
    return True


def _run(check: Check[Any], fix: Fix) -> None:
    try:
        code = subprocess.run(_rooted(fix.run), check=False).returncode
    except OSError as error:
        raise MachineError(f"{fix.run[0]}: {error.strerror}", where=check.code) from error
    if code:
        raise MachineError(f"{shlex.join(fix.run)} ended with {code}", where=check.code)


def _rooted(command: tuple[str, ...]) -> list[str]:
    import os

    return list(command) if os.getuid() == 0 else ["sudo", *command]
