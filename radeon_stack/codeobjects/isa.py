"""Names of AMD GPU targets, and which of them a code object runs on."""

from __future__ import annotations

import re

# e_machine and the low byte of e_flags of a code object. Source: LLVM, "User Guide for AMDGPU Backend", tables
# "AMDGPU ELF Header Enumeration Values" and EF_AMDGPU_MACH_AMDGCN_*.
EM_AMDGPU = 224
MACH_MASK = 0xFF
MACH = {
    0x02C: "gfx900", 0x02F: "gfx906", 0x030: "gfx908", 0x03F: "gfx90a", 0x04C: "gfx942", 0x04F: "gfx950",
    0x033: "gfx1010", 0x034: "gfx1011", 0x035: "gfx1012", 0x036: "gfx1030", 0x037: "gfx1031", 0x038: "gfx1032",
    0x041: "gfx1100", 0x046: "gfx1101", 0x047: "gfx1102", 0x044: "gfx1103", 0x043: "gfx1150", 0x04A: "gfx1151",
    0x055: "gfx1152", 0x058: "gfx1153", 0x048: "gfx1200", 0x04E: "gfx1201",
    0x051: "gfx9-generic", 0x052: "gfx10-1-generic", 0x053: "gfx10-3-generic", 0x054: "gfx11-generic",
    0x059: "gfx12-generic", 0x05F: "gfx9-4-generic",
}  # fmt: skip

# What a generic target runs on. Source: the same guide, "Generic Processor Code Object Versioning".
GENERIC = {
    "gfx9-generic": ("gfx900", "gfx902", "gfx904", "gfx906", "gfx909", "gfx90c"),
    "gfx9-4-generic": ("gfx942", "gfx950"),
    "gfx10-1-generic": ("gfx1010", "gfx1011", "gfx1012", "gfx1013"),
    "gfx10-3-generic": ("gfx1030", "gfx1031", "gfx1032", "gfx1033", "gfx1034", "gfx1035", "gfx1036"),
    "gfx11-generic": ("gfx1100", "gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1152", "gfx1153"),
    "gfx12-generic": ("gfx1200", "gfx1201"),
}

# `hipv4-amdgcn-amd-amdhsa--gfx90a:xnack+`, and older ones with another environment before the name.
_TARGET = re.compile(r"amdgcn-amd-amdhsa-[^-]*-(gfx[0-9a-f]+(?:-[0-9]+)*(?:-generic)?)((?::[a-z]+[+-])*)$")
NAME = re.compile(r"^gfx[0-9a-f]{3,5}$")


def target_name(target_id: str) -> str | None:
    """The gfx name of a bundle entry's id, without its features; None for the host's entry and what is no GPU."""
    match = _TARGET.search(target_id)
    return match[1] if match else None


def covers(target: str, arch: str) -> bool:
    """Does code for `target` run on `arch`? Never by likeness: gfx1200's crashes on gfx1201."""
    return target == arch or arch in GENERIC.get(target, ())
