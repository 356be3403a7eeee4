"""(recipe, machine, image) → one frozen LaunchPlan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from radeon_stack.catalog.load import Effective
from radeon_stack.catalog.sizes import format_size
from radeon_stack.contracts.sections import Listens, MayMerge, TakesData, TakesModel, TakesSource
from radeon_stack.contracts.serve import KEY_FILE
from radeon_stack.errors import MachineError, UsageError
from radeon_stack.host.engines import require_engine
from radeon_stack.launch.access import VISIBLE, container_access, local_env
from radeon_stack.launch.circumstances import Circumstances
from radeon_stack.launch.confinement import Reasoned, confined
from radeon_stack.launch.endpoint import KEY_VARIABLE
from radeon_stack.launch.inputs import data_file, model_folder, require_network, source_folder
from radeon_stack.launch.model_files import require_whole
from radeon_stack.launch.node_access import on_node
from radeon_stack.launch.node_containers import lost
from radeon_stack.launch.plan import LaunchPlan, Mount, Port
from radeon_stack.launch.torchrun import LOOPBACK, started, variables

ROOM = "/radeon-stack"  # everything of ours inside a container is below this folder
VENV_PYTHON = "/opt/venv/bin/python"  # the contract of rocm/pytorch images
ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - of the container's own network, which is published at one address alone
STOP_SECONDS = 120  # an optimizer step of a large model and its checkpoint fit
FOREIGN = ("PYTHONPATH", "PYTHONHOME")  # would give one Python the packages of another
NOTES = "slurm"  # of the run directory
NODE_MODULE = "radeon_stack.workloads.node"
NO_CLUSTER = "this machine alone"
NO_CONTAINER = "a child process, no container: it has what you have"


def plan(
    effective: Effective, here: Circumstances, *, run_id: str, run_dir: Path, cache: Path, resume: bool = False
) -> LaunchPlan:
    """The plan for one run. MachineError when this machine lacks what it needs."""
    image, machine = here.choice.image, here.machine
    inside = image is not None
    if (inside or here.job) and effective.recipe.resources.memory > machine.memory:
        raise MachineError(
            f"{effective.name} asks for {format_size(effective.recipe.resources.memory)} of memory, "
            f"{'a node' if here.job else 'this machine'} has {format_size(machine.memory)}",
            where="resources.memory",
            remedy="lower it: --set resources.memory=SIZE, or try --preset demo",
        )
    config = effective.config
    paths = _Paths(inside, run_dir, cache)
    if isinstance(config, TakesSource):
        paths.add_source(config.source, effective.origin.get("config.source", "--from"))
    if isinstance(config, TakesModel) or (isinstance(config, MayMerge) and config.model):
        where = effective.origin.get("config.model", str(effective.path)) + ": config.model"
        require_network(config.model, effective.recipe.resources.network, where=where)
        paths.add_model(config.model, where)
    if isinstance(config, TakesData):
        paths.add_data(config.data.dataset, effective.origin.get("config.data.dataset", "") + ": config.data.dataset")
    if isinstance(config, Listens):
        paths.add_door(run_dir)
    python, whose = (VENV_PYTHON, "the image's Python") if inside else (here.choice.python, here.choice.python_why)
    module = f"radeon_stack.workloads.{effective.recipe.workload}"
    command = (*_started(python, here), module, *paths.arguments)
    values = _common(effective, here, run_id, run_dir)
    values["command"] = (
        (*command, "--resume") if resume else command,
        f"the recipe's workload, paths as it sees them; {whose}",
    )
    env = _Environment(effective, here)
    if here.job is not None and inside:
        paths.add_attempt(run_dir)
        values |= _no_container() | _node_container(effective, here, paths)
    elif inside:
        values |= _container(effective, here, paths, run_dir, env)
    else:
        values |= _no_container()
        if here.job is None:
            env.add_local(here)
    if here.job is not None:
        values |= _on_nodes(effective, here)
    values["env"] = (
        tuple(sorted(env.values.items())),
        "the recipe's, where caches are, and what known issues ask for",
    )
    unset = (*env.unset, KEY_VARIABLE) if isinstance(config, Listens) and not inside else env.unset
    values["unset"] = (unset, "would change what was decided here" if unset else "nothing has to be hidden")
    reasons = {name: reason for name, (_, reason) in values.items()}
    reasons |= {f"env.{name}": why for name, why in env.reasons.items()}
    reasons |= {f"job.{name}": why for name, why in here.job_reasons.items()}
    reasons |= {f"choices.{choice.name}": choice.why for choice in here.choices}
    reasons |= {f"mounts.{mount.target}": why for mount, why in paths.reasons} if inside else {}
    made = LaunchPlan(**{name: value for name, (value, _) in values.items()}, reasons=reasons)
    if here.job is None or not inside:
        return made
    whole = f"{reasons['client']}; it cannot give: {'; '.join(lost(made)) or 'nothing that is asked for'}"
    return replace(made, reasons=reasons | {"client": whole})


def _started(python: str, here: Circumstances) -> tuple[str, ...]:
    """What comes before the workload's module."""
    if here.job is None:
        return started(python, here.placement.processes)
    each = here.placement.processes // here.job.nodes
    return (python, "-m", NODE_MODULE, "--nodes", str(here.job.nodes), "--processes", str(each), "--")


