"""Wheels by key in a registry: one machine compiles, the others take. An OCI artifact under `wheel-<name>-<key>`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from radeon_stack.errors import CheckError
from radeon_stack.images.download import fetch_blob
from radeon_stack.images.keys import digest as hex_digest
from radeon_stack.images.publishing import EMPTY, EMPTY_TYPE
from radeon_stack.images.registry import OCI_MANIFEST, Registry
from radeon_stack.images.store import StoredWheels, WheelStore

ARTIFACT_TYPE = "application/vnd.radeon-stack.wheels.v1"
WHEEL_TYPE = "application/zip"
TITLE = "org.opencontainers.image.title"
RECORD = "org.radeon-stack.wheel"


def wheel_tag(name: str, key: str) -> str:
    return f"wheel-{name}-{key}"


def push_wheels(registry: Registry, stored: StoredWheels) -> str:
    """Upload the wheels of a key; the digest of their manifest. What is there already is not sent again."""
    layers = [
        {
            "mediaType": WHEEL_TYPE,
            "digest": registry.put_blob(file.read_bytes()),
            "size": file.stat().st_size,
            "annotations": {TITLE: file.name},
        }
        for file in stored.files
    ]
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": EMPTY_TYPE, "digest": registry.put_blob(EMPTY), "size": len(EMPTY)},
        "layers": layers,
        "annotations": {RECORD: json.dumps(stored.record, sort_keys=True)},
    }
    raw = json.dumps(manifest, sort_keys=True).encode()
    registry.put_manifest(wheel_tag(stored.record["name"], stored.record["key"]), OCI_MANIFEST, raw)
    return f"sha256:{hex_digest(raw)}"


def fetch_wheels(registry: Registry, store: WheelStore, name: str, key: str) -> StoredWheels | None:
    """The wheels of a key from a registry, into the store; None when it has none. CheckError when they are others."""
    manifest = registry.manifest(wheel_tag(name, key))
    if manifest is None:
        return None
    where = f"{registry.repository}:{wheel_tag(name, key)}"
    try:
        record = json.loads(manifest.content["annotations"][RECORD])
        names = {layer["annotations"][TITLE]: layer for layer in manifest.layers}
        if record["name"] != name or record["key"] != key or set(record["files"]) != set(names):
            raise ValueError("another wheel's")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckError("its record is malformed", where=where) from error
    if any("/" in file or not file.endswith(".whl") for file in names):
        raise CheckError("it names a file that is no wheel", where=where)
    with tempfile.TemporaryDirectory() as folder:
        for file, layer in names.items():
            if layer["digest"] != f"sha256:{record['files'][file]}":
                raise CheckError("its record and its files differ", where=where)
            blob = fetch_blob(registry, layer["digest"], int(layer["size"]), Path(folder))
            blob.rename(Path(folder) / file)
        about = {field: value for field, value in record.items() if field not in ("name", "key", "files")}
        return store.put(name, key, Path(folder), about)
