"""`image audit`, `image size`, `image verify`: what an image, a wheel or a file really holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from radeon_stack.catalog.sizes import format_size
from radeon_stack.cli.image import size_of
from radeon_stack.codeobjects.report import Audit, audit
from radeon_stack.codeobjects.sources import entries, tar
from radeon_stack.errors import CheckError, UsageError
from radeon_stack.host.bundle import is_here, opened
from radeon_stack.host.engines import require_engine
from radeon_stack.host.machine import look
from radeon_stack.images.contents import Contents, exported, image_contents, layers, read_contents
from radeon_stack.images.labels import GFX
from radeon_stack.images.references import is_reference
from radeon_stack.images.resolve import local_image
from radeon_stack.launch.verification import (
    AUDIT,
    kernel_audit_plan,
    require_ok,
    run_to_the_end,
    run_verification,
    verification_plan,
)
from radeon_stack.text import one_line, print_line

MARKS = {"yes": "✓", "no": "✗", "other": "·", "-": ""}
TARGETS_SHOWN = 6
FILES = (".whl", ".so")


@click.command("audit")
@click.argument("thing", required=False)
@click.option("--arch", metavar="GFX", help="Exit 7 when it has no code for this; an image's own by default.")
@click.option("--kernels", is_flag=True, help="Compile radeon-stack's Triton kernels for it, and read their binaries.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def audit_files(thing: str | None, arch: str | None, kernels: bool, as_json: bool) -> None:
    """Which gfx targets does a library, wheel, folder or image really contain?

    It reads the code objects out of each ELF file and offload bundle, compressed ones too, and what kernel files tell
    by their names. Code for a generic target counts for each gfx it runs on; code for a likely one does not.

    With --kernels it asks another question: what does Triton, in this Python or in an image, make of our kernels for
    a gfx? Exit 7 for a dot without matrix instructions, a spill in a default configuration, or too much LDS. Nothing
    is run, and no GPU is needed.

    \b
      radeon-stack image audit libbitsandbytes_rocm71.so
      radeon-stack image audit bitsandbytes-0.50.2-py3-none-manylinux_2_24_x86_64.whl --arch gfx1201
      radeon-stack image audit radeon-stack/train:rocm7.1.1-gfx1201
      radeon-stack image audit --kernels --arch gfx1201
    """
    if kernels:
        _audit_kernels(thing, arch, as_json)
        return
    if thing is None:
        raise click.UsageError("name a file, a folder or an image; or --kernels")
    path = Path(thing)
    if path.exists():
        found = audit(entries(path), arch)
    else:
        image = _named_image(thing)
        arch = arch or image.labels.get(GFX)
        with exported(image) as stream:
            found = audit(tar(stream, thing), arch)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
    else:
        _show_audit(found)
    if found.missing:
        some = ", ".join(found.missing[:5]) + (f" and {len(found.missing) - 5} more" if len(found.missing) > 5 else "")
        raise CheckError(f"no code for {arch}: {some}", where=thing)
    if arch and not found.files:
        raise CheckError(f"no code for {arch}, nor for any other GPU", where=thing)


@click.command()
@click.argument("thing")
@click.option("--arch", metavar="GFX", help="What a trim for this gfx would save; an image's own by default.")
@click.option("--rocm", "release", metavar="RELEASE", default="7.1.1", show_default=True, help="… and this release.")
@click.option("--budget", metavar="SIZE", help="Exit 7 when it is larger: 12GiB.")
@click.option("--top", default=12, show_default=True, help="Rows of each table.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def size(thing: str, arch: str | None, release: str, budget: str | None, top: int, as_json: bool) -> None:
    """What takes the room in an image or a folder: by layer, by package, by gfx, and what a trim would save.

    \b
      radeon-stack image size radeon-stack/train:rocm7.1.1-gfx1201 --budget 24GiB
      radeon-stack image size /opt/rocm --arch gfx1201
    """
    limit = size_of(budget)
    made: list[tuple[int, str]] = []
    if Path(thing).is_dir():
        contents = read_contents(entries(Path(thing)))
        total = sum(contents.files.values())
    else:
        image = _named_image(thing)
        arch = arch or image.labels.get(GFX)
        contents, made, total = image_contents(image), layers(image), int(image.attrs["Size"])
    short = "".join(release.split(".")[:2])
    told = _size_record(total, made, contents, arch, short)
    if as_json:
        click.echo(json.dumps(told, indent=2))
    else:
        _show_size(told, top)
    if limit is not None and total > limit:
        raise CheckError(f"{format_size(total)} is above the budget of {format_size(limit)}", where=thing)


@click.command()
@click.argument("image")
@click.option("--on-gpu", is_flag=True, help="What needs a GPU too: the image's gfx must be in this machine.")
@click.option("--sysroot", metavar="DIR", default="/", help="Look at this tree as the machine.")
@click.option("--dry-run", is_flag=True, help="Print the command, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def verify(image: str, on_gpu: bool, sysroot: str, dry_run: bool, as_json: bool) -> None:
    """Run an image's verify stage once more, in a container with the least access; on a GPU, where the build had none.

    \b
      radeon-stack image verify radeon-stack/train:cpu
      radeon-stack image verify radeon-stack/train:rocm7.1.1-gfx1201 --on-gpu
    """
    if not dry_run and not is_here(sysroot):
        raise UsageError("an image is verified on this machine", where="--sysroot", remedy="add --dry-run")
    require_engine()
    with opened(sysroot) as place:
        plan = verification_plan(local_image(image), look(place), place, on_gpu=on_gpu)
    if dry_run:
        import shlex

        from radeon_stack.launch.docker import DockerEngine

        click.echo(shlex.join(DockerEngine().render(plan)))
        return
    found = run_verification(plan)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    for check in [] if as_json else found["checks"]:
        mark = {"ok": "✓", "failed": "✗"}.get(check["state"], "·")
        print_line(f"{mark} {check['name']:<14} {one_line(check['detail'], 160)}")
    require_ok(found, image)


def _named_image(thing: str) -> Any:
    """The engine's image of that name. UsageError for what can only be the name of a file."""
    if thing.endswith(FILES) or not is_reference(thing):
        raise UsageError("there is no such file", where=thing, remedy="name a file, a folder or an image")
    require_engine()
    return local_image(thing)


