"""Triton's cache with a second place to look, which may be read-only: what the image ships."""

from __future__ import annotations

import json
import os

from triton.runtime.cache import FileCacheManager

from radeon_stack.kernels import shipped


class ShippedToo(FileCacheManager):
    """Finds in TRITON_CACHE_DIR first, then among the shipped kernels; writes into TRITON_CACHE_DIR alone.

    A key is a hash of the kernel's source, its arguments' types, its options and Triton's own files: what has the same
    key is the same.
    """

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        super().__init__(key, override=override, dump=dump)
        root = None if override or dump else shipped.folder()
        self._shipped = root / key if root else None

    def get_file(self, filename: str) -> str | None:
        return super().get_file(filename) or self._shipped_file(filename)

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The files of one kernel, by name: all of them, or None."""
        if found := super().get_group(filename):
            return dict(found)
        listed = self._shipped_file(f"__grp__{filename}")
        if listed is None:
            return None
        with open(listed, encoding="utf-8") as file:
            # Its paths are those of the place where it was built, which the image may have moved.
            files = {name: self._shipped_file(name) for name in json.load(file)["child_paths"]}
        complete = {name: path for name, path in files.items() if path is not None}
        return complete if len(complete) == len(files) else None

    def _shipped_file(self, name: str) -> str | None:
        path = self._shipped / os.path.basename(name) if self._shipped else None
        return str(path) if path and path.is_file() else None
