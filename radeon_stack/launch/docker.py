"""The docker engine, through its SDK."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radeon_stack.errors import ImageError, MachineError, StackError
from radeon_stack.host.engines import address, client
from radeon_stack.host.facts import KEEP_GROUPS_ANNOTATION
from radeon_stack.launch.access import KEEP_GROUPS
from radeon_stack.launch.engine import Beginning, Handle, noted_beginning, secret_values
from radeon_stack.launch.plan import LaunchPlan, Mount

if TYPE_CHECKING:
    from docker.models.containers import Container


class DockerEngine:
    """Containers. They are removed once their exit code and log are safe, so none is left behind."""

    name = "docker"
    keeps = False
    pause = 0.1

    @cached_property
    def _client(self) -> Any:
        return client()

    def files(self, plan: LaunchPlan) -> dict[Path, str]:
        return {}

    def start(self, plan: LaunchPlan) -> Handle:
        with _translated("start the container", plan.run_id):
            container = create(self._client, plan)
            try:
                container.start()
            except BaseException:
                container.remove(force=True)
                raise
        log = Path(plan.run_dir) / "log.txt"
        # Where this attempt's log begins: whoever attaches later reads the container's log from its start.
        begins = log.stat().st_size if log.exists() else 0
        return {"container": str(container.id), "log": str(log), "log_begins": begins}

    def logs(self, handle: Handle) -> None:
        container = self._find(handle)
        if container is None:
            return
        with _translated("read the container's log", _run(handle)), Path(str(handle["log"])).open("ab") as log:
            log.truncate(int(str(handle["log_begins"])))
            for chunk in container.logs(stream=True, follow=True):
                log.write(chunk)
                log.flush()

    def begins(self, handle: Handle) -> Beginning:
        return noted_beginning(handle)

    def alive(self, handle: Handle) -> bool:
        container = self._find(handle)
        return container is not None and container.status in ("created", "running", "paused", "restarting")

    def wait(self, handle: Handle) -> int | None:
        container = self._find(handle)
        if container is None:
            return None
        with _translated("wait for the container", _run(handle)):
            # No time limit: a training run lasts as long as it lasts.
            self._client.api.timeout = None
            code = int(container.wait()["StatusCode"])
            container.remove(force=True)
        return code

    def stop(self, handle: Handle, *, force: bool = False) -> None:
        from docker.errors import APIError

        container = self._find(handle)
        if container is None:
            return
        with _translated("stop the container", _run(handle)):
            try:
                container.kill(signal="SIGKILL" if force else "SIGTERM")
            except APIError as error:
                if error.status_code != 409:  # 409: it has ended by itself
                    raise

    def render(self, plan: LaunchPlan) -> list[str]:
        return run_command(plan)

    def standing(self, handle: Handle) -> str:
        return ""

    def _find(self, handle: Handle) -> Container | None:
        from docker.errors import NotFound

        with _translated("look for the container", _run(handle)):
            try:
                return self._client.containers.get(handle["container"])
            except NotFound:
                return None


def _run(handle: Handle) -> str:
    """The id of the run whose container it is: its log lies in the run's directory."""
    return Path(str(handle["log"])).parent.name


def container_name(plan: LaunchPlan) -> str:
    """Engines take letters, digits and `_.-` only."""
    return "radeon-stack-" + re.sub(r"[^A-Za-z0-9_.-]", "-", plan.run_id)


def create(engine: Any, plan: LaunchPlan) -> Container:
    """The plan's container, made and not started, by a `docker.DockerClient`."""
    config = container_config(plan, engine.api.api_version)
    return engine.containers.get(engine.api.create_container_from_config(config, container_name(plan))["Id"])


