"""`image`: render, build, list."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from radeon_stack.catalog.platforms import platform_name, platforms
from radeon_stack.host.engines import client, require_engine
from radeon_stack.images.builder import (
    BuildSettings,
    build,
    build_command,
    building_client,
    default_ca,
    default_pip_conf,
)
from radeon_stack.images.resolve import KIND_LABEL, PLATFORM_LABEL
from radeon_stack.images.spec import KINDS, ImageSpec, dockerfile, write_context
from radeon_stack.runs.view import print_line


@click.group()
def image() -> None:
    """Container images: render, build, list."""


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that name an image."""
    for option in (
        click.option("--kind", type=click.Choice(KINDS), default="train", show_default=True),
        click.option("--rocm", metavar="RELEASE", help="ROCm release, such as 7.1.1."),
        click.option("--arch", required=True, metavar="GFX", help="gfx1201 …, or cpu."),
    ):
        command = option(command)
    return command


@image.command()
@spec_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A folder for Dockerfile and context.")
def render(kind: str, rocm: str | None, arch: str, output: Path | None) -> None:
    """The Dockerfile, or with -o the whole context: it builds without this tool.

    \b
      radeon-stack image render --arch cpu
      radeon-stack image render --rocm 7.1.1 --arch gfx1201 -o ./context
    """
    spec = _spec(kind, rocm, arch)
    if output is None:
        click.echo(dockerfile(spec), nl=False)
        return
    if output.exists() and any(output.iterdir()):
        raise click.UsageError(f"{output} is not empty")
    write_context(spec, output)
    click.echo(f"{output}\nbuild it: DOCKER_BUILDKIT=1 docker build --tag {spec.tag} {output}")


@image.command("build")
@spec_options
@click.option("--ca", type=click.Path(exists=True, path_type=Path), help="A private CA bundle; never kept in a layer.")
@click.option("--pip-conf", type=click.Path(exists=True, path_type=Path), help="pip's settings (mirrors); likewise.")
@click.option("--network", default="default", show_default=True, help="The network of build steps.")
@click.option("--no-cache", is_flag=True, help="Build every step anew.")
@click.option("--dry-run", is_flag=True, help="Print the build command, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout; progress on stderr.")
def build_image(
    kind: str,
    rocm: str | None,
    arch: str,
    ca: Path | None,
    pip_conf: Path | None,
    network: str,
    no_cache: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build an image with BuildKit.

    \b
      radeon-stack image build --arch cpu
      radeon-stack image build --rocm 7.1.1 --arch gfx1201
    """
    spec = _spec(kind, rocm, arch)
    environ = dict(os.environ)
    settings = BuildSettings(ca or default_ca(environ), pip_conf or default_pip_conf(environ), network, no_cache)
    if dry_run:
        command = build_command("docker", Path("CONTEXT"), spec.tag, settings)
        click.echo(json.dumps({"command": command}, indent=2) if as_json else shlex.join(command))
        return
    require_engine()
    docker = building_client()
    with tempfile.TemporaryDirectory(prefix="radeon-stack-") as folder:
        write_context(spec, Path(folder))
        build(build_command(docker, Path(folder), spec.tag, settings), lambda line: print_line(line, sys.stderr))
    made = client().images.get(spec.tag)
    click.echo(json.dumps({"tag": spec.tag, "id": made.id}) if as_json else f"{spec.tag}  {made.id}")


@image.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
def list_images(as_json: bool) -> None:
    """The images of ours that the engine has, and the platforms there are."""
    require_engine()
    rows = [
        {
            "tags": found.tags,
            "id": found.id,
            "kind": found.labels[KIND_LABEL],
            "platform": found.labels.get(PLATFORM_LABEL, ""),
            "size": found.attrs["Size"],
        }
        for found in client().images.list(filters={"label": [KIND_LABEL]})
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        print_line(f"{row['kind']:<8} {row['platform']:<20} {', '.join(row['tags']) or row['id']}")
    click.echo(f"platforms: {', '.join(platforms())}", err=True)


def _spec(kind: str, rocm: str | None, arch: str) -> ImageSpec:
    known = platforms()
    name = platform_name(arch, rocm, known)
    return ImageSpec(kind, name, known[name])
