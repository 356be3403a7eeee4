"""A LaunchPlan as files that run without us: a shell script, a compose file, a quadlet for systemd, a Slurm job."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from radeon_stack.errors import UsageError
from radeon_stack.launch.docker import container_name, is_cdi, run_command
from radeon_stack.launch.plan import LaunchPlan, Mount
from radeon_stack.launch.sbatch import script

PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")  # of YAML 1.1: not text unless quoted


def shell(plan: LaunchPlan) -> str:
    """A bash script; secrets are taken from its environment."""
    _require_here(plan)
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", f"# {_about(plan)}"]
    lines += [f': "${{{name}:?export {name} first}}"' for name in plan.secrets]
    command = run_command(plan) if plan.image else ["env", *_local(plan), *plan.command]
    return "\n".join([*lines, "exec " + _folded(command), ""])


def compose(plan: LaunchPlan) -> str:
    """A compose file with one service, in the words of the Compose Specification."""
    _require_image(plan)
    entrypoint, *arguments = plan.command
    paths = [device for device in plan.devices if not is_cdi(device)]
    names = [device for device in plan.devices if is_cdi(device)]
    service: dict[str, Any] = {
        "image": plan.image,
        "pull_policy": "never",
        "container_name": container_name(plan),
        "entrypoint": [_escaped(entrypoint)],
        "command": [_escaped(word) for word in arguments],
        "environment": {name: _escaped(value) for name, value in plan.env} | dict.fromkeys(plan.secrets),
        "volumes": [_volume(mount) for mount in plan.mounts],
        "devices": [f"{path}:{path}" for path in paths] + names,
        "group_add": list(plan.groups),
        "user": plan.user,
        "mem_limit": plan.memory,
        "memswap_limit": plan.memory,
        "shm_size": plan.shm,
        "ipc": plan.ipc,
        "network_mode": plan.network,
        "ports": [str(port) for port in plan.ports],
        "cap_drop": list(plan.cap_drop),
        "security_opt": [option.replace("=", ":", 1) for option in plan.security],
        "read_only": plan.read_only_root,
        "tmpfs": list(plan.tmpfs),
        "init": plan.init,
        "labels": {name: _escaped(value) for name, value in plan.labels},
        "stop_signal": "SIGTERM",
        "stop_grace_period": f"{plan.stop_seconds}s",
        "restart": "no",
    }
    kept = {name: value for name, value in service.items() if value not in (None, [], {})}
    return f"# {_about(plan)}\n" + _yaml({"services": {"run": kept}})


def quadlet(plan: LaunchPlan) -> str:
    """A `.container` unit for podman's systemd generator: podman-systemd.unit(5), podman 4.4 and newer."""
    _require_image(plan)
    entrypoint, *arguments = plan.command
    user, _, group = str(plan.user).partition(":")
    extra = [
        f"--entrypoint={entrypoint}",
        f"--memory={plan.memory}",
        f"--memory-swap={plan.memory}",
        f"--ipc={plan.ipc}",
    ]
    extra += [f"--shm-size={plan.shm}", "--stop-signal=SIGTERM", f"--stop-timeout={plan.stop_seconds}"]
    extra += [f"--group-add={group}" for group in plan.groups]
    extra += [f"--env={name}" for name in plan.secrets]
    extra += ["--security-opt=label=disable"] if "label=disable" in plan.security else []
    keys: list[tuple[str, str]] = [
        ("Image", str(plan.image)),
        ("ContainerName", container_name(plan)),
        ("Exec", _words(arguments)),
        ("User", user),
        ("Group", group),
        ("Network", str(plan.network)),
        *(("PublishPort", str(port)) for port in plan.ports),
        ("DropCapability", " ".join(plan.cap_drop).lower()),
        ("NoNewPrivileges", str("no-new-privileges" in plan.security).lower()),
        ("ReadOnly", str(plan.read_only_root).lower()),
        ("RunInit", str(plan.init).lower()),
        *(("Tmpfs", path) for path in plan.tmpfs),
        *(("AddDevice", device) for device in plan.devices),
        *(("Mount", _mount(mount)) for mount in plan.mounts),
        *(("Environment", _words([f"{name}={value}"])) for name, value in plan.env),
        *(("Label", _words([f"{name}={value}"])) for name, value in plan.labels),
        ("PodmanArgs", " ".join(extra)),
    ]
    foreign = f"# its image is docker's; give it to podman first: docker save {plan.image} | podman load"
    lines = [
        f"# {_about(plan)}",
        *([foreign] if plan.client == "docker" else []),
        "[Unit]",
        f"Description={_about(plan)}",
        "",
        "[Container]",
    ]
    lines += [f"{key}={_unit(value)}" for key, value in keys]
    secrets = [f"PassEnvironment={name}" for name in plan.secrets]
    return "\n".join([*lines, "", "[Service]", "Restart=no", "TimeoutStopSec=" + str(plan.stop_seconds), *secrets, ""])


