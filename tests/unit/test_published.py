"""Choosing among published images, and getting one over connections that break."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.errors import CheckError, ImageError, UsageError
from radeon_stack.images.download import fetch_blob
from radeon_stack.images.published import Candidate, Wanted, choose
from radeon_stack.images.references import Repository, is_reference, repository, split
from radeon_stack.images.registry import DOCKER_MANIFEST, Manifest, Registry
from tests.conftest import Cli

RELEASES = ("6.4.4", "7.0.2", "7.1.1", "7.2.4", "7.14")


def published(rocm: str = "7.1.1", gfx: str = "gfx1201", **labels: str) -> Candidate:
    told = {
        "radeon-stack.kind": "train",
        "radeon-stack.key": "k",
        "radeon-stack.rocm": rocm,
        "radeon-stack.gfx": gfx,
        "radeon-stack.platform": f"rocm{rocm}-{gfx}",
        **{f"radeon-stack.{name}": value for name, value in labels.items()},
    }
    manifest = Manifest("sha256:" + "0" * 64, DOCKER_MANIFEST, b"{}")
    return Candidate(f"train-rocm{rocm}-{gfx}-stable", manifest, told)


WANTED = Wanted("train", "gfx1201", "6.16.6")


def test_the_newest_release_that_fits_is_taken_and_every_other_is_told_why_not() -> None:
    """7.14 is newer than 7.2.4, whatever the numbers look like to a sorter."""
    choice = choose(
        [published("7.2.4"), published("7.14"), published(gfx="gfx1200"), published(kind="verify"), published("7.0.2")],
        WANTED,
        RELEASES,
    )
    assert choice.candidate.labels["radeon-stack.rocm"] == "7.14"
    assert "train for gfx1201 with ROCm 7.14" in choice.why
    told = [why for _, why in choice.turned_down]
    assert told == [
        "it is for gfx1200", "it is for verify",
        "train-rocm7.14-gfx1201-stable is newer", "train-rocm7.14-gfx1201-stable is newer",
    ]  # fmt: skip


def test_a_tag_that_looks_right_with_labels_that_are_not_is_turned_down() -> None:
    stranger = published()
    stranger.labels.pop("radeon-stack.key")
    with pytest.raises(ImageError, match=r"no published train image fits gfx1201: .*not one of ours"):
        choose([stranger], WANTED, RELEASES)


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        ("6.16.6", "driver 6.16.6 is among"),
        ("6.12.12", "driver 6.12.12 is among"),
        ("6.16.66", "works when it is within a year"),
        ("6.19.14.31400000", "works when it is within a year"),
        (None, "the kernel's own tells no version"),
    ],
)
def test_a_driver_is_compared_with_those_that_the_release_was_made_for(driver: str | None, says: str) -> None:
    choice = choose([published(drivers="6.12.12,6.14.14,6.16.6")], replace(WANTED, driver=driver), RELEASES)
    assert says in choice.why


def test_an_image_made_for_this_driver_comes_before_a_newer_one() -> None:
    older, newer = published("7.1.1", drivers="6.16.6"), published("7.14", drivers="6.19.4")
    choice = choose([newer, older], WANTED, [*RELEASES, "7.1.1"])
    assert choice.candidate is older
    assert choice.turned_down == ((newer.tag, "it was not made for driver 6.16.6"),)
    assert choose([newer], WANTED, RELEASES).candidate is newer


def test_an_empty_channel_says_so() -> None:
    with pytest.raises(ImageError, match="no image in this channel"):
        choose([], WANTED, RELEASES)


@pytest.mark.parametrize(
    ("text", "host", "name", "rest"),
    [
        ("registry.example.org/a/b:tag", "registry.example.org", "a/b", "tag"),
        ("localhost:5000/a:tag", "localhost:5000", "a", "tag"),
        ("localhost:5000/a@sha256:" + "0" * 64, "localhost:5000", "a", "sha256:" + "0" * 64),
        ("localhost:5000/a:tag@sha256:" + "0" * 64, "localhost:5000", "a", "sha256:" + "0" * 64),
    ],
)
def test_names_are_taken_apart(text: str, host: str, name: str, rest: str) -> None:
    assert split(text) == (Repository(host, name), rest)


@given(st.text(max_size=40))
def test_what_is_no_name_is_refused_and_never_crashes(text: str) -> None:
    try:
        where, rest = split(text)
    except UsageError:
        return
    assert "/" not in rest and ".." not in where.name and "@" not in where.host


@pytest.mark.parametrize(
    "text", ["train", "docker.io/../etc", "host.org/UPPER", "user:pw@host.org/a", "host.org/a b", "/a"]
)
def test_bad_repositories_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no repository"):
        repository(text)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("radeon-stack/train:cpu", True),
        ("train", True),
        ("0a1b2c3d4e5f", True),
        ("sha256:" + "a" * 64, True),
        ("localhost:5000/Me/x", False),
        ("localhost:5000/me/x:1", True),
        ("Registry.example.org/me/x@sha256:" + "a" * 64, True),
        ("[::1]:5000/x", True),
        ("x@sha256:abc", False),
        ("./x", False),
        ("../x", False),
        ("/opt/x", False),
        ("x/", False),
        ("x:", False),
        ("Train", False),
        ("x y", False),
        ("x\n", False),
        ("", False),
    ],
)
def test_an_images_name_is_told_from_what_can_be_none(text: str, fits: bool) -> None:
    assert is_reference(text) is fits


class Breaking(http.server.BaseHTTPRequestHandler):
    """A registry that cuts every answer after `step` bytes, and counts what it was asked for."""

    blob: bytes
    step: int
    ranged = True
    asked: list[str]

    def do_GET(self) -> None:
        start = 0
        wanted = self.headers.get("Range", "")
        type(self).asked.append(wanted)
        if self.ranged and wanted:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(self.blob) - start))
        self.end_headers()
        self.wfile.write(self.blob[start : start + self.step])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def breaking() -> Iterator[tuple[type[Breaking], Registry]]:
    handler = type("Handler", (Breaking,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, Registry(Repository(f"127.0.0.1:{server.server_address[1]}", "radeon"))
        server.shutdown()


def name_of(blob: bytes) -> str:
    return "sha256:" + hashlib.sha256(blob).hexdigest()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radeon_stack.images.download.time.sleep", lambda _: None)


def test_a_blob_goes_on_where_its_connection_broke(breaking: Any, tmp_path: Path) -> None:
    handler, registry = breaking
    handler.blob, handler.step = bytes(range(256)) * 40, 3000
    waits: list[str] = []
    got: list[int] = []
    path = fetch_blob(
        registry, name_of(handler.blob), len(handler.blob), tmp_path,
        told=got.append, waiting=lambda why, seconds: waits.append(why),
    )  # fmt: skip
    assert path.read_bytes() == handler.blob and [p.name for p in tmp_path.iterdir()] == [path.name]
    asked = [wanted for wanted in handler.asked if wanted]
    assert asked == ["bytes=3000-", "bytes=6000-", "bytes=9000-"]
    assert len(waits) == 3 and got == sorted(got) and got[-1] == len(handler.blob)


def test_a_later_call_goes_on_from_what_an_earlier_one_left(breaking: Any, tmp_path: Path) -> None:
    handler, registry = breaking
    handler.blob, handler.step = b"abcdefgh" * 1000, 10**6
    digest = name_of(handler.blob)
    (tmp_path / (digest.replace(":", "-") + ".partial")).write_bytes(handler.blob[:5000])
    fetch_blob(registry, digest, len(handler.blob), tmp_path)
    assert "bytes=5000-" in handler.asked


def test_a_registry_without_ranges_is_read_from_the_start_again(breaking: Any, tmp_path: Path) -> None:
    handler, registry = breaking
    handler.blob, handler.step, handler.ranged = b"abcdefgh" * 1000, 10**6, False
    digest = name_of(handler.blob)
    (tmp_path / (digest.replace(":", "-") + ".partial")).write_bytes(b"x" * 5000)
    assert fetch_blob(registry, digest, len(handler.blob), tmp_path).read_bytes() == handler.blob


def test_other_bytes_than_the_digest_says_are_thrown_away(breaking: Any, tmp_path: Path) -> None:
    handler, registry = breaking
    handler.blob, handler.step = b"evil" * 1000, 10**6
    with pytest.raises(CheckError, match="not what its manifest says"):
        fetch_blob(registry, name_of(b"good" * 1000), 4000, tmp_path)
    assert not list(tmp_path.iterdir())


def test_more_bytes_than_were_said_are_not_written(breaking: Any, tmp_path: Path) -> None:
    handler, registry = breaking
    handler.blob, handler.step = b"x" * (3 << 20), 10**9
    with pytest.raises(CheckError, match="longer than its manifest says"):
        fetch_blob(registry, name_of(b"y"), 10, tmp_path)


def test_it_gives_up_after_its_patience_and_keeps_what_it_has(tmp_path: Path) -> None:
    registry = Registry(Repository("127.0.0.1:1", "radeon"))
    with pytest.raises(ImageError, match=r"does not answer.*0 of 10 bytes are kept.*run it again"):
        fetch_blob(registry, name_of(b"y"), 10, tmp_path, patience=0)


class Lying(Breaking):
    """A registry whose answers are whatever is set."""

    answers: dict[str, tuple[int, dict[str, str], bytes]]

    def do_GET(self) -> None:
        for part, (code, headers, body) in self.answers.items():
            if part in self.path:
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def lying() -> Iterator[tuple[type[Lying], Registry]]:
    handler = type("Handler", (Lying,), {"answers": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, Registry(Repository(f"127.0.0.1:{server.server_address[1]}", "radeon"))
        server.shutdown()


def test_a_manifest_that_is_not_its_digest_or_is_malformed_is_refused(lying: Any) -> None:
    handler, registry = lying
    typed = {"Content-Type": DOCKER_MANIFEST}
    handler.answers = {"/manifests/": (200, typed, b"{}")}
    with pytest.raises(CheckError, match="the registry gave sha256:"):
        registry.manifest("sha256:" + "0" * 64)
    bodies: list[Any] = [{}, [], {"config": {"digest": "sha256:../../x", "size": 1}, "layers": []}, {"config": 3}]
    for body in bodies:
        handler.answers = {"/manifests/": (200, typed, json.dumps(body).encode())}
        with pytest.raises(CheckError, match="malformed"):
            registry.manifest("tag")
    handler.answers = {"/manifests/": (200, typed, b"x" * (5 << 20))}
    with pytest.raises(CheckError, match="more than"):
        registry.manifest("tag")


def test_a_password_is_not_sent_to_whom_a_registry_points_at(lying: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, registry = lying
    monkeypatch.setattr(Registry, "credentials", lambda self: ("me", "hunter2"))
    far = Registry(Repository("registry.example.org", "radeon"))
    with pytest.raises(ImageError, match="in the clear"):
        far._answer('Bearer realm="http://elsewhere.example.org/token",service="s"', None)
    assert registry.tags() == []


def test_no_registry_is_known_until_one_is_set(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RADEON_STACK_REGISTRY", raising=False)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    assert cli("pull").code == 3  # without an engine there is nowhere to put it
    assert cli("image", "push", "x").code == 2
