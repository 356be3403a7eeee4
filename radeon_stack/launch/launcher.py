"""From a recipe to a run: draft the plan, write the records, start."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from radeon_stack import atomic
from radeon_stack.catalog.load import Effective, from_record
from radeon_stack.contracts import RESUMABLE
from radeon_stack.errors import MachineError, UsageError
from radeon_stack.host.processes import Process
from radeon_stack.images.environments import Environment
from radeon_stack.launch.circumstances import Circumstances
from radeon_stack.launch.endpoint import key_line, with_port, write_key
from radeon_stack.launch.engine import engine_named
from radeon_stack.launch.explaining import require_reboot, with_other_order
from radeon_stack.launch.inputs import absolute_inputs
from radeon_stack.launch.placement import placed
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.planner import plan
from radeon_stack.launch.probing import decided
from radeon_stack.launch.recomputation import recomputed
from radeon_stack.launch.supervise import UNSTARTED, call_off, hand_over, settle
from radeon_stack.runs.store import Run, RunStore, State, Status, cannot_write, require_one

START_SECONDS = 60
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Draft:
    """A launch that has been decided and not yet carried out."""

    effective: Effective
    plan: LaunchPlan
    run: Run
    environment: Environment | None = None
    """Whose Python it is that the plan's command names: it has to be made before, unless it is ready."""


def draft(
    effective: Effective,
    here: Circumstances,
    store: RunStore,
    run: Run | None = None,
    *,
    resume: bool = False,
    cache: Path | None = None,
) -> Draft:
    """Decide everything; writes nothing. `run`: this one, instead of the store's next."""
    run = run or store.new(effective.name)
    effective = with_port(effective, live=here.sysroot.live)
    effective, taken = decided(effective, here.probe, here.setup)
    effective, placement = placed(effective, here.gpus, here.job.nodes if here.job else 1)
    effective, layers = recomputed(effective, placement, here.gpus)
    if resume:
        require_as_many(run, placement.processes)
    here = replace(here, choices=(*taken, *layers), placement=placement)
    launch_plan = plan(
        effective,
        here,
        run_id=run.id,
        run_dir=run.path,
        cache=cache or store.home / "cache",
        resume=resume,
    )
    return Draft(effective, launch_plan, run, here.choice.environment)


def resumable(run: Run, sets: Sequence[str] = (), *, after_fault: bool = False) -> Effective:
    """The recipe of an ended run, as it was but for `sets`; after a GPU fault with its data in another order.

    UsageError for one that goes on or has nothing to continue, MachineError where a fault wants a reboot first.
    """
    require_one(run, "--resume")
    state = settle(run).state
    if state is State.RUNNING:
        raise UsageError(f"{run.id} is still running", remedy=f"watch it: radeon-stack runs attach {run.id}")
    if state is State.DONE:
        raise UsageError(f"{run.id} is done; there is nothing to continue", where="--resume")
    record = run.read_json(run.config)
    if not record:
        raise UsageError("has no readable config.json", where=str(run.path), remedy="start a new run")
    status = run.status()
    require_reboot(status, anyway=after_fault)
    return from_record(with_other_order(record, status), run.config, sets, _may_change(record))


def _may_change(record: dict[str, Any]) -> tuple[str, ...]:
    """The keys that may change while a run is continued."""
    recipe = record.get("recipe")
    return RESUMABLE.get(str(recipe.get("workload")) if isinstance(recipe, dict) else "", ())


def require_as_many(run: Run, processes: int) -> None:
    """UsageError for another number of processes than the run had: its steps would have another size from here on."""
    try:
        before = read_plan(run).processes
    except UsageError:
        return
    if before != processes:
        raise UsageError(
            f"{run.id} has trained as {before} process{'es' * (before > 1)}, and would go on as {processes}",
            where="--resume",
            remedy="give it as many GPUs as it had: --gpus 0,1,…; on a cluster as many nodes: --nodes 2",
        )


def write_records(drafted: Draft, store: RunStore) -> None:
    """Make the run directory with its config, plan and first status. MachineError when that cannot be written."""
    run, effective = drafted.run, drafted.effective
    try:
        run.artifacts.mkdir(parents=True, exist_ok=True)
        (store.home / "cache").mkdir(parents=True, exist_ok=True)
        run.events.touch()
        if drafted.plan.ports:
            write_key(run.path)
        _write_json(run.config, config_record(effective))
        _write_json(run.plan, drafted.plan.as_record())
        run.write_status(
            Status(
                state=State.STARTING,
                recipe=effective.name,
                preset=effective.preset,
                engine=drafted.plan.engine,
                launcher=asdict(Process.current()),
                host=os.uname().nodename,
                started=time.time(),
            )
        )
    except OSError as error:
        raise cannot_write(store.home, error) from error


def config_record(effective: Effective) -> dict[str, Any]:
    """`config.json`: the recipe as it is run, and where each value came from."""
    tree = absolute_inputs(effective.config, effective.tree())
    return {"name": effective.name, "preset": effective.preset, "origin": dict(effective.origin), "recipe": tree}


def paste_lines(drafted: Draft, store: RunStore) -> list[str]:
    """Shell lines that do by hand what `run` does: make the run's directory, then the launch itself."""
    run, environment = drafted.run, drafted.environment
    config = json.dumps(config_record(drafted.effective))
    engine = engine_named(drafted.plan.engine)
    first = []
    if environment is not None and not environment.ready:
        first = [f"# first, once: a run by radeon-stack makes the environment for {environment.kind}"]
    return [
        *first,
        shlex.join(["mkdir", "-p", str(run.artifacts), str(store.home / "cache")]),
        f"{shlex.join(['printf', '%s', config])} > {shlex.quote(str(run.config))}",
        shlex.join(["touch", str(run.events)]),
        *([key_line(run.path)] if drafted.plan.ports else []),
        *(
            f"{shlex.join(['mkdir', '-p', str(place.parent)])}; {_heredoc(place, text)}"
            for place, text in engine.files(drafted.plan).items()
        ),
        shlex.join(engine.render(drafted.plan)),
    ]


def _heredoc(place: Path, text: str) -> str:
    """Shell that writes a text, which may have such documents in it, to a file."""
    end = "WHOLE"
    while end in text.splitlines():
        end += "_"
    return f"cat >{shlex.quote(str(place))} <<'{end}'\n{text}{end}"


def detach(run: Run, plan: LaunchPlan) -> None:
    """Have the engine, or another process of its own session, carry the run out; returns when it has started."""
    if engine_named(plan.engine).keeps:
        hand_over(run, plan)
        return
    if begun_by_another(run):
        return
    call_off(run, UNSTARTED)
    raise MachineError("the run did not start", where=str(run.path), remedy=f"see: radeon-stack runs logs {run.id}")


def begun_by_another(run: Run) -> bool:
    """Leave a run, or a sweep, to a process of its own session. Has that begun it? False when it could not in time."""
    keeper = subprocess.Popen(
        [sys.executable, "-m", "radeon_stack", "runs", "supervise", run.id],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        status = run.status()
        if status is not None and status.state is not State.STARTING:
            return True
        if keeper.poll() is not None:
            break
        time.sleep(POLL_SECONDS)
    return False


def read_plan(run: Run) -> LaunchPlan:
    """The plan that was written for a run."""
    try:
        return LaunchPlan.from_record(run.read_json(run.plan))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError("plan.json is missing or damaged", where=str(run.path)) from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    atomic.write_text(path, json.dumps(value, indent=2) + "\n")
