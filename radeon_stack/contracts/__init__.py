"""What both sides of the container's wall agree on: the typed configuration of each workload.

The host validates a recipe against these models and writes `config.json`; the workload reads it back.
They import pydantic alone, so the host stays quick and the container needs no host package.
"""

from __future__ import annotations

from pydantic import BaseModel

from radeon_stack.contracts.bench import BenchConfig
from radeon_stack.contracts.capabilities import CapabilitiesConfig
from radeon_stack.contracts.export import ExportConfig
from radeon_stack.contracts.finetune import RESUMABLE as FINETUNE_RESUMABLE
from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.contracts.serve import ServeConfig

WORKLOADS: dict[str, type[BaseModel]] = {
    "bench": BenchConfig,
    "capabilities": CapabilitiesConfig,
    "export": ExportConfig,
    "finetune": FinetuneConfig,
    "serve": ServeConfig,
}

# What `--from` must find of a run, by workload: any of these below its artifacts.
SOURCES: dict[str, tuple[str, ...]] = {"export": ("merged", "adapter"), "serve": ("gguf", "merged")}

# What may change while a run is continued, by workload: what is done already stays right, or is done anew.
RESUMABLE: dict[str, tuple[str, ...]] = {
    "export": ("config.loaders", "config.gguf.quantizations", "config.threads", "resources.memory"),
    "finetune": FINETUNE_RESUMABLE,
    "serve": ("config.port", "config.threads", "resources.memory"),
}
