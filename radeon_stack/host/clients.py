"""The docker command lines on PATH: builds need one with BuildKit, which a newer client without its plugin lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

from radeon_stack.errors import MachineError
from radeon_stack.host.engines import address, probe_engine

PROBE_SECONDS = 20


def building_client() -> str:
    """The first docker client on PATH that builds with BuildKit; a newer one may lack its buildx plugin."""
    if probe_engine().product == "podman":
        raise MachineError(
            "podman's socket has no BuildKit",
            where="DOCKER_HOST",
            remedy="radeon-stack image render … -o ./context; podman build --tag NAME ./context",
        )
    tried = []
    for client in _clients():
        if _answers(client, "build", "--help"):
            return client
        tried.append(client)
    seen = f"{', '.join(tried)}: no BuildKit" if tried else "no docker client on PATH"
    raise MachineError(seen, remedy="install Docker with its buildx plugin (Debian: docker.io or docker-buildx)")


def baking_client() -> str | None:
    """The first docker client on PATH with buildx, which bakes many images in one graph; None without one."""
    return next((client for client in _clients() if _answers(client, "buildx", "version")), None)


def client_environment() -> dict[str, str]:
    """What a docker command of ours runs with: BuildKit, and the engine that we talk to."""
    return {**os.environ, "DOCKER_BUILDKIT": "1", "DOCKER_HOST": address()}


def _answers(client: str, *arguments: str) -> bool:
    command: list[str] = [client, *arguments]
    try:
        done = subprocess.run(
            command, env=client_environment(), capture_output=True, timeout=PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _clients() -> Iterator[str]:
    seen = set()
    for folder in os.get_exec_path():
        found = shutil.which("docker", path=folder)
        if found and os.path.realpath(found) not in seen:
            seen.add(os.path.realpath(found))
            yield found
