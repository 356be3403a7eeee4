"""ELF files: libraries of the host that carry code for GPUs, and bare code objects."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import IO

from elftools.elf.elffile import ELFFile

from radeon_stack.codeobjects.bundles import bundles
from radeon_stack.codeobjects.isa import EM_AMDGPU, MACH, MACH_MASK
from radeon_stack.errors import UsageError

MAGIC = b"\x7fELF"
FATBIN, SEGMENT = ".hip_fatbin", ".hipFatBinSegment"
SECTIONS_LIMIT = 100_000


def code_in(file: IO[bytes]) -> tuple[str, dict[str, int]]:
    """What an ELF file is (`library`, `code object`), and its code by target in bytes; {} where it has none.

    The file needs a descriptor: it is mapped, never read as a whole. UsageError when it is damaged.
    """
    try:
        elf = ELFFile(file)
        size = file.seek(0, 2)
        if elf["e_machine"] in ("EM_AMDGPU", EM_AMDGPU):
            return "code object", {MACH.get(elf["e_flags"] & MACH_MASK, "unknown"): size}
        if elf.num_sections() > SECTIONS_LIMIT:
            raise UsageError(f"more than {SECTIONS_LIMIT} sections")
        places = {name: (start, length) for name, start, length in _sections(elf, size)}
    except UsageError:
        raise
    except Exception as error:  # pyelftools throws what its parsers meet: struct, Unicode, assertions, its own
        raise UsageError(f"a damaged ELF file: {type(error).__name__}: {str(error)[:100]}") from error
    if FATBIN not in places:
        if SEGMENT in places:
            raise UsageError(f"it registers code for GPUs ({SEGMENT}) that is not in it ({FATBIN})")
        return "library", {}
    start, length = places[FATBIN]
    found: dict[str, int] = {}
    if length:
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as whole,
            whole[start : start + length] as section,
        ):
            for bundle in bundles(section):
                for target, code in bundle.targets:
                    found[target] = found.get(target, 0) + code
    return "library", found


def _sections(elf: ELFFile, size: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset and bytes of the sections that concern us. UsageError when one ends beyond the file."""
    for section in elf.iter_sections():
        if section.name in (FATBIN, SEGMENT):
            start, length = section["sh_offset"], section["sh_size"]
            if section["sh_type"] == "SHT_NOBITS":
                length = 0
            if start + length > size:
                raise UsageError(f"its section {section.name} ends beyond the file")
            yield section.name, start, length
