"""(recipe, machine, image) → one frozen LaunchPlan."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radeon_stack.catalog.load import Effective
from radeon_stack.catalog.sizes import format_size
from radeon_stack.errors import MachineError, UsageError
from radeon_stack.host.machine import Machine
from radeon_stack.images.resolve import Image
from radeon_stack.launch.inputs import data_file, model_folder
from radeon_stack.launch.plan import LaunchPlan, Mount

ROOM = "/radeon-stack"  # everything of ours inside a container is below this folder
VENV_PYTHON = "/opt/venv/bin/python"  # the contract of rocm/pytorch images
SCRATCH = "/tmp"  # noqa: S108 - the container's own, in memory
STOP_SECONDS = 120  # an optimizer step of a large model and its checkpoint fit
NO_CONTAINER = "a child process, no container: it has what you have"


def plan(
    effective: Effective,
    machine: Machine,
    *,
    run_id: str,
    run_dir: Path,
    cache: Path,
    engine: str,
    image: Image | None,
    why: str = "",
    resume: bool = False,
) -> LaunchPlan:
    """The plan for one run; `why` is the reason for its engine. MachineError when this machine lacks what it needs."""
    require_gpus(effective, machine)
    inside = image is not None
    if inside and effective.recipe.resources.memory > machine.memory:
        raise MachineError(
            f"{effective.name} asks for {format_size(effective.recipe.resources.memory)} of memory, "
            f"this machine has {format_size(machine.memory)}",
            where="resources.memory",
            remedy="lower it: --set resources.memory=SIZE, or try --preset demo",
        )
    config: Any = effective.config
    paths = _Paths(inside, run_dir, cache)
    paths.add_model(config.model, effective.origin.get("config.model", str(effective.path)) + ": config.model")
    paths.add_data(config.data.dataset, effective.origin.get("config.data.dataset", "") + ": config.data.dataset")
    common = _common(effective, machine, run_id, run_dir, image) | {"engine": (engine, why)}
    python = VENV_PYTHON if inside else sys.executable
    command = (python, "-m", f"radeon_stack.workloads.{effective.recipe.workload}", *paths.arguments)
    if resume:
        command = (*command, "--resume")
    container = _container(effective, machine, paths, run_dir) if image else _no_container()
    values = {**common, **container}
    values["command"] = (command, "the recipe's workload; paths as it sees them")
    values["env"] = (
        _environment(effective, inside),
        "the recipe's, and where caches are; no hub without a network",
    )
    return LaunchPlan(
        **{name: value for name, (value, _) in values.items()},
        reasons={name: reason for name, (_, reason) in values.items()},
    )


def require_gpus(effective: Effective, machine: Machine) -> None:
    """MachineError when the recipe needs more GPUs than there are."""
    needed, found = effective.recipe.resources.gpus.min, len(machine.gpus)
    if needed > found:
        seen = f"it has {found}" if found else "none is visible (no /dev/kfd topology)"
        raise MachineError(
            f"{effective.name} needs {needed} GPU{'s' * (needed > 1)}; on this machine {seen}",
            where="resources.gpus.min",
            remedy="without a Radeon, run the same code on a small model: --preset demo",
        )


class _Paths:
    """Where the run, model, data and cache are: host paths, or places inside the container."""

    def __init__(self, inside: bool, run_dir: Path, cache: Path) -> None:
        self.inside = inside
        self.mounts: list[Mount] = []
        self.arguments: list[str] = []
        self._add_run(run_dir)
        self._add("--cache", cache, f"{ROOM}/cache", read_only=False)

    def _add_run(self, run_dir: Path) -> None:
        # Not the whole directory: what runs inside must not rewrite the records that the host acts upon.
        if self.inside:
            for name, read_only in (("config.json", True), ("events.jsonl", False), ("artifacts", False)):
                self.mounts.append(Mount(str(run_dir / name), f"{ROOM}/run/{name}", read_only))
        self.arguments += ["--run", f"{ROOM}/run" if self.inside else str(run_dir)]

    def add_model(self, model: str, where: str) -> None:
        folder = model_folder(model, where=where)
        if folder is None:
            self.arguments += ["--model", model]
        else:
            self._add("--model", folder, f"{ROOM}/models/{folder.name}", read_only=True)

    def add_data(self, dataset: str, where: str) -> None:
        file = data_file(dataset, where=where)
        if file is not None:
            self._add("--data", file, f"{ROOM}/data/{file.name}", read_only=True)

    def _add(self, flag: str, source: Path, target: str, *, read_only: bool) -> None:
        if self.inside:
            self.mounts.append(Mount(str(source), target, read_only))
        self.arguments += [flag, target if self.inside else str(source)]


Reasoned = dict[str, tuple[Any, str]]


def _common(effective: Effective, machine: Machine, run_id: str, run_dir: Path, image: Image | None) -> Reasoned:
    gpus = machine.gpus[: effective.recipe.resources.gpus.max]
    return {
        "run_id": (run_id, "names the run directory and the container"),
        "run_dir": (str(run_dir), "the record of this run"),
        "image": (image.id if image else None, f"{image.name}, by id: a tag may move" if image else NO_CONTAINER),
        "secrets": (effective.recipe.secrets, "passed on by name; their values are in no plan, log or report"),
        "devices": (
            ("/dev/kfd", *(gpu.render_node for gpu in gpus)) if gpus and image else (),
            "the compute interface and the chosen render nodes, no other" if gpus and image else "no GPU is passed",
        ),
        "stop_seconds": (STOP_SECONDS, "time to end its step and save before it is killed"),
    }


def _container(effective: Effective, machine: Machine, paths: _Paths, run_dir: Path) -> Reasoned:
    resources = effective.recipe.resources
    gpus = machine.gpus[: resources.gpus.max]
    asked = [Mount(_existing(m.source), m.target, m.read_only) for m in effective.recipe.mounts]
    return {
        "mounts": (
            (*paths.mounts, *asked),
            "events, artifacts and cache to write; config, model and data to read, and what the recipe names",
        ),
        "groups": (
            device_groups(machine, gpus),
            "the device nodes' own numbers: names mean others inside",
        ),
        "user": (f"{machine.uid}:{machine.gid}", "the caller, so that the caller owns what is written"),
        "memory": (resources.memory, "the recipe's limit: a run does not take the machine down"),
        "shm": (resources.shm, "data loaders and RCCL need a large /dev/shm; the default is 64 MiB"),
        "ipc": (resources.ipc, "a private /dev/shm of the right size serves; host ipc is never needed"),
        "network": (
            resources.network,
            "the recipe asks for none" if resources.network == "none" else "the recipe asks",
        ),
        "cap_drop": (("ALL",), "training needs no capability"),
        "security": (("no-new-privileges",), "nothing inside can gain rights"),
        "read_only_root": (True, "only the run, the cache and /tmp are written"),
        "tmpfs": ((SCRATCH,), "scratch that leaves with the container"),
        "init": (True, "signals reach the workload, and no zombie stays"),
        "labels": (
            (("radeon-stack.run", str(run_dir)), ("radeon-stack.recipe", effective.name)),
            "finds the container again",
        ),
    }


def _no_container() -> Reasoned:
    empty: dict[str, Any] = {
        **dict.fromkeys(("user", "memory", "shm", "ipc", "network")),
        **dict.fromkeys(("mounts", "groups", "cap_drop", "security", "tmpfs", "labels"), ()),
        **dict.fromkeys(("read_only_root", "init"), False),
    }
    return {name: (value, NO_CONTAINER) for name, value in empty.items()}


def _existing(source: str) -> str:
    path = Path(source).expanduser().absolute()
    if not path.exists():
        raise UsageError(f"nothing at {path} to mount", where="mounts")
    return str(path)


def device_groups(machine: Machine, gpus: tuple[Any, ...]) -> tuple[int, ...]:
    """The numeric groups of the compute interface and of these GPUs' render nodes, sorted."""
    nodes = ["/dev/kfd", *(gpu.render_node for gpu in gpus)] if gpus else []
    return tuple(sorted({os.stat(machine.sysroot / node.lstrip("/")).st_gid for node in nodes}))


def _environment(effective: Effective, inside: bool) -> tuple[tuple[str, str], ...]:
    env: dict[str, str] = {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if effective.recipe.resources.network == "none":
        env["HF_HUB_OFFLINE"] = "1"
    if inside:
        # The caller's uid has no home in the image, and the root file system is read-only.
        env |= _caches(f"{ROOM}/cache")
    env.update(effective.recipe.env)
    return tuple(sorted(env.items()))


def _caches(root: str) -> Mapping[str, str]:
    return {
        "HOME": root,
        "USER": "radeon-stack",
        "HF_HOME": f"{root}/huggingface",
        "TRITON_CACHE_DIR": f"{root}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{root}/inductor",
    }
