"""An audit: which files have code for which gfx, and whether the one that is asked for is among them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from radeon_stack.codeobjects import elf
from radeon_stack.codeobjects.bundles import COMPRESSED_MAGIC, PLAIN_MAGIC, bundles
from radeon_stack.codeobjects.filenames import kernel_file
from radeon_stack.codeobjects.isa import covers
from radeon_stack.codeobjects.sources import Entry
from radeon_stack.errors import UsageError

Verdict = Literal["yes", "no", "other", "-"]
BUNDLE_LIMIT = 4 << 30


@dataclass(frozen=True)
class AuditedFile:
    """A file with code for GPUs: its bytes, what it is, and its code by target in bytes."""

    path: str
    size: int
    kind: Literal["library", "code object", "bundle", "kernel file"]
    library: str
    targets: tuple[tuple[str, int], ...]

    @property
    def alone(self) -> bool:
        """It must have the target itself; one of a set of files by gfx needs a sibling that has."""
        return self.kind in ("library", "bundle")

    @property
    def group(self) -> tuple[str, str]:
        folder = self.path.rpartition("/")[0]
        # Folders by gfx (hipblaslt/library/gfx942, aotriton.images/amd-gfx11xx/flash) are one set.
        cut = next((i for i, part in enumerate(folder.split("/")) if "gfx" in part), None)
        return self.library, "/".join(folder.split("/")[:cut])

    def has(self, arch: str) -> bool:
        return any(covers(target, arch) for target, _ in self.targets)


@dataclass(frozen=True)
class Audit:
    """All files that have code for GPUs."""

    files: tuple[AuditedFile, ...]
    arch: str | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """What lacks the arch: files that stand alone, and sets of files by gfx (named by library and folder)."""
        if self.arch is None:
            return ()
        lacking = [file.path for file in self.files if file.alone and not file.has(self.arch)]
        sets = {file.group for file in self.files if not file.alone}
        served = {file.group for file in self.files if not file.alone and file.has(self.arch)}
        return tuple(lacking + [f"{library} in {folder or '.'}" for library, folder in sorted(sets - served)])

    def verdict(self, file: AuditedFile) -> Verdict:
        """`yes`, `no` where it lacks the arch, `other` for a file of another gfx in a set that has it."""
        if self.arch is None:
            return "-"
        if file.has(self.arch):
            return "yes"
        served = any(one.group == file.group and one.has(self.arch) for one in self.files if not one.alone)
        return "other" if not file.alone and served else "no"

    @property
    def totals(self) -> dict[str, int]:
        """Bytes of code by target, largest first."""
        found: dict[str, int] = {}
        for file in self.files:
            for target, size in file.targets:
                found[target] = found.get(target, 0) + size
        return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))

    def as_json(self) -> dict[str, Any]:
        return {
            "arch": self.arch,
            "missing": list(self.missing),
            "totals": self.totals,
            "files": [
                {
                    "path": file.path,
                    "size": file.size,
                    "kind": file.kind,
                    "library": file.library,
                    "targets": dict(file.targets),
                    "verdict": self.verdict(file),
                }
                for file in self.files
            ],
        }


def audit(files: Iterable[Entry], arch: str | None = None) -> Audit:
    """Look into every file. UsageError names the first that is damaged."""
    return Audit(tuple(found for entry in files if (found := look(entry)) is not None), arch)


def look(entry: Entry) -> AuditedFile | None:
    """What a file has; None when it has no code for GPUs."""
    named = kernel_file(entry.name)
    if named is not None and (len(named.targets) == 1 or not entry.head.startswith(elf.MAGIC)):
        share = entry.size // len(named.targets)
        return AuditedFile(
            entry.name, entry.size, "kernel file", named.library, tuple((target, share) for target in named.targets)
        )
    try:
        if entry.head.startswith(elf.MAGIC):
            with entry.open() as stream:
                kind, code = elf.code_in(stream)
            if not code:
                return None
            shown: Literal["library", "code object"] = "library" if kind == "library" else "code object"
            return AuditedFile(entry.name, entry.size, shown, "other", tuple(sorted(code.items())))
        if entry.head.startswith((PLAIN_MAGIC, COMPRESSED_MAGIC)):
            return _bundle(entry)
    except UsageError as error:
        raise UsageError(error.what, where=error.where or entry.name) from error
    return None


def _bundle(entry: Entry) -> AuditedFile | None:
    if entry.size > BUNDLE_LIMIT:
        raise UsageError(f"an offload bundle above {BUNDLE_LIMIT} bytes")
    with entry.open() as stream:
        code: dict[str, int] = {}
        for bundle in bundles(memoryview(stream.read())):
            for target, size in bundle.targets:
                code[target] = code.get(target, 0) + size
    return AuditedFile(entry.name, entry.size, "bundle", "other", tuple(sorted(code.items()))) if code else None
