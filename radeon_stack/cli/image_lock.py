"""`image lock`."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from radeon_stack.catalog.folders import data_folder
from radeon_stack.catalog.locks import Sources, load_sources
from radeon_stack.catalog.problems import nearest
from radeon_stack.errors import CheckError, ImageError, StackError
from radeon_stack.images import locking
from radeon_stack.text import print_line

AT_ONCE = 4


@click.command()
@click.argument("names", nargs=-1)
@click.option("--check", is_flag=True, help="Ask nobody: is every lock there, and made from today's inputs?")
@click.option("--upgrade", is_flag=True, help="Take the newest versions, not those that are pinned and still fit.")
@click.option("--dry-run", is_flag=True, help="Print what would be resolved, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def lock(names: tuple[str, ...], check: bool, upgrade: bool, dry_run: bool, as_json: bool) -> None:
    """Resolve packages to hashes, tags to commits, bases to digests; all of them, or those named.

    What cannot be reached keeps what it had, and is told; exit code 5 then.

    \b
      radeon-stack image lock
      radeon-stack image lock train-rocm7.1.1 --upgrade
      radeon-stack image lock --check
    """
    docker = data_folder("docker")
    if check:
        _check(locking.problems(docker), locking.unresolved_bases(docker), as_json)
        return
    known = {one.name: one for one in locking.all_locks(docker)}
    refs, bases = locking.git_refs(docker), locking.unresolved_bases(docker)
    unknown = [name for name in names if name not in (*known, "sources")]
    if unknown:
        raise click.UsageError(f"no lock '{unknown[0]}'; {nearest(unknown[0], [*known, 'sources'])}")
    chosen = [one for name, one in known.items() if not names or name in names]
    with_sources = not names or "sources" in names
    if dry_run:
        for line in [one.name for one in chosen] + (refs + bases if with_sources else []):
            click.echo(line)
        return
    failed: list[StackError] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for one, task in [(one, pool.submit(locking.write_lock, one, docker, upgrade=upgrade)) for one in chosen]:
            try:
                task.result()
                print_line(f"✓ {one.name}", sys.stderr)
            except ImageError as error:
                failed.append(error)
                print_line(f"✗ {error}", sys.stderr)
    if with_sources:
        failed += _sources(refs, bases, docker, upgrade)
    if as_json:
        click.echo(
            json.dumps({"locks": [one.name for one in chosen], "failed": [str(error) for error in failed]}, indent=2)
        )
    if failed:
        raise ImageError(f"{len(failed)} could not be resolved: {failed[0]}", remedy="what they had is kept")


def _check(problems: list[str], unresolved: list[str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"problems": problems, "bases_without_digest": unresolved}, indent=2))
    for base in [] if as_json else unresolved:
        print_line(f"· no digest yet: {base}")
    if problems:
        raise CheckError("; ".join(problems), where="docker/locks", remedy="radeon-stack image lock")
    if not as_json:
        click.echo("every lock is there, with hashes, made from today's inputs")


def _sources(refs: list[str], bases: list[str], folder: Path, upgrade: bool) -> list[StackError]:
    from radeon_stack.images.references import split
    from radeon_stack.images.registry import Registry

    before = load_sources(folder)
    digests, commits = dict(before.digests), {ref: commit for ref, commit in before.commits.items() if ref in refs}
    failed: list[StackError] = []
    for ref in refs:
        if ref in commits and not upgrade:
            continue
        try:
            commits[ref] = locking.resolve_commit(*ref.split(" ", 1))
            print_line(f"✓ {ref} {commits[ref]}", sys.stderr)
        except ImageError as error:
            failed.append(error)
            print_line(f"✗ {error}", sys.stderr)
    for base in bases:
        try:
            repository, tag = split(base if "." in base.partition("/")[0] else f"registry-1.docker.io/{base}")
            manifest = Registry(repository).manifest(tag)
            if manifest is None:
                raise ImageError("its registry has no such tag", where=base)
            digests[base] = manifest.digest
            print_line(f"✓ {base} {manifest.digest}", sys.stderr)
        except StackError as error:
            failed.append(error)
            print_line(f"✗ {base}: {error}", sys.stderr)
    locking.write_sources(Sources(digests=digests, commits=commits), folder)
    return failed
