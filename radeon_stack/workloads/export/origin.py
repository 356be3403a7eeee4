"""What an export begins with: a merged model, or an adapter to be merged; and what was taught."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from radeon_stack.errors import UsageError
from radeon_stack.runs.events import Fact, read_events

ADAPTER, CONFIG = "adapter_config.json", "config.json"


@dataclass(frozen=True)
class Origin:
    """merged or adapter is None; `prompt` and `expected` are what the run was taught, "" where that is not known."""

    merged: Path | None
    adapter: Path | None
    prompt: str = ""
    expected: str = ""


def origin(source: Path) -> Origin:
    """What a folder holds: a run's, an adapter's or a model's. UsageError for another."""
    if (source / "artifacts").is_dir():
        prompt, expected = taught(source / "events.jsonl")
        merged, adapter = source / "artifacts" / "merged", source / "artifacts" / "adapter"
        if merged.is_dir():
            return Origin(merged, None, prompt, expected)
        if adapter.is_dir():
            return Origin(None, adapter, prompt, expected)
    if (source / ADAPTER).is_file():
        return Origin(None, source)
    if (source / CONFIG).is_file():
        return Origin(source, None)
    raise UsageError(
        f"neither a run with an adapter or a merged model, nor a folder with {ADAPTER} or {CONFIG}",
        where=str(source),
        remedy="give one: --from RUN, or --from FOLDER",
    )


def taught(events: Path) -> tuple[str, str]:
    """The question that a run was asked and the answer it was to give, as it told them."""
    prompt, expected = "", ""
    for event in read_events(events) if events.is_file() else ():
        if isinstance(event, Fact) and event.name == "prompt" and isinstance(event.value, dict):
            prompt, expected = str(event.value.get("prompt") or ""), str(event.value.get("expected") or "")
    return prompt, expected


def model_bytes(folder: Path) -> int:
    """Of the safetensors of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def architecture(folder: Path) -> str:
    """The first of config.json's architectures, for people."""
    try:
        return str(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return ""
