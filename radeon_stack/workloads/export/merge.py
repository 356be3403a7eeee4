"""Merging, where a run left an adapter alone: as training does it, in a process that gives its memory back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from radeon_stack.errors import CheckError
from radeon_stack.runs import events as ev
from radeon_stack.workloads.export.held import TEXT
from radeon_stack.workloads.finetune import fp8, sources
from radeon_stack.workloads.finetune.merging import merge
from radeon_stack.workloads.job import Arguments, Job


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """`{"run", "cache", "model", "adapter"}` → {}; the merged folder is below the run's artifacts."""
    run, adapter = Path(request["run"]), Path(request["adapter"])
    arguments = Arguments(run, Path(request["cache"]), request["model"], None, False)
    job = Job(arguments, ev.EventWriter(run / "events.jsonl"))
    base = sources.base_folder(job)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    require_same_tokens(tokenizer, AutoTokenizer.from_pretrained(base), adapter, base)
    with fp8.in_16_bit(job, base, torch.bfloat16) as whole:
        merge(job, whole, adapter, tokenizer, given=base)
    return {}


def require_same_tokens(tokenizer: Any, of_base: Any, adapter: Path, base: Path) -> None:
    """CheckError where the adapter's tokenizer reads a text otherwise than its base's does."""
    if tokenizer(TEXT)["input_ids"] != of_base(TEXT)["input_ids"]:
        raise CheckError(
            f"its tokenizer is not that of {base.name}: it reads the same text as other tokens",
            where=str(adapter),
            remedy="put the base's tokenizer beside the adapter, or name the base that it was trained on: --model PATH",
        )
