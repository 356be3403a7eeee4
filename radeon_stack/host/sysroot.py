"""The files of this machine, or of a tree in its place: read bounded, never waiting, never from outside the tree."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

LIMIT = 256 << 10  # bytes of one file; sysfs gives a page, /proc/cmdline and /etc/group a little more
MANY = 4096  # entries of one folder
OVERLAY = "radeon-stack.json"
"""What a staged tree or a bundle tells beside its files: nodes' owners, the caller, the engine."""


@dataclass(frozen=True)
class Reading:
    """A file's text, or why there is none: `missing`, `denied` or `unreadable`."""

    text: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Node:
    """A device node: owner, group and mode as numbers; `usable` when this process may read and write it."""

    path: str
    uid: int
    gid: int
    mode: int
    usable: bool


@dataclass
class Sysroot:
    """`root` is "/" or the folder of a staged tree.

    For a bundle, `seen` keeps each text that was read, and `there` each name that was found.
    """

    root: Path = Path("/")
    seen: dict[str, str] = field(default_factory=dict)
    there: set[str] = field(default_factory=set)

    @property
    def live(self) -> bool:
        """Is this the machine we are on?"""
        return self.root == Path("/")

    def read(self, path: str) -> Reading:
        """The text of a file, its first `LIMIT` bytes. A pipe, device or folder is `unreadable`."""
        place = self._inside(path)
        if place is None:
            return Reading(problem="unreadable")
        try:
            # Not blocking: a pipe in place of a file would wait for its writer.
            descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    return Reading(problem="unreadable")
                data = os.read(descriptor, LIMIT)
            finally:
                os.close(descriptor)
        except OSError as error:
            return Reading(problem=_problem(error))
        text = data.decode("utf-8", errors="replace")
        self.seen[path] = text
        return Reading(text)

    def text(self, path: str) -> str | None:
        """The stripped text of a file, None when it cannot be read."""
        reading = self.read(path)
        return None if reading.problem else reading.text.strip()

    def number(self, path: str) -> int | None:
        """A file's only number, None for anything else."""
        return as_number(self.text(path) or "")

    def names(self, folder: str) -> list[str]:
        """The names in a folder, sorted with numbers by value; [] when there is none."""
        place = self._inside(folder)
        if place is None:
            return []
        try:
            with os.scandir(place) as entries:
                found = [entry.name for _, entry in zip(range(MANY), entries, strict=False)]
        except OSError:
            return []
        self.there.update(f"{folder}/{name}" for name in found)
        return sorted(found, key=lambda name: (not name.isdigit(), int(name) if _plain(name) else 0, name))

    def exists(self, path: str) -> bool:
        """Is there anything of that name?"""
        place = self._inside(path)
        found = place is not None and place.exists()
        if found:
            self.there.add(path)
        return found

    def target(self, path: str) -> str:
        """The last part of what a symbolic link leads to, "" when it is none."""
        try:
            return os.path.basename(os.readlink(self.root / path.lstrip("/")))
        except OSError:
            return ""

    def node(self, path: str) -> Node | None:
        """A device node's owner and mode; in a staged tree as its overlay tells."""
        if not self.live:
            return _told(path, self.overlay.get("nodes", {}).get(path))
        try:
            found = os.stat(path)
        except OSError:
            return None
        if not stat.S_ISCHR(found.st_mode):
            return None
        return Node(path, found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), os.access(path, os.R_OK | os.W_OK))

    def node_names(self, folder: str) -> list[str]:
        """The names of the device nodes in a folder below /dev."""
        if self.live:
            return self.names(folder)
        nodes = self.overlay.get("nodes", {})
        return sorted(name.rpartition("/")[2] for name in nodes if name.rpartition("/")[0] == folder)

    @cached_property
    def overlay(self) -> Mapping[str, Any]:
        """What a staged tree tells beside its files; {} for this machine or a damaged one."""
        if self.live:
            return {}
        reading = self.read(OVERLAY)
        try:
            told = json.loads(reading.text)
        except (ValueError, RecursionError):
            return {}
        return told if isinstance(told, dict) and isinstance(told.get("nodes", {}), dict) else {}

    def _inside(self, path: str) -> Path | None:
        """The path below the root, links followed; None for one that leads out of a staged tree."""
        place = self.root / path.lstrip("/")
        if self.live:
            return place
        try:
            real, top = Path(os.path.realpath(place)), Path(os.path.realpath(self.root))
        except (OSError, ValueError):
            return None
        return real if real.is_relative_to(top) else None


def as_number(text: str) -> int | None:
    """A non-negative decimal number of sane length."""
    return int(text) if _plain(text) else None


def _plain(text: str) -> bool:
    return 0 < len(text) <= 20 and text.isascii() and text.isdigit()


def _problem(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "missing"
    return "denied" if error.errno in (errno.EPERM, errno.EACCES) else "unreadable"


def _told(path: str, told: Any) -> Node | None:
    if not isinstance(told, dict):
        return None
    try:
        mode = int(str(told.get("mode", "660")), 8)
        return Node(path, int(told.get("uid", 0)), int(told["gid"]), mode, bool(told.get("usable", True)))
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
