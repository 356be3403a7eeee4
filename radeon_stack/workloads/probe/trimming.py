"""The trim stage: what other gfx need leaves the image."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from radeon_stack.codeobjects.trim import removals
from radeon_stack.errors import Exit

NOT_OURS = ("proc", "sys", "dev", "mnt", "run", "tmp")


def trim_image(folder: Path, root: Path = Path("/")) -> int:
    """Delete what an image for its gfx does not need, and write down what that was: `trim.json`."""
    description = json.loads((folder / "image.json").read_text(encoding="utf-8"))
    if description["gfx"] is None:
        print("trim: an image for the CPU has no kernels", file=sys.stderr)
        return Exit.OK
    gone = removals(_files(root), description["gfx"], description["rocm_short"])
    for one in gone:
        (root / one.path).unlink()
    by_library: dict[str, int] = {}
    for one in gone:
        by_library[one.library] = by_library.get(one.library, 0) + one.size
    record = {"files": len(gone), "bytes": sum(one.size for one in gone), "by_library": by_library}
    (folder / "trim.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"trim: {record['files']} files, {record['bytes']} bytes: {by_library}", file=sys.stderr)
    return Exit.OK


def _files(root: Path) -> Iterator[tuple[str, int]]:
    """Regular files of the root file system and their bytes; links and other file systems are left alone."""
    for place, folders, names in os.walk(root):
        if Path(place) == root:
            folders[:] = [name for name in folders if name not in NOT_OURS]
        for name in names:
            path = Path(place) / name
            if path.is_file() and not path.is_symlink():
                yield str(path.relative_to(root)), path.stat().st_size
