"""A model of the Hugging Face hub: its weights as safetensors, its configuration and tokenizer, and nothing that runs.

Which commit it was is written down with the run, so that a resumed run and the other processes take the same, without
asking again. Downloads are huggingface_hub's own: a broken one is continued, what is in the cache is not read twice.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (  # type: ignore[attr-defined, unused-ignore]
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from radeon_stack import atomic
from radeon_stack.contracts.sections import hub_parts
from radeon_stack.errors import MachineError, StackError, UsageError
from radeon_stack.text import one_line
from radeon_stack.workloads.job import Job

# In the repository's own folder alone; weights in pickles or code are never asked for.
SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja")
RECORD = "hub.json"
TOKEN = "HF_TOKEN"  # noqa: S105 - a name
WHERE = "config.model"
MAX_RECORD_BYTES = 1 << 20


class Fetched(BaseModel):
    """Which commit of a model a run trains, and the files of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    files: dict[str, int] = Field(min_length=1, max_length=10_000, description="name → bytes")


def fetched(job: Job) -> Path:
    """The folder in the cache that a run's model is in, read from the hub if it is not there yet.

    UsageError for what the hub does not have or give out, MachineError where it cannot be reached.
    """
    name, revision = hub_parts(job.arguments.model)
    record = job.artifacts / RECORD
    job.progress("download", 0, 1, unit="bytes", note=name)
    try:
        known = _read(record, name) or _asked(name, revision)
        if job.rank.first:
            atomic.write_text(record, known.model_dump_json(indent=1))
        return _download(job, known)
    except (HTTPError, HFValidationError, OSError) as error:
        raise _told(error, name, revision) from error


def _read(record: Path, name: str) -> Fetched | None:
    try:
        with record.open("rb") as stream:
            found = Fetched.model_validate_json(stream.read(MAX_RECORD_BYTES))
    except (FileNotFoundError, ValidationError):
        return None
    return found if found.id == name else None


def _asked(name: str, revision: str | None) -> Fetched:
    info: Any = HfApi().model_info(name, revision=revision, files_metadata=True)
    files = {
        one.rfilename: int(one.size or 0)
        for one in info.siblings or ()
        if "/" not in one.rfilename and PurePosixPath(one.rfilename).suffix in SUFFIXES
    }
    if not any(file.endswith(".safetensors") for file in files):
        raise UsageError(
            f"{name} has no weights as safetensors",
            where=WHERE,
            remedy="convert it once with transformers' save_pretrained, and give the folder: --model PATH",
        )
    return Fetched(id=name, revision=str(info.sha), files=files)


def _download(job: Job, known: Fetched) -> Path:
    total, done = sum(known.files.values()), 0
    folder = None
    for file, size in sorted(known.files.items()):
        job.progress("download", done, total, unit="bytes", note=file)
        place = hf_hub_download(
            known.id, file, revision=known.revision, cache_dir=job.arguments.cache / "hub", token=os.environ.get(TOKEN)
        )
        folder = Path(place).parent
        done += size
    job.progress("download", total, total, unit="bytes")
    assert folder is not None  # noqa: S101 - there is one file at least
    return folder


def _told(error: Exception, name: str, revision: str | None) -> StackError:
    """In our words: what it was, and what to do."""
    given = f"{TOKEN} is given" if os.environ.get(TOKEN) else f"no {TOKEN} is given"
    by_name = f"export {TOKEN}=… and add --set secrets='[\"{TOKEN}\"]'"
    if isinstance(error, GatedRepoError):
        return UsageError(
            f"{name} is given out on request alone; {given}",
            where=WHERE,
            remedy=f"accept its licence on its page; then {by_name}",
        )
    if isinstance(error, RevisionNotFoundError):
        return UsageError(f"{name} has no revision {revision}", where=WHERE)
    if isinstance(error, RepositoryNotFoundError):
        return UsageError(
            f"the hub knows no model {name}, or does not show it; {given}",
            where=WHERE,
            remedy=f"look at the name; for a private one {by_name}",
        )
    return MachineError(
        f"{name} cannot be read from the hub: {one_line(str(error), 200)}",
        where=WHERE,
        remedy="is there a network? what was read is kept, run it again; or give a folder: --model PATH",
    )
