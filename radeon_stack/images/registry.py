"""A client for a registry's HTTP interface, where the engine has none: tags, manifests, labels, ranged blobs, mounts.

Source: the OCI Distribution Specification 1.1. Credentials are Docker's own (config.json and its helpers); a private CA
is looked for where Docker looks, /etc/docker/certs.d. Everything a registry says is untrusted: sizes are bounded and
each content is held against its digest. (ORAS' client was looked at: no ranged blobs, no mounts, no CA of one's own.)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlparse

import requests

from radeon_stack.errors import CheckError, ImageError
from radeon_stack.images.references import DIGEST, Repository

CERTIFICATES = Path("/etc/docker/certs.d")
TIMEOUT = (10, 60)  # seconds to connect, seconds without a byte
MANIFEST_LIMIT = 4 << 20  # the specification asks registries for no more
CONFIG_LIMIT = 8 << 20
TAGS_LIMIT = 10_000
CHUNK = 1 << 20

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
ACCEPT = ", ".join((OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX, DOCKER_LIST))
CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Manifest:
    """A manifest as its registry gave it: bytes that hash to the digest."""

    digest: str
    media_type: str
    raw: bytes

    @cached_property
    def content(self) -> dict[str, Any]:
        found = json.loads(self.raw)
        return found if isinstance(found, dict) else {}

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Descriptors: digest, size in bytes, mediaType."""
        return list(self.content.get("layers", ()))

    @property
    def download(self) -> int:
        """Bytes of all layers, compressed as they are."""
        return sum(int(layer["size"]) for layer in self.layers)


