"""uv: where it is, and what it is told so that torch comes as a build for CPUs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec

ASKING_SECONDS = 20


def find_uv() -> list[str] | None:
    """The argv that starts uv: this Python's, else the one on PATH; None without either."""
    if find_spec("uv"):
        return [sys.executable, "-m", "uv"]
    found = shutil.which("uv")
    return None if found is None else [found]


def pips_links() -> str:
    """The find-links in pip's settings, which uv does not read; "" without any."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASKING_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout


def find_links(environ: Mapping[str, str], settings: Callable[[], str] = pips_links) -> str:
    """Where wheels lie on disk, as UV_FIND_LINKS has it: from uv's variable, pip's, or pip's settings; "" nowhere."""
    told = environ.get("UV_FIND_LINKS") or environ.get("PIP_FIND_LINKS") or settings()
    return ",".join(told.replace(",", " ").split())


def cpu_torch(version: str, links: str) -> list[str]:
    """What to install for a torch without CUDA: from PyTorch's own index, unless a build of it may lie on disk.

    The default index has gigabytes for NVIDIA's cards under the same version.
    """
    return [f"torch=={version}", *([] if links else ["--torch-backend", "cpu"])]