class _Paths:
    """Where the run, model, data and cache are: host paths, or places inside the container."""

    def __init__(self, inside: bool, run_dir: Path, cache: Path) -> None:
        self.inside = inside
        self.reasons: list[tuple[Mount, str]] = []
        self.arguments: list[str] = []
        self._add_run(run_dir)
        self._add("--cache", cache, f"{ROOM}/cache", "what is expensive to make again", read_only=False)

    @property
    def mounts(self) -> tuple[Mount, ...]:
        return tuple(mount for mount, _ in self.reasons)

    def _add_run(self, run_dir: Path) -> None:
        # Not the whole directory: what runs inside must not rewrite the records that the host acts upon.
        if self.inside:
            for name, read_only, why in (
                ("config.json", True, "the recipe as it is run"),
                ("events.jsonl", False, "what it reports"),
                ("artifacts", False, "what it makes"),
            ):
                self.mount(Mount(str(run_dir / name), f"{ROOM}/run/{name}", read_only), why)
        self.arguments += ["--run", f"{ROOM}/run" if self.inside else str(run_dir)]

    def add_model(self, model: str, where: str) -> None:
        folder = model_folder(model, where=where)
        if folder is None:
            self.arguments += ["--model", model]
        else:
            require_whole(folder)
            self._add("--model", folder, f"{ROOM}/models/{folder.name}", "the model, never written", read_only=True)

    def add_source(self, source: str, where: str) -> None:
        folder = source_folder(source, where=where)
        self._add("--source", folder, f"{ROOM}/source", "what was made before, never written", read_only=True)

    def add_data(self, dataset: str, where: str) -> None:
        file = data_file(dataset, where=where)
        if file is not None:
            self._add("--data", file, f"{ROOM}/data/{file.name}", "the data, never written", read_only=True)

    def add_attempt(self, run_dir: Path) -> None:
        """A cluster's job notes there which attempt is the newest; the folder, for the file is replaced as a whole."""
        self.mount(Mount(str(run_dir / NOTES), f"{ROOM}/run/{NOTES}", read_only=True), "which attempt is the newest")

    def add_door(self, run_dir: Path) -> None:
        """Where it listens, and the key that it asks for: a file, for its environment shows in `docker inspect`."""
        if self.inside:
            key = Mount(str(run_dir / KEY_FILE), f"{ROOM}/run/{KEY_FILE}", read_only=True)
            self.mount(key, "the key that it asks for, in a file that only you can read")
            self.arguments += ["--listen", ANY_ADDRESS]

    def mount(self, mount: Mount, why: str) -> None:
        self.reasons.append((mount, why))

    def _add(self, flag: str, source: Path, target: str, why: str, *, read_only: bool) -> None:
        if self.inside:
            self.mount(Mount(str(source), target, read_only), why)
        self.arguments += [flag, target if self.inside else str(source)]


