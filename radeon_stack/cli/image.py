"""`image`: render, build, wheels, list; its other commands live beside it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from radeon_stack.catalog.kinds import load_kinds
from radeon_stack.catalog.platforms import Platform, load_platforms
from radeon_stack.catalog.sizes import format_size, parse_size
from radeon_stack.host.clients import baking_client
from radeon_stack.host.engines import client, probe_engine, require_engine
from radeon_stack.images.bases import base_reference, find_base
from radeon_stack.images.builder import (
    BuildSettings,
    Output,
    build_command,
    default_ca,
    default_pip_conf,
)
from radeon_stack.images.builds import (
    Built,
    Workplace,
    bake_images,
    build_image,
    ensure_requirements,
    ensure_wheel,
    summary,
    write_context,
)
from radeon_stack.images.labels import KEY, KIND, PLATFORM
from radeon_stack.images.references import repository
from radeon_stack.images.registry import Registry
from radeon_stack.images.render import REQUIREMENTS, bake_file, dockerfile, image_key, requirements_key, wheel_key
from radeon_stack.images.shared_wheels import push_wheels, wheel_tag
from radeon_stack.images.spec import ImageSpec, image_spec
from radeon_stack.runs.store import home
from radeon_stack.text import print_line

OTHERS = {
    "audit": "image_check:audit_files",
    "size": "image_check:size",
    "verify": "image_check:verify",
    "lock": "image_lock:lock",
    "push": "image_publish:push",
    "promote": "image_publish:promote",
}


class ImageGroup(click.Group):
    """The group's further commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *OTHERS]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in OTHERS:
            module, _, attribute = OTHERS[name].partition(":")
            command: click.Command = getattr(import_module(f"radeon_stack.cli.{module}"), attribute)
            return command
        return super().get_command(ctx, name)


@click.group(cls=ImageGroup)
def image() -> None:
    """Container images: render, build, verify, audit, publish."""


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that name one image."""
    for option in reversed(
        (
            click.option("--arch", "archs", multiple=True, metavar="GFX", help="gfx1201 …, or cpu; several in one go."),
            click.option("--rocm", metavar="RELEASE", help="ROCm release, such as 7.1.1."),
            click.option("--kind", default="train", show_default=True, metavar="KIND", help="train or verify."),
            click.option("--wheel", "wheels", multiple=True, metavar="NAME=VARIANT", help="flash-attn=ck …"),
            click.option("--base", metavar="IMAGE", help="Build upon this image instead of the platform's."),
            click.option("--base-registry", metavar="HOST", help="Take the platform's base from this registry."),
            click.option("--trim", is_flag=True, help="Drop the kernels of other archs; one layer."),
        )
    ):
        command = option(command)
    return command


def build_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What this machine adds to a build."""
    for option in reversed(
        (
            click.option("--ca", type=click.Path(exists=True, path_type=Path), help="A private CA; kept nowhere."),
            click.option("--pip-conf", type=click.Path(exists=True, path_type=Path), help="pip's settings; likewise."),
            click.option("--network", default="default", show_default=True, help="The network of build steps."),
            click.option("--no-cache", is_flag=True, help="Build every step anew."),
            click.option("--offline", is_flag=True, help="Use what is stored, and no network at all."),
        )
    ):
        command = option(command)
    return command


@image.command()
@spec_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A folder for Dockerfile, context, bake file.")
def render(output: Path | None, archs: tuple[str, ...], **chosen: Any) -> None:
    """The Dockerfile, or with -o all that builds it without this tool.

    \b
      radeon-stack image render --arch gfx1201
      radeon-stack image render --rocm 7.1.1 --arch gfx1201 -o ./context
      radeon-stack image render --arch all -o ./matrix       # every platform, and one bake file
    """
    specs = [rendered_spec(platform, **chosen) for platform in chosen_platforms(archs, chosen["rocm"])]
    if output is None:
        for spec in specs:
            click.echo(dockerfile(spec), nl=False)
        return
    if output.exists() and any(output.iterdir()):
        raise click.UsageError(f"{output} is not empty")
    if len(specs) == 1:
        write_context(specs[0], output)
        (output / "docker-bake.json").write_text(bake_file({".": specs[0]}), encoding="utf-8")
        click.echo(f"{output}\nbuild it: DOCKER_BUILDKIT=1 docker build --tag {specs[0].tag} {output}")
        return
    for spec in specs:
        write_context(spec, output / spec.name)
    (output / "docker-bake.json").write_text(bake_file({f"./{s.name}": s for s in specs}), encoding="utf-8")
    click.echo(f"{output}: {len(specs)} images\nbuild them: cd {output} && docker buildx bake")


