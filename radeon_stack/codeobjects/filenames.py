"""What the names of kernel files tell: ROCm's libraries keep one file, or folder, for each gfx."""

from __future__ import annotations

import re
from dataclasses import dataclass

from radeon_stack.codeobjects.isa import GENERIC, MACH

KNOWN = tuple(
    sorted({name for name in MACH.values() if "generic" not in name} | {n for g in GENERIC.values() for n in g})
)

# AOTriton keeps code by family: amd-gfx11xx, amd-gfx120x. A family is every known name that its pattern fits.
_FAMILY = re.compile(r"(?:^|/)amd-(gfx[0-9a-fx]+)/")
# MIOpen writes the number of compute units behind the name: gfx90a6e (0x6e), gfx942130, gfx906_60, gfx1030_36.
_MIOPEN = re.compile(r"(?:^|/)(gfx[0-9a-f]+)(?:_\d+)?(?:\.[\w-]+)*\.(?:kdb|fdb\.txt|db\.txt|db|model|tn\.model)$")
_WORD = re.compile(r"(?<![0-9a-z])(gfx[0-9a-f]{3,5}|gfx[0-9]+(?:-[0-9]+)?-generic)(?![0-9a-z])")
_KERNEL = re.compile(r"\.(?:co|hsaco|dat|aks2|kdb|db|db\.txt|fdb\.txt|yaml|json|model|tsv|gz|zst|bz2)$")


@dataclass(frozen=True)
class KernelFile:
    """A file that belongs to some gfx by its name."""

    library: str
    """rocblas, hipblaslt, hipsparselt, miopen, aotriton, or `other`."""
    targets: tuple[str, ...]


def kernel_file(path: str) -> KernelFile | None:
    """What a path tells, or None when it names no gfx or is no kernel file."""
    lower = path.lower()
    library = _library(lower)
    if library == "aotriton":
        match = _FAMILY.search(path)
        return KernelFile(library, _family(match[1])) if match else None
    if not _KERNEL.search(lower):
        return None
    if library == "miopen":
        match = _MIOPEN.search(path)
        return KernelFile(library, (_longest(match[1]),)) if match and _longest(match[1]) else None
    names = [name for name in dict.fromkeys(_WORD.findall(path)) if name in KNOWN or name in GENERIC]
    # The file's own name counts before its folders'.
    own = [name for name in dict.fromkeys(_WORD.findall(path.rpartition("/")[2])) if name in names]
    found = tuple(own or names)
    return KernelFile(library, found) if found else None


def _library(path: str) -> str:
    for name in ("hipblaslt", "hipsparselt", "rocblas", "miopen", "aotriton"):
        if name in path:
            return name
    return "rocblas" if "tensilelibrary" in path or "/kernels.so-" in path else "other"


def _family(pattern: str) -> tuple[str, ...]:
    fitting = re.compile(pattern.replace("x", "[0-9a-f]").replace("gf[0-9a-f]", "gfx", 1) + "$")
    found = tuple(name for name in KNOWN if fitting.match(name))
    return found or ((pattern,) if "x" not in pattern[3:] else ())


def _longest(text: str) -> str:
    """`gfx90a` of `gfx90a6e`: the longest known name that it begins with."""
    return max((name for name in KNOWN if text.startswith(name)), key=len, default="")
