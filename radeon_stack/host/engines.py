"""Is there a container engine, and what can it do?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from radeon_stack.errors import MachineError

PROBE_SECONDS = 5


@dataclass(frozen=True)
class EngineProbe:
    """What asking the engine gave: its version, or why there is none."""

    address: str
    version: str = ""
    why_not: str = ""

    @property
    def answers(self) -> bool:
        return not self.why_not


def address() -> str:
    """Where the engine is expected: `DOCKER_HOST`, else the standard socket."""
    return os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"


def client(timeout: int = 60) -> Any:
    """A `docker.DockerClient` for the engine. MachineError when its address makes no sense."""
    from docker.client import DockerClient
    from docker.errors import DockerException

    try:
        return DockerClient(base_url=address(), timeout=timeout, version="auto")
    except (DockerException, ValueError) as error:
        raise MachineError(*_unreachable(_reason(error))) from error


def probe_engine() -> EngineProbe:
    """Ask the engine for its version, within a few seconds."""
    try:
        engine = client(timeout=PROBE_SECONDS)
        return EngineProbe(address(), version=str(engine.version()["Version"]))
    except MachineError as error:
        return EngineProbe(address(), why_not=error.what)
    except Exception as error:  # requests, docker and urllib3 each have their own families
        return EngineProbe(address(), why_not=_unreachable(_reason(error))[0])


def require_engine() -> EngineProbe:
    """The engine's probe. MachineError with the way out when none answers."""
    probe = probe_engine()
    if not probe.answers:
        raise MachineError(
            probe.why_not,
            where="--engine docker",
            remedy="start Docker (sudo systemctl start docker), set DOCKER_HOST, or run without it: --engine local",
        )
    return probe


def _unreachable(reason: str) -> tuple[str]:
    return (f"no container engine answers at {address()} ({reason})",)


def _reason(error: BaseException) -> str:
    """The innermost reason, a few words long."""
    seen: BaseException = error
    while seen.__cause__ is not None or seen.__context__ is not None:
        seen = seen.__cause__ or seen.__context__  # type: ignore[assignment]
    if isinstance(seen, OSError) and seen.strerror:
        return seen.strerror.lower()
    return str(seen).splitlines()[0][:120] if str(seen) else type(seen).__name__
