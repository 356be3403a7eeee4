"""The record that an image keeps of itself: `/etc/radeon-stack/build.json`."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from radeon_stack.workloads.probe.base import normal

DPKG_STATUS = Path("var/lib/dpkg/status")


def build_record(description: dict[str, Any], folder: Path, root: Path = Path("/")) -> dict[str, Any]:
    """Inputs, versions and the digests of staged wheels."""
    return {
        "image": {key: value for key, value in description.items() if key != "base"},
        "base": description["base"],
        "python": platform.python_version(),
        "requirements": hashlib.sha256((folder / "requirements.txt").read_bytes()).hexdigest(),
        "wheels": _wheels(folder / "wheels.sha256"),
        "packages": {"python": _python(), "debian": _debian(root / DPKG_STATUS)},
    }


def _wheels(path: Path) -> dict[str, str]:
    """File name → SHA-256 of the wheels that stages brought."""
    if not path.is_file():
        return {}
    pairs = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {Path(name).name: digest for digest, name in pairs}


def _python() -> dict[str, str]:
    found = {normal(str(dist.metadata["Name"])): dist.version for dist in distributions()}
    return dict(sorted(found.items()))


def _debian(status: Path) -> dict[str, str]:
    """Installed packages by name, from dpkg's own table; {} on another kind of system."""
    if not status.is_file():
        return {}
    found = {}
    for block in status.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(" "))
        if fields.get("Status", "").endswith(" installed") and "Package" in fields:
            found[fields["Package"]] = fields.get("Version", "")
    return dict(sorted(found.items()))
