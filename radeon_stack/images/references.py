"""Names of images: registry, repository, tag, digest."""

from __future__ import annotations

import re
from dataclasses import dataclass

from radeon_stack.errors import UsageError

REPOSITORY = re.compile(r"^[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*$")
HOST = re.compile(r"^(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::\d{1,5})?$")
TAG = re.compile(r"^\w[\w.-]{0,127}$")
DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")


@dataclass(frozen=True)
class Repository:
    """`host/name`: where images of ours are published."""

    host: str
    name: str

    def __str__(self) -> str:
        return f"{self.host}/{self.name}"

    @property
    def loopback(self) -> bool:
        """Docker, too, speaks plain HTTP with these alone."""
        host = self.host.rpartition(":")[0] or self.host
        return host in ("localhost", "[::1]") or host.startswith("127.")


def repository(text: str) -> Repository:
    """A repository by its full name. UsageError when it is none."""
    host, _, name = text.partition("/")
    if not HOST.match(host) or not REPOSITORY.match(name) or not ("." in host or ":" in host or host == "localhost"):
        raise UsageError(
            f"'{text[:100]}' is no repository",
            where="--registry",
            remedy="host/name: registry.example.org/radeon",
        )
    return Repository(host, name)


def split(reference: str) -> tuple[Repository, str]:
    """`host/name:tag` or `host/name@digest` as repository and tag or digest. UsageError when it is neither."""
    name, at, digest = reference.partition("@")
    if at:
        bare = name if ":" not in name.rpartition("/")[2] else name.rpartition(":")[0]
        if not DIGEST.match(digest):
            raise UsageError(f"'{digest[:80]}' is no digest", where=reference[:120])
        return repository(bare), digest
    bare, _, tag = name.rpartition(":")
    if not bare or not TAG.match(tag):
        raise UsageError(
            f"'{reference[:120]}' names neither tag nor digest", remedy="host/name:tag or host/name@sha256:…"
        )
    return repository(bare), tag


def is_reference(text: str) -> bool:
    """Could an engine have an image of that name, digest or id?"""
    name, at, digest = text.partition("@")
    bare, colon, tag = name.rpartition(":")
    if colon and "/" not in tag:  # else the port of a registry
        if not TAG.fullmatch(tag):
            return False
        name = bare
    host, slash, path = name.partition("/")
    named = REPOSITORY.fullmatch(name) or (slash and HOST.fullmatch(host) and REPOSITORY.fullmatch(path))
    return bool(named) and (not at or bool(DIGEST.fullmatch(digest)))
