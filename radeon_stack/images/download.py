"""Blobs to disk, over connections that break: each goes on where it was cut, and is held to its digest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from radeon_stack.checksums import sum_of
from radeon_stack.errors import CheckError, ImageError, MachineError
from radeon_stack.images.registry import Registry

PATIENCE_SECONDS = 300.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 30.0
CHUNK = 1 << 20

Told = Callable[[int], None]
"""Takes the bytes a blob has so far."""


def fetch_blob(
    registry: Registry,
    digest: str,
    size: int,
    folder: Path,
    *,
    told: Told = lambda _: None,
    waiting: Callable[[str, float], None] = lambda why, seconds: None,
    patience: float = PATIENCE_SECONDS,
) -> Path:
    """The blob in `folder`, under its digest. Gives up after `patience` seconds without a byte.

    What a broken attempt left is kept and continued, in this call or a later one. CheckError when the whole does not
    hash to its digest (it is then removed), ImageError when the registry stays away.
    """
    path = folder / digest.replace(":", "-")
    if path.is_file():
        told(size)
        return path
    partial = path.with_name(path.name + ".partial")
    last_byte, wait = time.monotonic(), FIRST_WAIT_SECONDS
    while True:
        had = _size(partial)
        try:
            if had < size:
                _continue(registry, digest, size, partial, told)
            break
        except ImageError as error:
            if _size(partial) > had:
                last_byte, wait = time.monotonic(), FIRST_WAIT_SECONDS
            if time.monotonic() - last_byte + wait > patience:
                raise ImageError(
                    f"{error.what}; {_size(partial)} of {size} bytes are kept",
                    where=error.where,
                    remedy="run it again: it goes on from there",
                ) from error
            waiting(error.what, wait)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
    if _size(partial) != size or f"sha256:{sum_of(partial)}" != digest:
        partial.unlink()
        raise CheckError("a layer is not what its manifest says", where=f"{registry.repository}@{digest}")
    os.replace(partial, path)
    return path


def _continue(registry: Registry, digest: str, size: int, partial: Path, told: Told) -> None:
    """One attempt, from where the file ends. ImageError when it breaks."""
    import requests
    from urllib3.exceptions import HTTPError

    offset = _size(partial)
    try:
        with registry.blob_from(digest, offset) as (ranged, chunks), partial.open("ab") as file:
            if not ranged:
                file.truncate(0)
            done = offset if ranged else 0
            for chunk in chunks:
                done += len(chunk)
                if done > size:
                    raise CheckError(
                        "a layer is longer than its manifest says", where=f"{registry.repository}@{digest}"
                    )
                file.write(chunk)
                told(done)
            file.flush()
            os.fsync(file.fileno())
    except (requests.RequestException, HTTPError) as error:
        raise ImageError("the connection broke", where=str(registry.repository)) from error
    except OSError as error:
        raise MachineError(f"cannot write: {error.strerror}", where=str(partial)) from error
    if _size(partial) < size:
        raise ImageError("the connection ended early", where=str(registry.repository))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