@image.command("build")
@spec_options
@build_options
@click.option("--budget", metavar="SIZE", help="Fail when the image is larger: 12GiB.")
@click.option("--dry-run", is_flag=True, help="Print keys and build commands, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout; progress on stderr.")
def build_images(
    archs: tuple[str, ...], budget: str | None, dry_run: bool, as_json: bool, offline: bool, **chosen: Any
) -> None:
    """Build an image in stages, verify it, and tag it. What has its key already is not built again.

    Several are baked in one graph where docker has buildx, else built one after another.

    \b
      radeon-stack image build --arch cpu
      radeon-stack image build --rocm 7.1.1 --arch gfx1201
      radeon-stack image build --rocm 7.1.1 --arch gfx1201 --wheel flash-attn=ck --budget 24GiB
    """
    limit = size_of(budget)
    settings = build_settings(chosen)
    platforms = chosen_platforms(archs, chosen["rocm"])
    if dry_run:
        plans = [_planned(rendered_spec(platform, **chosen), settings) for platform in platforms]
        if as_json:
            click.echo(json.dumps(plans if len(plans) > 1 else plans[0], indent=2))
        else:
            for plan in plans:
                click.echo("\n".join(f"# {name} {key}" for name, key in plan["keys"].items()))
                click.echo(shlex.join(plan["command"]))
        return
    require_engine()
    from radeon_stack.cli.steps import step_view

    made: list[Built] = []
    with step_view(sys.stderr) as tell:
        place = Workplace(home(), settings, tell, offline, registries())
        specs = [found_spec(platform, **chosen) for platform in platforms]
        baker = baking_client() if len(specs) > 1 else None
        if baker:
            made += bake_images(specs, place, baker, budget=limit)
        else:
            made += [build_image(spec, place, budget=limit) for spec in specs]
    if as_json:
        told = [summary(built) for built in made]
        click.echo(json.dumps(told if len(told) > 1 else told[0], indent=2))
        return
    for built in made:
        if built.built:
            click.echo(f"{built.tag}  {built.id}")
            click.echo(f"  {format_size(built.size)} in {built.seconds:.1f} s, verified; log: {built.log}")
        else:
            click.echo(f"{built.tag}  {built.id}\n  nothing to do: it was built from the same inputs (key {built.key})")


