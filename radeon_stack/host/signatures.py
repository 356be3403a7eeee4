"""Error texts and what they mean: `signatures.toml`, matched against a log of any size.

A log is hostile: it is read in pieces of fixed size, and what is shown of it has no control characters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from typing import Annotated, BinaryIO

from pydantic import AfterValidator, Field

from radeon_stack.catalog.tables import Table, read_table, typed
from radeon_stack.errors import UsageError, about_run
from radeon_stack.host.known_issues import Link

PIECE = 1 << 20
LONGEST_LINE = 4096  # what is around a text is looked at this far
SHOWN = 300
MANY = 64  # of one text in one piece: a flood is a flood
HARMLESS = 90  # ranks from here on are warnings
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e\u00a0-\uffff]")


def _compiles(pattern: str) -> str:
    re.compile(pattern)
    return pattern


class Signature(Table):
    """One error: any of the texts `contains`, and in the lines around it the `pattern`."""

    id: Annotated[str, Field(pattern=r"^RS-ER-\d{3}$")]
    title: str = Field(min_length=1)
    contains: Annotated[tuple[Annotated[str, Field(min_length=6)], ...], Field(strict=False, min_length=1)]
    pattern: Annotated[str, AfterValidator(_compiles)] = ""
    cause: str = Field(min_length=1)
    remedy: str = Field(min_length=1)
    rank: int = Field(ge=1, lt=100)
    fault: bool = False
    links: Annotated[tuple[Link, ...], Field(strict=False, min_length=1)]

    @property
    def harmless(self) -> bool:
        """A warning, which explains no failure."""
        return self.rank >= HARMLESS

    def remedy_for(self, run: str) -> str:
        """The remedy with the id of the run that it is about."""
        return about_run(self.remedy, run)


class SignatureFile(Table):
    """The file as a whole."""

    signature: Annotated[tuple[Signature, ...], Field(strict=False)]


@dataclass(frozen=True)
class Match:
    """A signature and the first line that shows it; `offset` in bytes, `times` how often its texts were seen."""

    signature: Signature
    line: str
    offset: int
    times: int


@cache
def load_signatures() -> tuple[Signature, ...]:
    """All signatures. UsageError names file and key of a bad entry."""
    with as_file(files("radeon_stack.host") / "signatures.toml") as path:
        found = typed(SignatureFile, read_table(path), path).signature
        if len({signature.id for signature in found}) < len(found):
            raise UsageError("an id is there twice", where=str(path))
    return found


def diagnose(log: BinaryIO, signatures: tuple[Signature, ...] | None = None) -> list[Match]:
    """The signatures in a log, nearest to the cause first; memory does not grow with the log."""
    wanted = load_signatures() if signatures is None else signatures
    texts = [(signature, text.encode()) for signature in wanted for text in signature.contains]
    overlap = LONGEST_LINE
    found: dict[str, Match] = {}
    kept, position = b"", 0
    while piece := log.read(PIECE):
        window = kept + piece
        # A text counts where it begins; one that may go on in the next piece is found there.
        last = len(window) - overlap if len(piece) == PIECE else len(window)
        for signature, text in texts:
            _search(window, text, signature, position, last, found)
        cut = max(0, last)
        kept, position = window[cut:], position + cut
    for signature, text in texts:
        _search(kept, text, signature, position, len(kept), found)
    return sorted(found.values(), key=lambda match: (match.signature.rank, match.offset))


def causes(matches: list[Match]) -> list[Match]:
    """The matches that can have ended a run: warnings left out."""
    return [match for match in matches if not match.signature.harmless]


def _search(
    window: bytes, text: bytes, signature: Signature, position: int, last: int, found: dict[str, Match]
) -> None:
    start = window.find(text)
    for _ in range(MANY):
        if not 0 <= start < last:
            return
        _note(window, start, signature, position, found)
        start = window.find(text, start + len(text))


def _note(window: bytes, start: int, signature: Signature, position: int, found: dict[str, Match]) -> None:
    around = window[max(0, start - LONGEST_LINE // 2) : start + LONGEST_LINE // 2].decode("utf-8", errors="replace")
    if signature.pattern and not re.search(signature.pattern, around):
        return
    before = found.get(signature.id)
    if before is None:
        line, begin = _line(window, start)
        found[signature.id] = Match(signature, CONTROL.sub("", line).strip()[:SHOWN], position + begin, 1)
    else:
        found[signature.id] = Match(signature, before.line, before.offset, before.times + 1)


def _line(window: bytes, start: int) -> tuple[str, int]:
    """The line around a place, and where it begins; of a long one the part around that place."""
    # Progress bars end their lines with a carriage return alone.
    begin = max(window.rfind(b"\n", 0, start), window.rfind(b"\r", 0, start)) + 1
    begin = max(begin, start - SHOWN // 2)
    ends = [end for end in (window.find(b"\n", start), window.find(b"\r", start)) if end >= 0]
    return window[begin : min([*ends, start + LONGEST_LINE, len(window)])].decode("utf-8", errors="replace"), begin
