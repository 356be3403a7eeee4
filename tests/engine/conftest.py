"""Fixtures of the engine: images built as a user builds them, a second machine, a registry."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import ROOT, wait_for
from tests.engine.debian import bootstrap, impossible

# What must be found in no layer: it is in every secret that the image below is built with.
CANARY = "canary-3f9d1c7e"
PASSWORD = "hunter2-5b1e"  # noqa: S105 - of a registry that lives as long as a test
# bcrypt of it, which is all that the registry takes.
HTPASSWD = "radeon:$2b$05$abcdefghijklmnopqrstuuXQDSQKEQSm4Kdybl91cFd1wNAF8VX1W\n"


def missing(what: str) -> None:
    """Skip, saying what is missing; where an engine is owed (CI), nothing may be missing."""
    if os.environ.get("RADEON_STACK_NEED_ENGINE"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def canaries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The machine's own settings of pip, its CA and a proxy rule, each with a word that can be searched for."""
    from radeon_stack.images.builder import default_ca, default_pip_conf

    folder = tmp_path_factory.mktemp("secrets")
    conf, ca = default_pip_conf(dict(os.environ)), default_ca(dict(os.environ))
    told = {"NO_PROXY": f"{CANARY}.example.org"}
    (folder / "pip.conf").write_text((conf.read_text() if conf else "") + f"\n# {CANARY}\n")
    told["PIP_CONFIG_FILE"] = str(folder / "pip.conf")
    if ca:
        (folder / "ca.pem").write_text(f"# {CANARY}\n" + ca.read_text())
        told["SSL_CERT_FILE"] = str(folder / "ca.pem")
    return told


@pytest.fixture(scope="session")
def image(canaries: dict[str, str]) -> str:
    """The CPU training image, built as a user builds it; what did not change is not built again."""
    done = subprocess.run(
        ["make", "image", "ARCH=cpu", "BUILD_NETWORK=host"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **canaries},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return "radeon-stack/train:cpu"


@pytest.fixture(scope="session")
def hip_base() -> str:
    """The stand-in base with Debian's HIP toolchain."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "stand_in_base.py"), "--hip"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.split()[-1]


@pytest.fixture(scope="session")
def trixie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian 13 in a folder: podman 5, its quadlet generator, and docker compose."""
    if why := impossible():
        missing(why)
    packages = ("podman", "crun", "uidmap", "catatonit", "docker-compose")
    return bootstrap("trixie", tmp_path_factory.mktemp("trixie"), *packages)


@pytest.fixture
def another_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a machine with an engine and a home of its own."""
    root = tmp_path_factory.mktemp("machine")
    tool = [sys.executable, str(ROOT / "tools" / "engine.py")]
    started = subprocess.run([*tool, "start", "--root", str(root)], capture_output=True, text=True, check=False)
    if started.returncode == 3:
        missing(started.stderr.strip())
    (root / "home").mkdir()
    try:
        yield {**os.environ, "DOCKER_HOST": started.stdout.strip(), "RADEON_STACK_HOME": str(root / "home")}
    finally:
        subprocess.run([*tool, "stop", "--root", str(root)], check=True)
        shutil.rmtree(root / "data", ignore_errors=True)


@dataclass
class RealRegistry:
    """Debian's docker-registry on a port of its own, with TLS and a password."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def host(self) -> str:
        return f"localhost:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["docker-registry", "serve", str(self.folder / "config.yml")], stdout=log, stderr=log
            )
        wait_for(self._answers, seconds=30, what="the registry")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        import socket

        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    if shutil.which("docker-registry") is None:
        missing("docker-registry is not installed (Debian: apt-get install docker-registry)")
    if os.geteuid() != 0:
        missing("the engine looks for a registry's CA in /etc/docker/certs.d, which needs root")
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("registry")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    (folder / "htpasswd").write_text(HTPASSWD)
    (folder / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {folder / 'data'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}', tls: {{certificate: {folder / 'cert.pem'}, key: {folder / 'key.pem'}}}}}\n"
        f"auth: {{htpasswd: {{realm: test, path: {folder / 'htpasswd'}}}}}\n"
    )
    made = RealRegistry(folder, port)
    certificates = Path("/etc/docker/certs.d") / made.host
    certificates.mkdir(parents=True)
    shutil.copy(folder / "cert.pem", certificates / "ca.crt")
    try:
        made.start()
        yield made
    finally:
        made.kill()
        shutil.rmtree(certificates)
