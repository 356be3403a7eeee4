"""What was measured on this machine's cards: `probes/KEY.json` under the home folder, one file a card and image.

The answers come out of a container and lie where anybody may have written: they are read as hostile text.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from radeon_stack import atomic
from radeon_stack.contracts.capabilities import Answer
from radeon_stack.contracts.sections import Section

MAX_BYTES = 1 << 20
MAX_ANSWERS = 512
MAX_FILES = 64  # of one card that are looked at for one of another image

Subject = tuple[tuple[str, str], ...]
"""What answers hold for, as pairs: gfx, card, and the image's id, or the versions of what this Python has."""


class Kept(Section):
    """An answer, the run that asked, and when (seconds since the epoch)."""

    answer: Answer
    run: str = Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")
    asked: float = Field(ge=0.0, le=1e11)


class Probe(Section):
    """One file."""

    version: Literal[1] = 1
    subject: dict[str, Annotated[str, Field(max_length=256)]] = Field(max_length=16)
    answers: Annotated[tuple[Kept, ...], Field(strict=False, max_length=MAX_ANSWERS)]

    def date(self) -> str:
        """Of the newest answer, UTC."""
        return day(max((kept.asked for kept in self.answers), default=0.0))

    def asked(self, prefix: str) -> dict[str, Answer]:
        """The answers to the questions that begin so, by what is left of their names."""
        found = (kept.answer for kept in self.answers)
        return {a.question.removeprefix(prefix): a for a in found if a.question.startswith(prefix)}


@dataclass(frozen=True)
class Found:
    """A card's probe, or why there is none that holds."""

    probe: Probe | None = None
    why_not: str = ""


def key(subject: Subject) -> str:
    """The file's name: gfx and card for a person, a hash of everything for us."""
    named = dict(subject)
    words = re.sub(r"[^a-z0-9]+", "-", f"{named.get('gfx', '')} {named.get('card', '')}".lower()).strip("-")[:80]
    return f"{words}-{hashlib.sha256(json.dumps(sorted(subject)).encode()).hexdigest()[:16]}"


def load(folder: Path, subject: Subject) -> Found:
    """The probe of exactly this subject. Never an error: what cannot be used is told in `why_not`."""
    path = folder / f"{key(subject)}.json"
    found, problem = _read(path)
    if found is not None and found.subject == dict(subject):
        return Found(found)
    if found is not None or problem:
        return Found(None, f"not probed: {path} cannot be used ({problem or 'it is of another card or image'})")
    other = _of_another_image(folder, subject)
    if other is not None:
        what = "image" if "image" in dict(subject) else "torch, Triton or ROCm"
        return Found(None, f"not probed: the probe of {other.date()} on this card was with another {what}")
    return Found(None, "not probed")


def save(folder: Path, subject: Subject, answers: Iterable[Answer], *, run: str, asked: float) -> Path:
    """Keep the answers beside earlier ones to other questions; whole or not at all. OSError when it cannot."""
    before = load(folder, subject).probe
    kept = {one.answer.question: one for one in (before.answers if before else ())}
    for answer in answers:
        if answer.verdict != "not asked":
            kept[answer.question] = Kept(answer=answer, run=run, asked=asked)
    probe = Probe(subject=dict(subject), answers=tuple(list(kept.values())[-MAX_ANSWERS:]))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key(subject)}.json"
    atomic.write_text(path, probe.model_dump_json(indent=1, exclude_defaults=True) + "\n")
    return path


def day(seconds: float) -> str:
    """`2026-11-24`, UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def _read(path: Path) -> tuple[Probe | None, str]:
    """The probe in a file, or why it is none; ("": there is no such file)."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None, "it is no regular file"
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, error.strerror or "it cannot be read"
    if len(data) > MAX_BYTES:
        return None, f"it is over {MAX_BYTES >> 20} MiB"
    try:
        return Probe.model_validate_json(data), ""
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return None, f"{'.'.join(map(str, first['loc']))[:80] or 'it'}: {first['msg'][:120]}"


def _of_another_image(folder: Path, subject: Subject) -> Probe | None:
    """The newest probe of the same card with anything else in it."""
    named = dict(subject)
    prefix = key(subject).rpartition("-")[0]
    files = sorted(folder.glob(f"{prefix}-*.json"))[:MAX_FILES] if folder.is_dir() else []
    probes = [probe for probe in (_read(file)[0] for file in files) if probe is not None]
    same = [p for p in probes if all(p.subject.get(name) == named.get(name) for name in ("gfx", "card")) and p.answers]
    return max(same, key=lambda probe: max(kept.asked for kept in probe.answers), default=None)
