"""A packed base in the cache: quantised once, read back in a quarter of the bytes."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from radeon_stack import atomic
from radeon_stack.contracts.finetune import Quantization
from radeon_stack.workloads.job import Job


def folder_of(job: Job, source: Path, quantization: Quantization, dtype: str) -> Path:
    """Where the packed copy of a folder is or will be; another one for other weights, settings or versions."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(source.glob("*.safetensors"))]
    config = (source / "config.json").read_text(encoding="utf-8")
    settings = (quantization.kind, quantization.double, quantization.experts, dtype, version("bitsandbytes"))
    told = json.dumps([str(source.resolve()), files, config, settings])
    return job.arguments.cache / "packed" / f"{source.name}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def keep(job: Job, model: Any, folder: Path) -> None:
    """Write the packed base, whole or not at all."""
    job.progress("keep", 0, 1, note="the packed base")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic.whole_directory(folder) as partial:
        model.save_pretrained(partial)
    job.progress("keep", 1, 1, note="the packed base")