FORMS = {
    "shell": (shell, "run.sh"),
    "compose": (compose, "compose.yaml"),
    "quadlet": (quadlet, "{name}.container"),
    "sbatch": (script, "job.sh"),
}
EXECUTABLE = ("shell", "sbatch")


def _about(plan: LaunchPlan) -> str:
    recipe = dict(plan.labels).get("radeon-stack.recipe", "a run")
    alone = (
        "it runs without radeon-stack" if plan.image else f"it runs with a Python of this machine: {plan.command[0]}"
    )
    return f"{recipe}, written by radeon-stack export; {alone}"


def _require_here(plan: LaunchPlan) -> None:
    if plan.job is not None:
        raise UsageError("this run is a cluster's", where="--as", remedy="--as sbatch, or leave --engine slurm out")


def _require_image(plan: LaunchPlan) -> None:
    _require_here(plan)
    if plan.image is None:
        raise UsageError("this run has no container", where="--as", remedy="--engine docker, or --as shell")


def _local(plan: LaunchPlan) -> list[str]:
    unset = [part for name in plan.unset for part in ("-u", name)]
    return [*unset, *(f"{name}={value}" for name, value in plan.env)]


def _folded(command: list[str]) -> str:
    """One argument a line, options with their values: what a person can read."""
    lines: list[str] = []
    for word in command:
        quoted = shlex.quote(word)
        if lines and lines[-1].startswith("--") and " " not in lines[-1] and not word.startswith("--"):
            lines[-1] += f" {quoted}"
        else:
            lines.append(quoted)
    return " \\\n  ".join(lines)


def _escaped(text: str) -> str:
    return text.replace("$", "$$")  # compose would take it for a variable


def _volume(mount: Mount) -> dict[str, Any]:
    volume: dict[str, Any] = {"type": "bind", "source": _escaped(mount.source), "target": _escaped(mount.target)}
    return volume | ({"read_only": True} if mount.read_only else {})


def _mount(mount: Mount) -> str:
    fields = ["type=bind", f"source={mount.source}", f"target={mount.target}", *(["readonly"] * mount.read_only)]
    if any("," in field for field in fields):
        raise UsageError(f"a comma in {mount.source}", where="--as quadlet", remedy="quadlet has no way to write it")
    return ",".join(fields)


def _words(words: list[str]) -> str:
    """Words as systemd splits them: systemd.syntax(7)."""
    return " ".join(json.dumps(word, ensure_ascii=False) if not PLAIN.fullmatch(word) else word for word in words)


def _unit(value: str) -> str:
    if "\n" in value:
        raise UsageError("a line break in a value", where="--as quadlet")
    return value.replace("%", "%%")  # systemd's specifiers


def _yaml(value: Any, indent: int = 0) -> str:
    """Mappings and lists as YAML; each text that could be taken for something else is quoted as JSON is."""
    pad = "  " * indent
    if isinstance(value, Mapping):
        return "".join(f"{pad}{_scalar(name)}:{_nested(item, indent)}" for name, item in value.items())
    return "".join(f"{pad}-{_nested(item, indent, of_list=True)}" for item in value)


def _nested(value: Any, indent: int, *, of_list: bool = False) -> str:
    if isinstance(value, Mapping) and value and of_list:
        return " " + _yaml(value, indent + 1).lstrip(" ")
    if isinstance(value, Mapping | list) and value:
        return "\n" + _yaml(value, indent + 1)
    return f" {_scalar(value)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)
