"""A record of earlier audits: what is taken from it, what of it is compiled again, and what it then told wrongly."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]

ONE_IN = 20  # of the rows that are taken, so many are compiled again: a minute a triton on two busy cores
# Triton 3.9 makes a few instructions more or less of the same source, as the addresses in its process happen to be: up
# to 0.5 % of the code were seen, and no register.
CLOSE = 0.02
WHOSE = ("name", "arch")
COUNTS = ("dots", "vgprs", "agprs", "sgprs", "vgpr_spills", "sgpr_spills", "scratch", "lds", "waves_per_simd", "code")
NOTHING = {"default": False, "matrix": {}, **dict.fromkeys(COUNTS, 0), "findings": [], "remarks": []}
"""What is recorded besides whose row it is, and what stands for it where a record leaves it out."""


def recorded(row: Row) -> dict[str, Any]:
    """Of a row, what a record keeps: what is not 0 and not empty."""
    return {name: row[name] for name in (*WHOSE, *NOTHING, "digest") if row.get(name)}


def trusted(rows: Iterable[Row]) -> dict[str, Row]:
    """Recorded rows by digest. One that does not hold is none of them: it is compiled until it does."""
    return {row["digest"]: row for row in rows if row.get("digest") and not row.get("findings")}


def sample(digests: Collection[str], seed: str) -> frozenset[str]:
    """One in twenty, and one at least if there are any: the same for the same seed, other ones for another."""
    drawn = sorted(digests, key=lambda digest: hashlib.sha256(f"{seed} {digest}".encode()).digest())
    return frozenset(drawn[: -(-len(drawn) // ONE_IN)])


def taken(row: Row) -> dict[str, Any]:
    """A recorded row as an audit tells it."""
    return {**NOTHING, **row}


def untrue(told: Row, found: Row) -> list[str]:
    """Where a recorded row differs from what was compiled now: "vgprs 78, recorded 77"."""
    told, found = ({name: _listed(value) for name, value in taken(row).items()} for row in (told, found))
    close = abs(found["code"] - told["code"]) <= CLOSE * told["code"]
    differing = [name for name in (*WHOSE, *NOTHING) if found[name] != told[name] and not (name == "code" and close)]
    return [f"{name} {found[name]}, recorded {told[name]}" for name in differing]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
