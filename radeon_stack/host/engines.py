"""Is there a container engine, of what kind, and what can it do?"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from radeon_stack.catalog.versions import version
from radeon_stack.errors import MachineError

PROBE_SECONDS = 5
SOCKET = "unix://"
STANDARD = "unix:///var/run/docker.sock"
PODMAN_CDI = "5.4"
SYSTEMD = "/run/systemd/system"  # there where it is the init system


@dataclass(frozen=True)
class EngineProbe:
    """What asking the engine gave: what it is, or why there is none.

    `product` is docker or podman; `desktop` Docker Desktop, whose containers run in a virtual machine;
    `cdi` that it reads CDI specifications from `/etc/cdi`.
    """

    address: str
    version: str = ""
    why_not: str = ""
    denied: bool = False
    product: str = "docker"
    api: str = ""
    rootless: bool = False
    desktop: bool = False
    cdi: bool = False
    selinux: bool = False
    storage: str = ""
    root: str = ""

    @property
    def answers(self) -> bool:
        return not self.why_not

    @property
    def absent(self) -> bool:
        """Nobody listens there: it is not started, or not installed."""
        return any(reason in self.why_not for reason in ("no such file", "connection refused"))

    @property
    def what(self) -> str:
        """`docker 28.5.2`, `podman 4.3.1, rootless`."""
        return f"{self.product} {self.version}{', rootless' if self.rootless else ''}"


def address() -> str:
    """Where the engine is expected: `DOCKER_HOST`, else the standard socket."""
    return os.environ.get("DOCKER_HOST") or STANDARD


def client(timeout: int = 60) -> Any:
    """A `docker.DockerClient` for the engine. MachineError when its address makes no sense."""
    from docker.client import DockerClient
    from docker.errors import DockerException

    if address().startswith("ssh:"):
        raise MachineError(
            f"an engine over ssh is on another machine: {address()}",
            where="DOCKER_HOST",
            remedy="run radeon-stack there, or unset DOCKER_HOST",
        )
    try:
        return DockerClient(base_url=address(), timeout=timeout, version="auto")
    except (DockerException, ValueError) as error:
        raise MachineError(*_unreachable(_reason(error))) from error


def probe_engine(seconds: int = PROBE_SECONDS) -> EngineProbe:
    """Ask the engine what it is, waiting so long for each answer at most."""
    if address().startswith(SOCKET) and not os.path.exists(address().removeprefix(SOCKET)):
        # Known without the SDK, which takes longer to import than all the rest of a launch.
        return EngineProbe(address(), why_not=_unreachable(os.strerror(errno.ENOENT).lower())[0])
    try:
        engine = client(timeout=seconds)
        return described(address(), engine.version(), engine.info())
    except MachineError as error:
        return EngineProbe(address(), why_not=error.what, denied="permission denied" in error.what)
    except Exception as error:  # requests, docker and urllib3 each have their own families
        return EngineProbe(address(), why_not=_unreachable(_reason(error))[0])


def described(where: str, told: Mapping[str, Any], info: Mapping[str, Any]) -> EngineProbe:
    """The probe of what `/version` and `/info` answered."""
    parts = _list(told.get("Components"))
    podman = any("podman" in str(part.get("Name", "")).lower() for part in parts if isinstance(part, dict))
    security = [str(option) for option in _list(info.get("SecurityOptions"))]
    return EngineProbe(
        where,
        version=str(told.get("Version", "")),
        product="podman" if podman else "docker",
        api=str(told.get("ApiVersion", "")),
        rootless=bool(info.get("Rootless")) or any("name=rootless" in option for option in security),
        desktop="docker desktop" in str(info.get("OperatingSystem", "")).lower(),
        cdi=_takes_cdi(told, info, podman),
        selinux=any("name=selinux" in option for option in security),
        storage=str(info.get("Driver", "")),
        root=str(info.get("DockerRootDir", "")),
    )


def _takes_cdi(told: Mapping[str, Any], info: Mapping[str, Any], podman: bool) -> bool:
    """Docker says so; podman's socket does from 5.4 on (containers/podman, 18e29076f7), and has no word for it."""
    if podman:
        return (version(str(told.get("Version", ""))) or ()) >= (version(PODMAN_CDI) or ())
    return bool(info.get("CDISpecDirs"))


def _list(told: Any) -> list[Any]:
    return told if isinstance(told, list) else []


def require_engine(where: str = "", without: str = "") -> EngineProbe:
    """The engine's probe. MachineError with the way out when none answers.

    `where` is the option that asks for it, if one does, and `without` how the same goes without.
    """
    probe = probe_engine()
    if not probe.answers:
        start = service("start", systemd=os.path.exists(SYSTEMD), root=os.getuid() == 0)
        ways = [f"start Docker ({start})", "set DOCKER_HOST", *([without] if without else [])]
        raise MachineError(probe.why_not, where=where, remedy=f"{', '.join(ways[:-1])} or {ways[-1]}")
    return probe


def service(verb: str, *, systemd: bool, root: bool) -> str:
    """The command that starts or stops Docker, as this user has to type it."""
    command = f"systemctl {verb} docker" if systemd else f"service docker {verb}"
    return command if root else f"sudo {command}"


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