class _Environment:
    """Variables with their reasons: the recipe's, then the engine's, then what known issues ask for."""

    def __init__(self, effective: Effective, here: Circumstances) -> None:
        recipe = effective.recipe
        _refuse_visibility(effective)
        self.values: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.unset: tuple[str, ...] = ()
        self.add("PYTHONUNBUFFERED", "1", "its lines arrive as they are printed")
        self.add("PYTHONFAULTHANDLER", "1", "a crash in native code leaves its Python stack in the log")
        self.add("HF_HUB_DISABLE_TELEMETRY", "1", "nothing is told to anyone")
        for name, value, why in variables(here.placement.processes, STOP_SECONDS, here.job):
            self.add(name, value, why)
        if recipe.resources.network == "none":
            self.add("HF_HUB_OFFLINE", "1", "there is no network")
        if here.choice.image is not None:
            # The caller's uid has no home in the image, and the root file system is read-only.
            for name, value in _caches(f"{ROOM}/cache").items():
                self.add(name, value, "kept in the cache: the image is read-only")
        for name, value in recipe.env.items():
            self.add(name, value, "the recipe's")
        for mitigation in here.mitigations:
            for name, value in mitigation.env.items():
                if name not in recipe.env:
                    self.add(name, value, f"{mitigation.id}: {mitigation.why}")
        # A known fault is not outvoted by a measurement that did not meet it.
        for choice in here.choices:
            for name, value in choice.env.items():
                if name not in self.values:
                    self.add(name, value, f"{choice.name}={choice.value} was chosen")

    def add(self, name: str, value: str, why: str) -> None:
        self.values[name], self.reasons[name] = value, why

    def add_local(self, here: Circumstances) -> None:
        chosen, self.unset = local_env(here.machine, here.selection.gpus)
        if here.choice.environment is not None:
            self.unset += FOREIGN
        for name, value, why in chosen:
            self.add(name, value, why)


def _refuse_visibility(effective: Effective) -> None:
    for name in VISIBLE:
        if name in effective.recipe.env:
            raise UsageError(
                f"{name} is set once, from the chosen GPUs", where=f"{effective.path}: env.{name}", remedy="use --gpus"
            )


def _common(effective: Effective, here: Circumstances, run_id: str, run_dir: Path) -> Reasoned:
    image, gpus = here.choice.image, here.selection.gpus
    cards = "; ".join(f"GPU {gpu.index}: {gpu.name} ({gpu.gfx}, {format_size(gpu.memory)})" for gpu in gpus)
    return {
        "run_id": (run_id, "names the run directory and the container"),
        "run_dir": (str(run_dir), "the record of this run"),
        "engine": (here.choice.engine, here.choice.why),
        "image": (image.id if image else None, f"{image.name}, by id: a tag may move" if image else NO_CONTAINER),
        "gpus": (
            tuple(gpu.pci if gpu.partition is None else f"{gpu.pci}/{gpu.partition}" for gpu in gpus),
            f"{cards}; {here.selection.why}" if gpus else here.selection.why,
        ),
        "subject": (here.subject, "what a probe's answers hold for"),
        "choices": (
            tuple((choice.name, choice.value) for choice in here.choices),
            "by what was measured" if here.choices else "this recipe leaves nothing to choose",
        ),
        "job": (here.job, "what is asked of Slurm, which chooses when and where" if here.job else NO_CLUSTER),
        "parallel": (here.placement.parallel, here.placement.why),
        "processes": (here.placement.processes, here.placement.why),
        "ports": _ports(effective, inside=image is not None),
        "shared": (here.shared, "asked for" if here.shared else "one run has a card at a time"),
        "without": (
            here.without,
            "known issues that you leave out" if here.without else "what known issues of this setup ask for is set",
        ),
        "secrets": (effective.recipe.secrets, "passed on by name; their values are in no plan, log or report"),
        "stop_seconds": (STOP_SECONDS, "time to end its step and save before it is killed"),
    }


