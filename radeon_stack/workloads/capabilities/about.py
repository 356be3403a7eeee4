"""Which device and libraries is it that answers? Found out in a process of its own, as torch is imported for it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from radeon_stack.contracts.capabilities import Answer
from radeon_stack.errors import WorkloadError
from radeon_stack.workloads.capabilities.asking import IMPORT_SECONDS
from radeon_stack.workloads.capabilities.steps import Question

PACKAGES = ("torch", "triton", "pytorch-triton-rocm", "transformers", "bitsandbytes", "flash-attn")


def about() -> dict[str, Any]:
    """Device, gfx ("" off AMD), number of GPUs and versions. WorkloadError when torch cannot be imported or hangs."""
    command = [sys.executable, "-m", "radeon_stack.workloads.capabilities", "--about"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired as error:
        raise WorkloadError(f"torch did not find its devices in {IMPORT_SECONDS} s", where="import torch") from error
    except (IndexError, ValueError, TypeError) as error:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise WorkloadError(
            f"torch cannot be imported, or finds no devices: {last[0]}", where="import torch", remedy="see log.txt"
        ) from error


def look() -> dict[str, Any]:
    """What `about` asks its child for."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = torch.cuda.get_device_properties(0) if gpus else None
    hip = torch.version.hip
    return {
        "device": properties.name if properties else "cpu",
        "gfx": str(getattr(properties, "gcnArchName", "")).partition(":")[0] if hip and properties else "",
        "gpus": gpus,
        "hip": hip,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES if _version(name)},
    }


def unanswerable(question: Question, found: dict[str, Any], named: bool) -> Answer | None:
    """The answer to a question that needs no process: something is missing, or it is asked by name only."""
    if question.cuda and found["hip"]:
        return Answer(question=question.name, verdict="missing", detail="a backend of CUDA's")
    absent = [name for name in question.imports if find_spec(name.partition(".")[0]) is None]
    if absent:
        return Answer(question=question.name, verdict="missing", detail=f"the package {absent[0]}")
    if question.gpu and not found["gpus"]:
        return Answer(question=question.name, verdict="missing", detail="a GPU")
    if not named and question.long:
        return Answer(
            question=question.name, verdict="not asked", detail="it takes minutes: radeon-stack run soak-lora"
        )
    if not named and found["gpus"] > 1 and found["gfx"].startswith(question.risky):
        why = "it has hung whole machines with this card (RS-KI-004); asked when it is named"
        return Answer(question=question.name, verdict="not asked", detail=why)
    return None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
