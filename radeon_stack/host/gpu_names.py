"""What a card is called on its box."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.resources import files

from radeon_stack.host.sysroot import Sysroot

LIBDRM = "/usr/share/libdrm/amdgpu.ids"
UNPRINTABLE = re.compile(r"[^\x20-\x7e]")
LONGEST = 60


def marketing_name(sysroot: Sysroot, folder: str, gfx: str) -> str:
    """The name of a PCI device: the board's own, else libdrm's, else ours, else its gfx."""
    own = sysroot.text(f"{folder}/product_name")
    if own:
        return _clean(own)
    device = (sysroot.text(f"{folder}/device") or "").removeprefix("0x").upper()
    revision = (sysroot.text(f"{folder}/revision") or "").removeprefix("0x").upper()
    for line in (sysroot.text(LIBDRM) or "").splitlines():
        fields = [field.strip() for field in line.split(",", 2)]
        if len(fields) == 3 and fields[0].upper() == device and fields[1].upper() == revision:
            return _clean(fields[2])
    known = _names().get(device, {})
    return known.get(revision) or known.get("any") or f"AMD {gfx}"


def _clean(name: str) -> str:
    return UNPRINTABLE.sub("", name)[:LONGEST]


@cache
def _names() -> dict[str, dict[str, str]]:
    return dict(tomllib.loads((files("radeon_stack.host") / "gpu_names.toml").read_text(encoding="utf-8")))
