"""Push by digest, then tags; a channel is moved by hand, onto what has its verification and its bill of materials."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from radeon_stack.errors import CheckError, ImageError, UsageError
from radeon_stack.host.engines import client
from radeon_stack.images.keys import digest as hex_digest
from radeon_stack.images.labels import KEY, KIND, PLATFORM
from radeon_stack.images.published import SBOM_TYPE, STABLE, Candidate, candidate
from radeon_stack.images.references import Repository
from radeon_stack.images.registry import OCI_INDEX, OCI_MANIFEST, Registry

PUSH_SECONDS = 3600
EMPTY = b"{}"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
INCOMING = "-incoming"
RECORD = "/etc/radeon-stack/build.json"
RECORD_LIMIT = 16 << 20


@dataclass(frozen=True)
class Published:
    """Where an image now is."""

    digest: str
    tag: str
    sbom: str
    size: int
    """Bytes of its layers, compressed."""


def push(image: Any, repository: Repository, told: Callable[[str, int, int], None]) -> Published:
    """Push a verified image of ours: by digest, with its bill of materials, then under its immutable tag.

    The engine pushes only under a tag, so it pushes into `<name>-incoming`; from there the repository takes over the
    blobs, and gets the manifest by digest. `told` takes a layer's id, bytes done and in all.
    """
    labels = image.labels
    tag = immutable_tag(labels)
    incoming = Repository(repository.host, repository.name + INCOMING)
    registry = Registry(repository)
    digest = _engine_push(image, incoming, labels[KEY], told)
    manifest = Registry(incoming).manifest(digest)
    if manifest is None or manifest.content["config"]["digest"] != image.id:
        raise CheckError("the registry holds another image than was pushed", where=f"{incoming}@{digest}")
    for blob in (manifest.content["config"], *manifest.layers):
        registry.mount(blob["digest"], incoming)
    registry.put_manifest(digest, manifest.media_type, manifest.raw)
    there = registry.manifest(tag)
    if there is not None and there.digest != digest:
        raise CheckError(
            f"the tag is {there.digest}, and immutable",
            where=f"{repository}:{tag}",
            remedy="what differs?",
        )
    sbom = attach_sbom(registry, digest, manifest.media_type, len(manifest.raw), read_record(image))
    registry.put_manifest(tag, manifest.media_type, manifest.raw)
    return Published(digest, tag, sbom, manifest.download)


def promote(registry: Registry, reference: str, channel: str = STABLE) -> tuple[str, str | None, str]:
    """Move a channel onto an image: its tag, the digest it had, and the one it has now."""
    found = published(registry, reference)
    if _referrers(registry, found.manifest.digest) == []:
        raise CheckError(
            "it has no bill of materials: it was not published by `image push`",
            where=f"{registry.repository}@{found.manifest.digest}",
        )
    tag = channel_tag(found.labels, channel)
    before = registry.manifest(tag)
    registry.put_manifest(tag, found.manifest.media_type, found.manifest.raw)
    return tag, before.digest if before else None, found.manifest.digest


def published(registry: Registry, reference: str) -> Candidate:
    """An image of ours by tag or digest. ImageError when there is none, UsageError when it is not ours."""
    found = candidate(registry, reference)
    if found is None:
        raise ImageError("there is no such image", where=f"{registry.repository}:{reference}")
    if not {KEY, KIND, PLATFORM} <= found.labels.keys():
        raise UsageError(
            "it is not an image of ours: its labels are missing", where=f"{registry.repository}:{reference}"
        )
    return found


def immutable_tag(labels: dict[str, str]) -> str:
    """`train-rocm7.1.1-gfx1201-<key>`. UsageError for an image that is not ours."""
    try:
        return f"{labels[KIND]}-{labels[PLATFORM]}-{labels[KEY]}"
    except KeyError as error:
        raise UsageError(
            f"it is not an image of ours: no label {error.args[0]}", remedy="build it: radeon-stack image build"
        ) from error


def channel_tag(labels: dict[str, str], channel: str) -> str:
    return f"{labels[KIND]}-{labels[PLATFORM]}-{channel}"


def read_record(image: Any) -> dict[str, Any]:
    """The record that the image's verify stage wrote. CheckError when it has none: it was never verified."""
    from docker.errors import NotFound

    container = client().containers.create(image.id, command=["true"])
    try:
        with tempfile.TemporaryFile() as spool:
            for chunk in container.get_archive(RECORD)[0]:
                spool.write(chunk)
                if spool.tell() > RECORD_LIMIT:
                    raise CheckError(f"its record is above {RECORD_LIMIT} bytes", where=RECORD)
            spool.seek(0)
            with tarfile.open(fileobj=spool) as archive:
                member = archive.extractfile(archive.getmembers()[0])
                record: dict[str, Any] = json.loads(member.read() if member else b"")
                return record
    except (tarfile.TarError, ValueError, IndexError) as error:
        raise CheckError("its record is malformed", where=RECORD) from error
    except NotFound as error:
        raise CheckError("it has no record of its build: it was never verified", where=RECORD) from error
    finally:
        container.remove(force=True)


def attach_sbom(registry: Registry, digest: str, media_type: str, size: int, record: dict[str, Any]) -> str:
    """A CycloneDX document that refers to an image; the digest of its manifest.

    Registries of before OCI 1.1 keep no referrers: the specification's fallback is an index under the tag
    `sha256-<digest>`, which newer ones take too.
    """
    from radeon_stack.images.sbom import cyclonedx

    document = cyclonedx(record, digest)
    layer = {"mediaType": SBOM_TYPE, "digest": registry.put_blob(document), "size": len(document)}
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": SBOM_TYPE,
        "config": {"mediaType": EMPTY_TYPE, "digest": registry.put_blob(EMPTY), "size": len(EMPTY)},
        "layers": [layer],
        "subject": {"mediaType": media_type, "digest": digest, "size": size},
    }
    raw = json.dumps(manifest, sort_keys=True).encode()
    name = f"sha256:{hex_digest(raw)}"
    registry.put_manifest(name, OCI_MANIFEST, raw)
    referrer = {"mediaType": OCI_MANIFEST, "digest": name, "size": len(raw), "artifactType": SBOM_TYPE}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [referrer]}
    registry.put_manifest(_referrers_tag(digest), OCI_INDEX, json.dumps(index, sort_keys=True).encode())
    return name


def _referrers(registry: Registry, digest: str) -> list[str]:
    raw = registry.index(_referrers_tag(digest))
    return [str(one.get("digest")) for one in raw.get("manifests", []) if one.get("artifactType") == SBOM_TYPE]


def _referrers_tag(digest: str) -> str:
    return digest.replace(":", "-")


def _engine_push(image: Any, incoming: Repository, key: str, told: Callable[[str, int, int], None]) -> str:
    """The digest under which the engine pushed it."""
    image.tag(str(incoming), tag=key)
    digest = ""
    try:
        api = client(timeout=PUSH_SECONDS).api
        for line in api.push(str(incoming), tag=key, stream=True, decode=True):
            if error := line.get("error"):
                raise ImageError(f"the engine did not push it: {error}", where=str(incoming))
            if detail := line.get("progressDetail"):
                told(str(line.get("id", "")), int(detail.get("current", 0)), int(detail.get("total", 0)))
            digest = (line.get("aux") or {}).get("Digest", digest)
    finally:
        client().images.remove(f"{incoming}:{key}", noprune=True)
    if not digest:
        raise ImageError("the engine pushed it, and told no digest", where=str(incoming))
    return digest
