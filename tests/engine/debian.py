"""Another Debian in a folder, for newer programs than this machine's and for machines with nothing set up."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def impossible() -> str:
    """Why there can be none here, or nothing."""
    if os.geteuid():
        return "root is needed for a Debian in a folder"
    return "" if shutil.which("debootstrap") else "debootstrap is not installed (Debian: apt-get install debootstrap)"


def bootstrap(suite: str, root: Path, *packages: str) -> Path:
    """A minimal Debian of that suite with these packages below `root`; half a minute."""
    include = [f"--include={','.join(packages)}"] if packages else []
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", *include, suite, str(root)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    root.chmod(0o755)
    return root


def program(root: Path, path: str) -> list[str]:
    """The beginning of a command that runs a program of that Debian here, with its own libraries."""
    loader, libraries = root / "lib64/ld-linux-x86-64.so.2", root / "usr/lib/x86_64-linux-gnu"
    return [str(loader), "--library-path", str(libraries), str(root / path)]
