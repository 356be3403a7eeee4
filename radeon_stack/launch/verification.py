"""The verify stage's script once more, in a container: with a GPU, where the build had none."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from radeon_stack.errors import CheckError, MachineError, WorkloadError
from radeon_stack.host.engines import client, require_engine
from radeon_stack.host.gpus import Gpu
from radeon_stack.host.known_issues import Setup, mitigations
from radeon_stack.host.machine import Machine
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.images.labels import GFX, ROCM, TORCH
from radeon_stack.launch.access import container_access
from radeon_stack.launch.confinement import SCRATCH, Reasoned, confined
from radeon_stack.launch.docker import create
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.planner import VENV_PYTHON

FOLDER = "/etc/radeon-stack"
AUDIT = "radeon_stack.kernels.audit"
MEMORY = 8 << 30
SHM = 1 << 30
SECONDS = 900


def verification_plan(image: Any, machine: Machine, sysroot: Sysroot, *, on_gpu: bool) -> LaunchPlan:
    """The plan of a verification. MachineError when it wants a GPU of the image's gfx and there is none."""
    gpus = tuple(gpu for gpu in machine.gpus if gpu.gfx == image.labels.get(GFX))[:1] if on_gpu else ()
    if on_gpu and not gpus:
        seen = ", ".join(gpu.gfx for gpu in machine.gpus) or "none"
        raise MachineError(
            f"the image is for {image.labels.get(GFX, 'cpu')}; GPUs of this machine: {seen}", where="--on-gpu"
        )
    command = (VENV_PYTHON, "-m", "radeon_stack.workloads.probe", "verify", FOLDER, "--print")
    engine = require_engine()
    env = {"HOME": SCRATCH, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "USER": "radeon-stack"}
    env |= _asked_for(image.labels, machine, gpus)
    values: Reasoned = confined(container_access(machine, gpus, engine, sysroot)) | {
        "client": (engine.product, f"what answers is {engine.what}"),
        "run_id": (f"verify-{secrets.token_hex(4)}", "names the container"),
        "run_dir": ("", "nothing is kept but what it prints"),
        "engine": ("docker", "an image is what is verified"),
        "image": (str(image.id), "by id: a tag may move"),
        "gpus": (tuple(gpu.pci for gpu in gpus), "one GPU of the image's gfx"),
        "shared": (True, "it takes seconds"),
        "subject": ((), "no probe's answers are kept"),
        "choices": ((), "a verification chooses nothing"),
        "parallel": ("none", "there is nothing to share"),
        "processes": (1, "one is enough"),
        "job": (None, "this machine alone"),
        "command": ((*command, "--on-gpu") if on_gpu else command, "the image's own verification"),
        "env": (tuple(sorted(env.items())), "no hub without a network; and what known issues ask for, as in a run"),
        "unset": ((), "nothing has to be hidden"),
        "without": ((), "no known issue is left out"),
        "secrets": ((), "none are needed"),
        "mounts": ((), "nothing of the host is needed"),
        "memory": (min(MEMORY, machine.memory), "imports and small tensors"),
        "shm": (SHM, "as in a run"),
        "ipc": ("private", "as in a run"),
        "network": ("none", "nothing is fetched"),
        "ports": ((), "it answers nobody"),
        "labels": ((("radeon-stack.run", "verify"),), "finds the container again"),
        "stop_seconds": (5, "there is nothing to save"),
    }
    return LaunchPlan(
        **{name: value for name, (value, _) in values.items()},
        reasons={name: why for name, (_, why) in values.items()},
    )


def _asked_for(labels: Mapping[str, str], machine: Machine, gpus: tuple[Gpu, ...]) -> dict[str, str]:
    """The variables that known issues ask for, where this image is run on these GPUs."""
    components = {"torch": labels.get(TORCH, "")}
    gfx = frozenset(gpu.gfx for gpu in gpus)
    asked = mitigations(Setup(gfx, len(gpus), labels.get(ROCM, ""), machine.kernel, components))
    return {name: value for mitigation in asked for name, value in mitigation.env.items()}


def kernel_audit_plan(image: Any, machine: Machine, sysroot: Sysroot, arguments: tuple[str, ...]) -> LaunchPlan:
    """The plan of an audit of the kernels in an image, by its own triton; as confined as a verification."""
    plan = verification_plan(image, machine, sysroot, on_gpu=False)
    return replace(plan, command=(VENV_PYTHON, "-m", AUDIT, *arguments))


@dataclass(frozen=True)
class Ended:
    """What a container printed before it ended with `code`."""

    code: int
    out: str
    err: str


def run_to_the_end(plan: LaunchPlan) -> Ended:
    """Run a container of a plan, wait for it, and leave none."""
    container = create(client(timeout=SECONDS), plan)
    try:
        container.start()
        code = int(container.wait(timeout=SECONDS)["StatusCode"])
        out = container.logs(stdout=True, stderr=False).decode(errors="replace")
        err = container.logs(stdout=False, stderr=True).decode(errors="replace")
    finally:
        container.remove(force=True)
    return Ended(code, out, err)


def run_verification(plan: LaunchPlan) -> dict[str, Any]:
    """What the image found of itself: `checks`, each with `name`, `state`, `detail`. WorkloadError when nothing."""
    ended = run_to_the_end(plan)
    lines, errors = ended.out.strip().splitlines(), ended.err.strip().splitlines()
    try:
        found = json.loads(lines[-1])
        checks = [(str(check["name"]), str(check["state"]), str(check["detail"])) for check in found["checks"]]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        why = errors[-1] if errors else "it said nothing"
        raise WorkloadError(f"the verification ended with {ended.code}: {why}", where=str(plan.image)) from error
    return {"checks": [{"name": name, "state": state, "detail": detail} for name, state, detail in checks]}


def require_ok(found: dict[str, Any], image: str) -> None:
    """CheckError with the first check that failed."""
    failed = [check for check in found["checks"] if check["state"] == "failed"]
    if failed:
        raise CheckError(
            f"{len(failed)} of {len(found['checks'])} checks failed: {failed[0]['name']}: {failed[0]['detail']}",
            where=image,
        )
