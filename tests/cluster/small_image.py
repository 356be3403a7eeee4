"""A real image of one program, in a real registry: made and pushed with our own client, so that it takes no engine."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from radeon_stack.images.references import repository
from radeon_stack.images.registry import OCI_MANIFEST, Registry
from tests.conftest import wait_for

COMMANDS = (
    *("sh", "cat", "df", "echo", "env", "grep", "head", "id", "kill", "ls", "mkdir", "mount"),
    *("ps", "rm", "sleep", "test", "touch", "tr", "true", "uname", "wc"),
)
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
CONFIG = "application/vnd.oci.image.config.v1+json"
FOLDERS = ("bin", "usr", "usr/bin", "etc", "proc", "sys", "dev", "tmp", "root", "var", "run")


@contextmanager
def open_registry(folder: Path, port: int = 0, host: str = "127.0.0.1") -> Iterator[str]:
    """Debian's docker-registry, plain, for whoever is on this machine: its `host:port`."""
    if not port:
        with socket.socket() as free:
            free.bind((host, 0))
            port = free.getsockname()[1]
    (folder / "registry.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder / 'blobs'}}}}}\n"
        f"http: {{addr: '{host}:{port}'}}\n"
    )
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(folder / "registry.yml")], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        wait_for(lambda: _answers(host, port), seconds=30, what="the registry")
        yield f"{host}:{port}"
    finally:
        process.kill()
        process.wait()


def push_small_image(name: str, tag: str, labels: Mapping[str, str]) -> str:
    """Push busybox as an image `name:tag` (host and all); its digest reference."""
    layer = _layer()
    packed = gzip.compress(layer, mtime=0)
    registry = Registry(repository(name))
    config = {
        "architecture": "amd64",
        "os": "linux",
        "created": "2026-01-01T00:00:00Z",
        "config": {
            "Env": ["PATH=/usr/bin:/bin", "FROM_THE_IMAGE=yes"],
            "Entrypoint": ["/bin/false"],
            "Labels": dict(labels),
        },
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        "history": [{"created": "2026-01-01T00:00:00Z", "created_by": "a test"}],
    }
    raw_config = json.dumps(config).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": CONFIG, "digest": registry.put_blob(raw_config), "size": len(raw_config)},
            "layers": [{"mediaType": LAYER, "digest": registry.put_blob(packed), "size": len(packed)}],
        }
    ).encode()
    return f"{name}@{registry.put_manifest(tag, OCI_MANIFEST, manifest)}"


def _layer() -> bytes:
    program = Path(shutil.which("busybox") or "/bin/busybox").read_bytes()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in FOLDERS:
            archive.addfile(_info(name, tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755))
        archive.addfile(_info("bin/busybox", tarfile.REGTYPE, 0o755, len(program)), io.BytesIO(program))
        for name in COMMANDS:
            link = _info(f"{'usr/bin' if name == 'env' else 'bin'}/{name}", tarfile.SYMTYPE, 0o777)
            link.linkname = "/bin/busybox"
            archive.addfile(link)
        for name, text in (("passwd", "root:x:0:0:root:/root:/bin/sh\n"), ("group", "root:x:0:\n")):
            archive.addfile(_info(f"etc/{name}", tarfile.REGTYPE, 0o644, len(text)), io.BytesIO(text.encode()))
    return out.getvalue()


def _info(name: str, kind: bytes, mode: int, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size = kind, mode, size
    return info


def _digest(raw: bytes) -> str:
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def _answers(host: str, port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex((host, port)) == 0