class Registry:
    """One repository in a registry."""

    def __init__(self, repository: Repository, certificates: Path = CERTIFICATES) -> None:
        self.repository = repository
        self._session = requests.Session()
        authority = certificates / repository.host / "ca.crt"
        # Named here and not left to the environment: a session's own `verify` would lose to REQUESTS_CA_BUNDLE.
        self._verify: str | bool = (
            str(authority)
            if authority.is_file()
            else os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or True
        )
        self._authorization: dict[str, str] = {}

    def tags(self) -> list[str]:
        """All tags; [] when the repository does not exist."""
        found: list[str] = []
        url = self._url("tags/list?n=1000")
        while url and len(found) < TAGS_LIMIT:
            with self._request("GET", url, missing_ok=True) as answer:
                if answer is None:
                    return found
                found += [str(tag) for tag in json.loads(_bounded(answer, MANIFEST_LIMIT)).get("tags") or ()]
                following = answer.links.get("next", {}).get("url")
                url = urljoin(url, following) if following else ""
        return found

    def manifest(self, reference: str) -> Manifest | None:
        """The manifest of a tag or digest, of amd64 where it is an index; None when there is none."""
        with self._request("GET", self._url(f"manifests/{reference}"), {"Accept": ACCEPT}, missing_ok=True) as answer:
            if answer is None:
                return None
            raw = _bounded(answer, MANIFEST_LIMIT)
            media_type = answer.headers.get("Content-Type", "").partition(";")[0]
        digest = _digest(raw)
        if DIGEST.match(reference) and digest != reference:
            raise CheckError(f"the registry gave {digest}", where=f"{self.repository}@{reference}")
        found = Manifest(digest, media_type, raw)
        try:
            if media_type in (OCI_INDEX, DOCKER_LIST):
                inner = [m["digest"] for m in found.content["manifests"] if _is_amd64(m.get("platform", {}))]
                return self.manifest(inner[0]) if inner and DIGEST.match(inner[0]) else None
            _check_descriptors(found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckError("the manifest is malformed", where=f"{self.repository}@{digest}") from error
        return found

    def index(self, tag: str) -> dict[str, Any]:
        """An index as it is; {} when there is none."""
        with self._request("GET", self._url(f"manifests/{tag}"), {"Accept": OCI_INDEX}, missing_ok=True) as answer:
            found = json.loads(_bounded(answer, MANIFEST_LIMIT)) if answer is not None else {}
        return found if isinstance(found, dict) else {}

    def config(self, manifest: Manifest) -> dict[str, Any]:
        """The image's configuration, with its labels. CheckError when it is not what the manifest names."""
        digest = str(manifest.content["config"]["digest"])
        found = json.loads(self.read_blob(digest, CONFIG_LIMIT))
        if not isinstance(found, dict):
            raise CheckError("the configuration is malformed", where=f"{self.repository}@{digest}")
        return found

    def read_blob(self, digest: str, limit: int) -> bytes:
        """A small blob, held against its digest."""
        with self._request("GET", self._url(f"blobs/{digest}")) as answer:
            assert answer is not None  # noqa: S101 - only a missing_ok request gives None
            raw = _bounded(answer, limit)
        if _digest(raw) != digest:
            raise CheckError("the registry gave other bytes", where=f"{self.repository}@{digest}")
        return raw

    @contextmanager
    def blob_from(self, digest: str, offset: int) -> Iterator[tuple[bool, Iterator[bytes]]]:
        """A blob's bytes from an offset on: whether the registry kept to the offset, and the bytes."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self._request("GET", self._url(f"blobs/{digest}"), headers) as answer:
            assert answer is not None  # noqa: S101
            yield answer.status_code == requests.codes.partial_content, _as_it_comes(answer)

    def has_blob(self, digest: str) -> bool:
        with self._request("HEAD", self._url(f"blobs/{digest}"), missing_ok=True) as answer:
            return answer is not None

    def mount(self, digest: str, source: Repository) -> None:
        """Take over a blob from another repository of the registry, without moving it."""
        if self.has_blob(digest):
            return
        url = self._url(f"blobs/uploads/?mount={digest}&from={source.name}")
        with self._request("POST", url, also=source) as answer:
            assert answer is not None  # noqa: S101
            if answer.status_code != requests.codes.created:
                raise ImageError("the registry does not mount blobs across repositories", where=str(self.repository))

    def put_blob(self, data: bytes) -> str:
        """Upload a small blob; its digest."""
        digest = _digest(data)
        if self.has_blob(digest):
            return digest
        with self._request("POST", self._url("blobs/uploads/")) as answer:
            assert answer is not None  # noqa: S101
            location = urljoin(self._url(""), answer.headers["Location"])
        separator = "&" if "?" in location else "?"
        headers = {"Content-Type": "application/octet-stream"}
        with self._request("PUT", f"{location}{separator}digest={digest}", headers, data=data):
            return digest

    def put_manifest(self, reference: str, media_type: str, raw: bytes) -> str:
        """Write a manifest under a tag, or under its digest alone; its digest."""
        with self._request("PUT", self._url(f"manifests/{reference}"), {"Content-Type": media_type}, data=raw):
            return _digest(raw)

    @cached_property
    def _root(self) -> str:
        """https, or plain HTTP where the registry is on this machine and speaks nothing else."""
        secure = f"https://{self.repository.host}/v2/"
        if not self.repository.loopback:
            return secure
        try:
            self._session.get(secure, timeout=TIMEOUT, verify=self._verify)
        except requests.exceptions.SSLError as error:
            if "WRONG_VERSION_NUMBER" in str(error) or "record layer" in str(error):
                return f"http://{self.repository.host}/v2/"
        except requests.exceptions.RequestException:
            return f"http://{self.repository.host}/v2/"
        return secure

    @property
    def plain(self) -> bool:
        """It speaks HTTP alone: what other programs have to be told."""
        return self._root.startswith("http://")

    @property
    def _login(self) -> str:
        return f"docker login {self.repository.host}"

    def _url(self, path: str) -> str:
        return f"{self._root}{self.repository.name}/{path}"

    @contextmanager
    def _request(
        self,
        method: str,
        url: str,
        headers: dict[str, str] | None = None,
        *,
        data: bytes | None = None,
        missing_ok: bool = False,
        also: Repository | None = None,
    ) -> Iterator[requests.Response | None]:
        try:
            answer = self._send(method, url, headers or {}, data)
            if answer.status_code == requests.codes.unauthorized:
                self._authorization = self._answer(answer.headers.get("Www-Authenticate", ""), also)
                answer = self._send(method, url, headers or {}, data)
            with answer:
                if answer.status_code == requests.codes.not_found and missing_ok:
                    yield None
                    return
                self._complain(answer)
                yield answer
        except requests.exceptions.RequestException as error:
            raise ImageError(f"the registry does not answer: {_reason(error)}", where=str(self.repository)) from error

    def _send(self, method: str, url: str, headers: dict[str, str], data: bytes | None) -> requests.Response:
        # Only the registry itself gets what proves who we are; requests drops it where another host is redirected to.
        mine = self._authorization if urlparse(url).netloc == self.repository.host else {}
        return self._session.request(
            method, url, headers={**headers, **mine}, data=data, stream=True, timeout=TIMEOUT, verify=self._verify
        )

    def _answer(self, challenge: str, also: Repository | None) -> dict[str, str]:
        """What the registry asks for: basic credentials, or a token for them."""
        scheme, _, rest = challenge.partition(" ")
        credentials = self.credentials()
        if scheme.lower() == "basic":
            if credentials is None:
                raise ImageError(
                    "the registry asks for a password",
                    where=str(self.repository),
                    remedy=f"docker login {self.repository.host}",
                )
            basic = requests.Request("GET", self._root, auth=credentials).prepare().headers["Authorization"]
            return {"Authorization": str(basic)}
        fields = dict(CHALLENGE.findall(rest))
        realm = fields.get("realm", "")
        if scheme.lower() != "bearer" or not realm:
            raise ImageError("the registry asks for what we do not know", where=str(self.repository))
        if credentials and not realm.startswith("https://") and not self.repository.loopback:
            raise ImageError("the registry wants the password sent in the clear", where=str(self.repository))
        scopes = [fields["scope"]] if "scope" in fields else []
        scopes += [f"repository:{also.name}:pull"] if also else []
        answer = self._session.get(
            realm,
            params={"service": fields.get("service", ""), "scope": scopes},
            auth=credentials,
            timeout=TIMEOUT,
            verify=self._verify,
        )
        self._complain(answer)
        told = answer.json()
        return {"Authorization": f"Bearer {told.get('token') or told.get('access_token')}"}

    def credentials(self) -> tuple[str, str] | None:
        """User and password: Docker's own for this registry, from its config.json or the helper named there."""
        import docker.auth as auth

        found = auth.resolve_authconfig(auth.load_config(), registry=self.repository.host)
        if not found:
            return None
        name, password = found.get("Username") or found.get("username"), found.get("Password") or found.get("password")
        return (str(name), str(password)) if name and password else None

    def _complain(self, answer: requests.Response) -> None:
        code = answer.status_code
        if code in (requests.codes.unauthorized, requests.codes.forbidden):
            raise ImageError("the registry refuses us", where=str(self.repository), remedy=self._login)
        if code == requests.codes.not_found:
            raise ImageError("there is no such thing in the registry", where=urlparse(answer.url).path)
        if code >= 400:
            raise ImageError(f"the registry answers {code}", where=urlparse(answer.url).path)


def _is_amd64(platform: Any) -> bool:
    return isinstance(platform, dict) and platform.get("architecture") == "amd64" and platform.get("os") == "linux"


def _check_descriptors(manifest: Manifest) -> None:
    for descriptor in (manifest.content["config"], *manifest.layers):
        if not DIGEST.match(descriptor["digest"]) or not isinstance(descriptor["size"], int) or descriptor["size"] < 0:
            raise ValueError(descriptor)


def _bounded(answer: requests.Response, limit: int) -> bytes:
    """The body, unless it is longer than it may be."""
    raw = b""
    for chunk in answer.iter_content(CHUNK):
        raw += chunk
        if len(raw) > limit:
            raise CheckError(f"the registry gave more than {limit} bytes", where=urlparse(answer.url).path)
    return raw


def _as_it_comes(answer: requests.Response) -> Iterator[bytes]:
    """Each piece once it is there: what waits for a full chunk is lost when the connection breaks."""
    while chunk := answer.raw.read1(CHUNK, decode_content=False):
        yield chunk


def _digest(raw: bytes) -> str:
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def _reason(error: BaseException) -> str:
    """The innermost reason, without addresses of objects."""
    seen = error
    while seen.__cause__ or seen.__context__:
        seen = seen.__cause__ or seen.__context__  # type: ignore[assignment]
    return re.sub(r"<[^>]*>:? ?", "", str(seen))[:200] or type(seen).__name__