@image.command("wheels")
@spec_options
@build_options
@click.option("--only", multiple=True, metavar="NAME", help="Build this one anew; `requirements` is one too.")
@click.option("--export", "folder", type=click.Path(path_type=Path, file_okay=False), help="Copy the wheels here.")
@click.option("--push", "to", metavar="HOST/NAME", help="Put them into a registry: others build nothing.")
@click.option("--dry-run", is_flag=True, help="Print which are stored, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
def build_wheels(
    archs: tuple[str, ...],
    only: tuple[str, ...],
    folder: Path | None,
    to: str | None,
    dry_run: bool,
    as_json: bool,
    offline: bool,
    **chosen: Any,
) -> None:
    """Build an image's wheels into the local store, and what it downloads: then it builds without a network.

    \b
      radeon-stack image wheels --rocm 7.1.1 --arch gfx1201
      radeon-stack image wheels --kind verify --arch gfx1201 --only llama-cpp-python
      radeon-stack image wheels --arch gfx1201 --export ./wheels
      radeon-stack image wheels --arch gfx1201 --push registry.example.org/radeon

    Those that a registry has (RADEON_STACK_REGISTRY) are taken from it.
    """
    if not dry_run:
        require_engine()
    from radeon_stack.cli.steps import step_view

    rows = []
    with step_view(sys.stderr) as tell:
        place = Workplace(home(), build_settings(chosen), tell, offline, registries())
        for platform in chosen_platforms(archs, chosen["rocm"]):
            spec = rendered_spec(platform, **chosen) if dry_run else found_spec(platform, **chosen)
            rows += _wheel_rows(spec, place, only, dry_run)
    if to and not dry_run:
        registry = Registry(repository(to))
        for row in rows:
            if row["name"] != REQUIREMENTS and (stored := place.store.get(row["name"], row["key"])):
                print_line(f"✓ {to}:{wheel_tag(row['name'], row['key'])} {push_wheels(registry, stored)}", sys.stderr)
    if folder and not dry_run:
        import shutil

        folder.mkdir(parents=True, exist_ok=True)
        for row in rows:
            for file in row["files"]:
                shutil.copy(file, folder)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        size = format_size(row["size"]) if row["stored"] else "not stored"
        print_line(f"{row['platform']:<20} {row['name']:<18} {row['variant']:<8} {row['key']}  {size}")


@image.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
def list_images(as_json: bool) -> None:
    """The images of ours that the engine has, and the platforms there are."""
    probe = require_engine() if as_json else probe_engine()  # an empty array would say that it has none
    rows = [
        {
            "tags": found.tags,
            "id": found.id,
            "kind": found.labels[KIND],
            "platform": found.labels.get(PLATFORM, ""),
            "key": found.labels.get(KEY, ""),
            "size": found.attrs["Size"],
        }
        for found in (client().images.list(filters={"label": [KIND]}) if probe.answers else ())
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        size = format_size(int(row["size"]))
        print_line(f"{row['kind']:<8} {row['platform']:<20} {size:>9}  {', '.join(row['tags']) or row['id']}")
    if not probe.answers:
        print_line(f"{probe.why_not}: which images it has is not known", sys.stderr)
    known = load_platforms()
    archs: dict[str, list[str]] = {}
    for platform in known.values():
        if platform.gfx:
            archs.setdefault(str(platform.rocm), []).append(platform.gfx + ("" if platform.official else "*"))
    click.echo(f"kinds: {', '.join(load_kinds())}; platforms: cpu", err=True)
    for release, names in archs.items():
        click.echo(f"  ROCm {release:<6} {' '.join(names)}", err=True)
    click.echo("  * built, and not in AMD's support matrix", err=True)


def chosen_platforms(archs: tuple[str, ...], rocm: str | None) -> list[Platform]:
    """The platforms that --arch and --rocm name; `all` is every one (of a release, where one is named)."""
    if not archs:
        raise click.UsageError("which arch? --arch gfx1201, or --arch cpu (all of them: radeon-stack image list)")
    known = load_platforms()
    if "all" in archs:
        return [platform for platform in known.values() if rocm is None or platform.rocm == rocm]
    return [known.find(arch, rocm) for arch in archs]


def rendered_spec(platform: Platform, **chosen: Any) -> ImageSpec:
    """The spec by what the catalog says alone: nobody is asked."""
    choices, other = _choices(chosen["wheels"]), chosen["base"]
    spec = image_spec(chosen["kind"], platform, choices=choices, base=other, trim=chosen["trim"])
    base = base_reference(spec.platform, other, chosen["base_registry"])
    return replace(spec, base=base, identity=base)


def found_spec(platform: Platform, **chosen: Any) -> ImageSpec:
    """The spec upon the base as it is found: ImageError when it cannot be had."""
    spec = rendered_spec(platform, **chosen)  # a bad choice is told before the base is looked for
    base = find_base(spec.platform, chosen["base"], chosen["base_registry"])
    return replace(spec, base=base.reference, identity=base.identity, base_env=base.env if spec.trim else ())


def build_settings(chosen: dict[str, Any]) -> BuildSettings:
    """Takes the build's own options out of the chosen ones."""
    environ = dict(os.environ)
    ca, pip_conf = chosen.pop("ca"), chosen.pop("pip_conf")
    network, no_cache = chosen.pop("network"), chosen.pop("no_cache")
    return BuildSettings(ca or default_ca(environ), pip_conf or default_pip_conf(environ), network, no_cache)


def registries() -> tuple[Registry, ...]:
    """Those that are set, in their order."""
    return tuple(Registry(repository(name)) for name in os.environ.get("RADEON_STACK_REGISTRY", "").split())


def size_of(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.UsageError(f"--budget: {text!r} is not {error}") from None


def _choices(wheels: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for wheel in wheels:
        name, _, variant = wheel.partition("=")
        if not name or not variant:
            raise click.UsageError(f"--wheel {wheel}: a name and a variant, such as flash-attn=triton")
        found[name] = variant
    return found


def _planned(spec: ImageSpec, settings: BuildSettings) -> dict[str, Any]:
    keys = {wheel.name: wheel_key(spec, wheel) for wheel in spec.wheels}
    keys |= {REQUIREMENTS: requirements_key(spec), spec.name: image_key(spec)}
    command = build_command("docker", Path("CONTEXT"), Output(tag=spec.tag), settings)
    return {"tag": spec.tag, "base": spec.base, "keys": keys, "command": command}


def _wheel_rows(spec: ImageSpec, place: Workplace, only: tuple[str, ...], dry_run: bool) -> list[dict[str, Any]]:
    names = [wheel.name for wheel in spec.wheels] + [REQUIREMENTS]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise click.UsageError(f"--only {unknown[0]}: this image stages {', '.join(names)}")
    rows = []
    for wheel in spec.wheels:
        if only and wheel.name not in only:
            continue
        key = wheel_key(spec, wheel)
        stored = (
            place.store.get(wheel.name, key) if dry_run else ensure_wheel(spec, wheel, place, again=wheel.name in only)
        )
        rows.append(_row(spec, wheel.name, wheel.variant, key, stored))
    if not only or REQUIREMENTS in only:
        key = requirements_key(spec)
        stored = (
            place.store.get(REQUIREMENTS, key)
            if dry_run
            else ensure_requirements(spec, place, again=REQUIREMENTS in only)
        )
        rows.append(_row(spec, REQUIREMENTS, "lock", key, stored))
    return rows


def _row(spec: ImageSpec, name: str, variant: str, key: str, stored: Any) -> dict[str, Any]:
    return {
        "platform": spec.platform.name,
        "name": name,
        "variant": variant,
        "key": key,
        "stored": stored is not None,
        "size": stored.size if stored else 0,
        "files": [str(file) for file in stored.files] if stored else [],
    }