def _container(effective: Effective, here: Circumstances, paths: _Paths, run_dir: Path, env: _Environment) -> Reasoned:
    resources = effective.recipe.resources
    engine = here.choice.probe or require_engine()
    access = container_access(here.machine, here.selection.gpus, engine, here.sysroot)
    for asked in effective.recipe.mounts:
        paths.mount(Mount(_existing(asked.source), asked.target, asked.read_only), "the recipe names it")
    for mount in access.mounts:
        paths.mount(mount, "WSL2: the way to Windows' GPU driver")
    for name, value, why in access.env:
        env.add(name, value, why)
    return confined(access) | {
        "client": (engine.product, f"what answers is {engine.what}"),
        "mounts": (
            paths.mounts,
            "events, artifacts and cache to write; config, model and data to read, and what the recipe names",
        ),
        "memory": (resources.memory, "the recipe's limit: a run does not take the machine down"),
        "shm": (resources.shm, "data loaders and RCCL need a large /dev/shm; the default is 64 MiB"),
        "ipc": (resources.ipc, "a private /dev/shm of the right size serves; host ipc is never needed"),
        "network": _network(effective),
        "labels": (
            (("radeon-stack.run", str(run_dir)), ("radeon-stack.recipe", effective.name)),
            "finds the container again",
        ),
    }


def _node_container(effective: Effective, here: Circumstances, paths: _Paths) -> Reasoned:
    if here.job is None or here.record is None:
        raise ValueError("a node's container is a cluster's")
    for asked in effective.recipe.mounts:
        paths.mount(Mount(_existing(asked.source), asked.target, asked.read_only), "the recipe names it")
    resources = effective.recipe.resources
    return on_node(here.choice.runtime, here.choice.runtime_why, here.job, here.record, resources.network) | {
        "mounts": (
            paths.mounts,
            "events, artifacts and cache to write; config, model and data to read, and what the recipe names",
        ),
        "shm": (resources.shm, "data loaders and RCCL need a large /dev/shm"),
        "labels": ((("radeon-stack.recipe", effective.name),), "what it is, where its runtime keeps it"),
    }


def _on_nodes(effective: Effective, here: Circumstances) -> Reasoned:
    """What is otherwise on a cluster: it chooses the GPUs, and holds a job to its memory."""
    count = len(here.selection.gpus)
    cards = f"{count} × {here.selection.gpus[0].name} of each node: Slurm says which" if count else here.selection.why
    return {"gpus": ((), cards), "memory": (effective.recipe.resources.memory, "the recipe's limit, of each node")}


def _ports(effective: Effective, *, inside: bool) -> tuple[tuple[Port, ...], str]:
    if not isinstance(effective.config, Listens):
        return (), "it answers nobody"
    port = effective.config.port
    how = "published" if inside else "it listens"
    return (Port(LOOPBACK, port, port),), f"{how} at this machine's own address alone, for those who have the run's key"


def _network(effective: Effective) -> tuple[str, str]:
    asked = effective.recipe.resources.network
    if isinstance(effective.config, Listens):
        return "bridge", "to publish a port takes a bridge, an internal network has no way for it; it fetches nothing"
    return asked, "the recipe asks for none" if asked == "none" else "the recipe asks"


def _no_container() -> Reasoned:
    empty: dict[str, Any] = {
        **dict.fromkeys(("client", "user", "memory", "shm", "ipc", "network")),
        **dict.fromkeys(("devices", "mounts", "groups", "cap_drop", "security", "tmpfs", "labels"), ()),
        **dict.fromkeys(("read_only_root", "init"), False),
    }
    return {name: (value, NO_CONTAINER) for name, value in empty.items()}


def _existing(source: str) -> str:
    path = Path(source).expanduser().absolute()
    if not path.exists():
        raise UsageError(f"nothing at {path} to mount", where="mounts")
    return str(path)


def _caches(root: str) -> Mapping[str, str]:
    return {
        "HOME": root,
        "USER": "radeon-stack",
        "HF_HOME": f"{root}/huggingface",
        "TRITON_CACHE_DIR": f"{root}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{root}/inductor",
    }
