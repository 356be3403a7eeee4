"""Builds a context folder with BuildKit through the docker command line: the SDK has no BuildKit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from radeon_stack.errors import BuildError, MachineError
from radeon_stack.host.engines import address

CA_VARIABLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
PROBE_SECONDS = 20


@dataclass(frozen=True)
class BuildSettings:
    """What this machine adds to a build: secrets by file, never by value."""

    ca: Path | None = None
    pip_conf: Path | None = None
    network: str = "default"
    no_cache: bool = False


def building_client() -> str:
    """The first docker client on PATH that builds with BuildKit; a newer one may lack its buildx plugin."""
    tried = []
    for client in _clients():
        answer = subprocess.run(
            [client, "build", "--help"], env=_environment(), capture_output=True, timeout=PROBE_SECONDS, check=False
        )
        if answer.returncode == 0:
            return client
        tried.append(client)
    seen = f"{', '.join(tried)}: no BuildKit" if tried else "no docker client on PATH"
    raise MachineError(seen, remedy="install Docker with its buildx plugin (Debian: docker.io or docker-buildx)")


def build_command(client: str, folder: Path, tag: str, settings: BuildSettings) -> list[str]:
    """The argv of a build. Secrets are named with the file they are in."""
    command = [client, "build", "--tag", tag, "--network", settings.network, "--progress", "plain"]
    command += ["--no-cache"] if settings.no_cache else []
    for name, path in (("ca", settings.ca), ("pip", settings.pip_conf)):
        command += ["--secret", f"id={name},src={path}"] if path else []
    for name in PROXY_VARIABLES:
        command += ["--build-arg", name] if name in os.environ else []
    return [*command, str(folder)]


def build(command: list[str], show: Callable[[str], None]) -> None:
    """Run a build, showing its lines. BuildError with the last lines when it fails."""
    lines: list[str] = []
    with subprocess.Popen(
        command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        for line in child.stdout or ():
            lines.append(line.rstrip())
            show(lines[-1])
    if child.returncode:
        why = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        raise BuildError(f"docker build failed (exit {child.returncode}): {why}", remedy="the step is told above")


def default_ca(environ: dict[str, str]) -> Path | None:
    """A private CA bundle that this machine's programs are told to use."""
    named = (environ.get(variable) for variable in CA_VARIABLES)
    return next((Path(name) for name in named if name and Path(name).is_file()), None)


def default_pip_conf(environ: dict[str, str]) -> Path | None:
    """pip's settings on this machine, with its mirrors."""
    home = Path(environ.get("HOME", "/"))
    named = environ.get("PIP_CONFIG_FILE")
    places = [Path(named)] if named else []
    places += [home / ".config" / "pip" / "pip.conf", home / ".pip" / "pip.conf", Path("/etc/pip.conf")]
    return next((place for place in places if place.is_file()), None)


def _clients() -> Iterator[str]:
    seen = set()
    for folder in os.get_exec_path():
        found = shutil.which("docker", path=folder)
        if found and os.path.realpath(found) not in seen:
            seen.add(os.path.realpath(found))
            yield found


def _environment() -> dict[str, str]:
    return {**os.environ, "DOCKER_BUILDKIT": "1", "DOCKER_HOST": address()}