def _audit_kernels(thing: str | None, arch: str | None, as_json: bool) -> None:
    """In a process of this Python, or in a container of an image: triton is no part of the host side."""
    form = ("--print-json",) if as_json else ()
    if thing is None:
        target = ("--target", arch) if arch else ("--all-targets",)
        command = [sys.executable, "-m", AUDIT, *target, *form]
        sys.exit(subprocess.run(command, check=False).returncode)
    require_engine()
    image = local_image(thing)
    arch = arch or image.labels.get(GFX)
    if not arch or arch == "cpu":
        raise UsageError("the image is for no gfx", where=thing, remedy="add --arch gfx1201")
    with opened("/") as place:
        ended = run_to_the_end(kernel_audit_plan(image, look(place), place, ("--target", arch, *form)))
    print_line(ended.err.rstrip(), sys.stderr)
    print_line(ended.out.rstrip())
    sys.exit(ended.code)


def _show_audit(found: Audit) -> None:
    console = Console(highlight=False)
    if not found.files:
        console.print("no code for any GPU")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("file", "kind", "size", "targets", found.arch or ""):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for file in found.files:
        names = [name for name, _ in file.targets]
        shown = " ".join(names[:TARGETS_SHOWN]) + (f" … {len(names)} in all" if len(names) > TARGETS_SHOWN else "")
        cells = (file.path, file.kind, format_size(file.size), shown, MARKS[found.verdict(file)])
        table.add_row(*(Text(one_line(cell, 200)) for cell in cells))
    console.print(table)
    totals = [f"{name} {format_size(size)}" for name, size in found.totals.items()]
    console.print(Text(f"{len(found.files)} files; code by target: " + ", ".join(totals)))


def _size_record(
    total: int, made: list[tuple[int, str]], contents: Contents, arch: str | None, short: str
) -> dict[str, Any]:
    gone = contents.removable(arch, short) if arch else []
    saved: dict[str, int] = {}
    for one in gone:
        saved[one.library] = saved.get(one.library, 0) + one.size
    return {
        "size": total,
        "layers": [{"size": size, "made_by": text} for size, text in made],
        "packages": contents.by_package,
        "gfx": contents.by_gfx,
        "trim": {"arch": arch, "files": len(gone), "bytes": sum(saved.values()), "by_library": saved} if arch else None,
    }


def _show_size(told: dict[str, Any], top: int) -> None:
    print_line(f"{format_size(told['size'])} in all")
    rows = [(layer["size"], layer["made_by"]) for layer in told["layers"]]
    for title, pairs in (
        ("by layer", sorted(rows, reverse=True)),
        ("by package", [(size, name) for name, size in told["packages"].items()]),
        ("code by gfx", [(size, name) for name, size in told["gfx"].items()]),
    ):
        if pairs:
            print_line(f"\n{title}")
        for size, text in pairs[:top]:
            print_line(f"  {format_size(size):>10}  {one_line(text, 100)}")
        if len(pairs) > top:
            rest = sum(size for size, _ in pairs[top:])
            print_line(f"  {format_size(rest):>10}  {len(pairs) - top} more")
    if (trim := told["trim"]) is not None:
        print_line(f"\na trim for {trim['arch']} would save {format_size(trim['bytes'])} in {trim['files']} files")
        for library, size in sorted(trim["by_library"].items(), key=lambda pair: -pair[1]):
            print_line(f"  {format_size(size):>10}  {library}")
