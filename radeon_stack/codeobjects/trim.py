"""Which kernel files an image for one gfx can do without. A plan first; deleting is another's business."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from radeon_stack.codeobjects.filenames import KernelFile, kernel_file
from radeon_stack.codeobjects.isa import GENERIC, covers

_BITSANDBYTES = re.compile(r"(?:^|/)bitsandbytes/libbitsandbytes_(?P<backend>cuda|rocm|xpu)(?P<version>\d*)\.so$")


@dataclass(frozen=True)
class Removal:
    """A file that can go: bytes, and why."""

    path: str
    size: int
    library: str
    why: str


def removals(files: Iterable[tuple[str, int]], gfx: str, rocm_short: str) -> list[Removal]:
    """What an image for `gfx` does not need, of (path, bytes); sorted.

    A kernel file goes when it is for other gfx alone and a sibling serves this one: a library without any kernel of
    this gfx is left as it is. What is for a generic target stays, always.
    """
    found: list[Removal] = []
    kernels: dict[tuple[str, str], list[tuple[str, int, KernelFile]]] = {}
    for path, size in files:
        if match := _BITSANDBYTES.search(path):
            if (match["backend"], match["version"]) != ("rocm", rocm_short):
                found.append(Removal(path, size, "bitsandbytes", f"for {match['backend']} {match['version']}".strip()))
        elif (kernel := kernel_file(path)) is not None:
            kernels.setdefault(_set_of(path, kernel), []).append((path, size, kernel))
    for members in kernels.values():
        if not any(_serves(kernel, gfx) for _, _, kernel in members):
            continue
        for path, size, kernel in members:
            if not _serves(kernel, gfx) and not any(target in GENERIC for target in kernel.targets):
                found.append(Removal(path, size, kernel.library, f"for {', '.join(kernel.targets)}"))
    return sorted(found, key=lambda one: one.path)


def _serves(kernel: KernelFile, gfx: str) -> bool:
    return any(covers(target, gfx) for target in kernel.targets)


def _set_of(path: str, kernel: KernelFile) -> tuple[str, str]:
    """Files by gfx belong together by library and folder, folders by gfx by the folder they are in."""
    parts = path.rpartition("/")[0].split("/")
    cut = next((place for place, part in enumerate(parts) if "gfx" in part), len(parts))
    return kernel.library, "/".join(parts[:cut])