def container_config(plan: LaunchPlan, version: str) -> dict[str, Any]:
    """The plan in the words of the engine's API (of that version), secrets with their values."""
    from docker.types import ContainerConfig, DeviceRequest, HostConfig
    from docker.types import Mount as Bind

    cdi = [device for device in plan.devices if is_cdi(device)]
    keeps = KEEP_GROUPS in plan.groups
    host = HostConfig(
        version=version,
        mounts=[Bind(m.target, m.source, type="bind", read_only=m.read_only) for m in plan.mounts],
        devices=[f"{device}:{device}:rwm" for device in plan.devices if not is_cdi(device)],
        device_requests=[DeviceRequest(driver="cdi", device_ids=cdi)] if cdi else [],
        group_add=[] if keeps else list(plan.groups),
        mem_limit=plan.memory,
        memswap_limit=plan.memory,
        shm_size=plan.shm,
        ipc_mode=plan.ipc,
        network_mode=plan.network,
        port_bindings={f"{port.container}/tcp": [(port.address, port.host)] for port in plan.ports} or None,
        cap_drop=list(plan.cap_drop),
        security_opt=list(plan.security),
        read_only=plan.read_only_root,
        tmpfs=dict.fromkeys(plan.tmpfs, ""),
        init=plan.init,
        restart_policy={"Name": "no", "MaximumRetryCount": 0},
    )
    if keeps:
        # The SDK has no word for annotations. Podman's socket takes them from 5.1 on; before, its
        # containers.conf has to have this one (RS204).
        host["Annotations"] = dict([KEEP_GROUPS_ANNOTATION.split("=")])
    return dict(
        ContainerConfig(
            version,
            plan.image,
            list(plan.command[1:]),
            entrypoint=plan.command[0],
            environment=dict(plan.env) | secret_values(plan),
            user=plan.user,
            labels=dict(plan.labels),
            ports=[(port.container, "tcp") for port in plan.ports] or None,
            stop_signal="SIGTERM",
            stop_timeout=plan.stop_seconds,
            host_config=host,
        )
    )


def run_command(plan: LaunchPlan) -> list[str]:
    """The plan as a command line; secrets stay names, which are filled from the caller's environment."""
    return [str(plan.client), "run", "--rm", *run_arguments(plan)]


def run_arguments(plan: LaunchPlan) -> list[str]:
    """The plan in the words of `docker run`, which `podman run` understands as well."""
    entrypoint, *arguments = plan.command
    flags = ["--name", container_name(plan), *run_flags(plan)]
    return [*flags, "--entrypoint", entrypoint, str(plan.image), *arguments]


def run_flags(plan: LaunchPlan) -> list[str]:
    """What a container is given and held to; not its name, image and command. A field that is None has no flag."""
    flags = ["--init"] if plan.init else []
    flags += ["--read-only"] if plan.read_only_root else []
    pairs: list[tuple[str, Callable[[Any], str], tuple[Any, ...]]] = [
        ("--user", str, (plan.user,)),
        ("--memory", str, (plan.memory,)),
        ("--memory-swap", str, (plan.memory,)),
        ("--shm-size", str, (plan.shm,)),
        ("--ipc", str, (plan.ipc,)),
        ("--network", str, (plan.network,)),
        ("--publish", str, plan.ports),
        ("--cap-drop", str, plan.cap_drop),
        ("--security-opt", str, plan.security),
        ("--tmpfs", str, plan.tmpfs),
        ("--device", str, plan.devices),
        ("--group-add", str, plan.groups),
        ("--mount", mount_flag, plan.mounts),
        ("--env", "=".join, plan.env),
        ("--env", str, plan.secrets),
        ("--label", "=".join, plan.labels),
        ("--stop-signal", str, ("SIGTERM",)),
        ("--stop-timeout", str, (plan.stop_seconds,)),
    ]
    for flag, text, values in pairs:
        for value in values:
            flags += [flag, text(value)] if value is not None else []
    return flags


def is_cdi(device: str) -> bool:
    """`amd.com/gpu=0`, in distinction from a path."""
    return "=" in device and not device.startswith("/")


def mount_flag(mount: Mount) -> str:
    """A mount in the words of `--mount`, which docker, podman and apptainer read as CSV: a comma needs quotes."""
    fields = ["type=bind", f"source={mount.source}", f"target={mount.target}", *(["readonly"] * mount.read_only)]
    return ",".join('"' + f.replace('"', '""') + '"' if "," in f or '"' in f else f for f in fields)


@contextmanager
def _translated(doing: str, run: str) -> Iterator[None]:
    """The engine's errors as ours."""
    import requests
    from docker.errors import APIError, DockerException, ImageNotFound
    from urllib3.exceptions import HTTPError

    try:
        yield
    except StackError:
        raise
    except ImageNotFound as error:
        raise ImageError(
            "the image is not in this engine", where="--image", remedy="build it: make image ARCH=cpu"
        ) from error
    except APIError as error:
        raise MachineError(f"the engine refused to {doing}: {error.explanation or error}") from error
    except (DockerException, requests.RequestException, HTTPError, OSError) as error:
        raise MachineError(
            f"the engine at {address()} stopped answering (trying to {doing})",
            remedy=f"start the engine, then continue from the last checkpoint: radeon-stack run --resume {run}",
        ) from error
