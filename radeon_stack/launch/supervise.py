"""Carries a plan out and keeps the run's record: start, watch, stop, and the last word."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from radeon_stack.errors import Exit, MachineError, StackError
from radeon_stack.host.machine import boot_id
from radeon_stack.host.processes import Process
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.launch.engine import Engine, Handle, engine_named
from radeon_stack.launch.explaining import explained, refused
from radeon_stack.launch.interrupts import Interrupts, interrupted
from radeon_stack.launch.leases import lease_folder, leased
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.probing import keep_answers
from radeon_stack.launch.watching import POLL_SECONDS, Audience, Pump, Speaker, Standing, Watcher
from radeon_stack.runs.events import EventReader
from radeon_stack.runs.outcome import Outcome, closed, judge, recorded
from radeon_stack.runs.report import write as write_report
from radeon_stack.runs.store import Run, State, Status, cannot_write

ELSEWHERE = "a cluster's node"  # in place of a boot: no reboot of this machine is waited for after a fault
STARTING_SECONDS = 600  # in which a run that another machine starts has its engine's answer
FULL_DISK_BYTES = 16 << 20
FULL_DISK = "the disk is full"
FULL = (errno.ENOSPC, errno.EDQUOT)
CALLED_OFF = Outcome(State.STOPPED, Exit.INTERRUPTED, "stopped before it had begun", remedy="run it again")
STILL_STARTING = "still starting: its engine does not answer; it is stopped once it has started"
UNSTARTED = Outcome(State.LOST, Exit.WORKLOAD, "killed while it was starting", remedy="run it again")


def carry_out(run: Run, plan: LaunchPlan, watch: Watcher, say: Speaker) -> Outcome:
    """Start a run and watch it to its end. Nothing of it is left behind, however it ends.

    One that has ended before it began, because somebody called it off, is not started any more.
    """
    engine = engine_named(plan.engine)
    begins = run.events.stat().st_size if run.events.exists() else 0  # a resumed run has told its first part before
    audience = Audience(watch, say)
    with interrupted() as interrupts:  # before we are on record: whoever finds us there may signal us
        status = _begun(run)
        if status.state.ended:
            return recorded(status)
        with _leased(run, plan):
            if interrupts.count:
                return _record(run, CALLED_OFF)
            handle = _start(run, status, plan, engine)
            reader = EventReader(run.events, offset=begins)
            while True:
                _watch_to_the_end(engine, handle, reader, audience, interrupts, plan, Standing(run, audience.say))
                outcome = _settle(run, engine)
                if not engine.keeps or outcome.state is not State.RUNNING:
                    return outcome


def hand_over(run: Run, plan: LaunchPlan) -> None:
    """Start a run that its engine carries on by itself: nobody keeps it, and whoever looks at it may record its end."""
    status = _begun(run)
    if not status.state.ended:
        _start(run, status.model_copy(update={"keeper": None}), plan, engine_named(plan.engine))


def going_on(folder: Path) -> bool:
    """Is the workload of the run in that folder still there?"""
    run = Run(folder)
    return run.status() is not None and settle(run).state is State.RUNNING


def attach(run: Run, watch: Watcher, say: Speaker) -> Outcome:
    """Watch, from its first event, a run that another process carries out; Ctrl-C only ends the watching."""
    reader, look, standing = EventReader(run.events), Pace(run), Standing(run, say)
    while True:
        outcome = look()
        for event in reader.poll() if outcome.state is State.RUNNING else reader.finish():
            watch(event)
        if outcome.state is not State.RUNNING:
            return outcome
        standing()
        time.sleep(POLL_SECONDS)


def settle(run: Run) -> Outcome:
    """How a run stands. A workload that ended while nobody kept the run is taken down and recorded now."""
    status = run.status()
    if status is None:
        return Outcome(State.LOST, Exit.WORKLOAD, "the run was killed before it had a record", remedy="run it again")
    if status.state.ended:
        return recorded(status)
    engine = engine_named(status.engine)
    if status.host not in ("", here()):
        # Its processes' numbers mean others here. What its engine knows by itself it says here too.
        young = time.time() - status.started < STARTING_SECONDS
        if not engine.keeps or (not status.handle and young):
            return Outcome(State.RUNNING, Exit.OK, f"kept on {status.host}")
    elif any(Process(**one).alive for one in (status.launcher, status.keeper) if one):
        return Outcome(State.RUNNING, Exit.OK)
    return _settle(run, engine)


def stop(run: Run, *, seconds: float, force: bool = False) -> Outcome:
    """Ask a run to stop and wait for it; it is ended when it has not stopped in time.

    Without a workload there is nothing to end: its keeper is asked, and stops what its engine may yet start. When
    the engine does not answer in time the outcome is a run that goes on, and says so.
    """
    deadline = time.monotonic() + seconds
    keeper_asked = workload_asked = call_off(run)
    look = Pace(run)
    while (outcome := look()).state is State.RUNNING:
        status = run.status()
        if status is None or status.state.ended:
            continue  # its end has been recorded just now
        _require_reach(run, status)
        late = time.monotonic() > deadline
        if status.handle:
            if late or not workload_asked:
                engine_named(status.engine).stop(status.handle, force=force or late)
                workload_asked = True
                deadline = float("inf") if late else deadline
        elif status.keeper and not keeper_asked and status.host in ("", here()):
            with suppress(ProcessLookupError):
                os.kill(status.keeper["pid"], signal.SIGTERM)
            keeper_asked = True  # once: a second signal would be the wish to end it without saving
        elif late:
            return dataclasses.replace(outcome, what=STILL_STARTING)
        time.sleep(POLL_SECONDS)
    return outcome


def call_off(run: Run, why: Outcome = CALLED_OFF) -> bool:
    """Have a run that no keeper has begun never begin. False for any other: its keeper is on record."""
    status = run.status()
    if status is None or status.state.ended:
        return False
    with run.changing():
        status = run.status()
        if status is None or status.state is not State.STARTING or status.keeper:
            return False
        _record(run, why)
        return True


class Pace:
    """How a run stands, asked no oftener than its engine likes to be; at once when its record has changed.

    `settled` is how it is found out, `times` as often as that may be the pause between two questions.
    """

    def __init__(self, run: Run, settled: Callable[[Run], Outcome] | None = None, times: float = 1.0) -> None:
        self._run, self._settled, self._times = run, settled or settle, times
        self._known: Outcome | None = None
        self._status: Status | None = None
        self._asked = 0.0

    def __call__(self) -> Outcome:
        status = self._run.status()
        pause = engine_named(status.engine).pause * self._times if status else 0.0
        if self._known is None or status != self._status or time.monotonic() - self._asked > pause:
            self._known, self._asked = self._settled(self._run), time.monotonic()
            self._status = self._run.status()
        return self._known


def here() -> str:
    """This machine's name, as a run's status has it."""
    return os.uname().nodename


def _require_reach(run: Run, status: Status) -> None:
    """MachineError for a run whose processes are another machine's."""
    if status.host not in ("", here()) and not engine_named(status.engine).keeps:
        raise MachineError(
            f"{run.id} is kept on {status.host}", where="RUN", remedy=f"there: radeon-stack runs stop {run.id}"
        )


@contextmanager
def _leased(run: Run, plan: LaunchPlan) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(leased(plan, lease_folder(run.path.parent.parent), going_on))
        except StackError as error:
            _record(run, Outcome(State.FAILED, error.exit_code, error.what, error.where, error.remedy))
            raise
        yield


def _start(run: Run, status: Status, plan: LaunchPlan, engine: Engine) -> Handle:
    try:
        told = run.events.stat().st_size if run.events.exists() else 0
        handle = {**engine.start(plan), "events_begin": told}
    except StackError as error:
        _record(run, refused(error, run))
        raise
    try:
        _write(run, status.model_copy(update={"state": State.RUNNING, "handle": dict(handle)}))
    except MachineError:
        engine.stop(handle, force=True)  # without its handle on record nobody could stop it later
        engine.wait(handle)
        raise
    return handle


def _begun(run: Run) -> Status:
    """The status with us as its keeper; as it was when the run has ended."""
    with run.changing():
        status = run.status()
        if status is None:
            raise MachineError("the run has no status record", where=str(run.path))
        if status.state.ended:
            return status
        begun = Status(
            state=State.STARTING,
            recipe=status.recipe,
            preset=status.preset,
            engine=status.engine,
            boot=ELSEWHERE if engine_named(status.engine).keeps else boot_id(Sysroot()),
            started=time.time(),
            keeper=dataclasses.asdict(Process.current()),
            host=here(),
        )
        _write(run, begun)
        return begun


def _write(run: Run, status: Status) -> None:
    try:
        run.write_status(status)
    except OSError as error:
        raise cannot_write(run.path, error) from error


def _watch_to_the_end(
    engine: Engine,
    handle: Handle,
    reader: EventReader,
    audience: Audience,
    interrupts: Interrupts,
    plan: LaunchPlan,
    standing: Standing,
) -> None:
    """The first signal to us asks the workload to stop; another one, or time run out, ends it."""
    answered, deadline = 0, float("inf")
    pump = Pump(lambda: engine.logs(handle))
    while pump.running():
        for event in reader.poll():
            audience.show(event)
        standing()
        late = time.monotonic() > deadline
        if interrupts.count > answered or late:
            force = answered > 0
            saves = "" if plan.ports else ": it saves first"
            audience.say("ending it now" if force else f"stopping{saves} (Ctrl-C again ends it now)")
            engine.stop(handle, force=force)
            answered = max(interrupts.count, 1)
            deadline = float("inf") if force else time.monotonic() + plan.stop_seconds
    for event in reader.finish():
        audience.show(event)


def _settle(run: Run, engine: Engine) -> Outcome:
    try:
        return _take_down(run, engine)
    except MachineError as error:
        # The engine does not answer: nothing is recorded, what became of the workload shows when it does again.
        if engine.keeps:
            return Outcome(State.RUNNING, Exit.OK, error.what, error.where, error.remedy)
        return Outcome(State.LOST, error.exit_code, error.what, error.where, error.remedy)


def _take_down(run: Run, engine: Engine) -> Outcome:
    status = run.status()
    if status is None:
        return UNSTARTED
    if not status.handle:
        return _lost(run, status)
    if engine.alive(status.handle):
        return Outcome(State.RUNNING, Exit.OK)
    engine.logs(status.handle)
    code = engine.wait(status.handle)
    recipe = run.read_json(run.config).get("recipe")
    expect = recipe.get("expect") if isinstance(recipe, dict) else None
    begins = engine.begins(status.handle)
    told = list(EventReader(run.events, offset=begins.events).finish())
    outcome = judge(code, told, expect if isinstance(expect, dict) else {}, run=run.id)
    if _for_want_of_room(run, outcome):
        remedy = f"free some room, then continue: radeon-stack run --resume {run.id}"
        outcome = Outcome(State.FAILED, Exit.WORKLOAD, FULL_DISK, str(run.path), remedy)
    elif outcome.state in (State.FAILED, State.LOST) and outcome.exit_code == Exit.WORKLOAD:
        outcome = explained(outcome, run, boot=status.boot, begins=begins.log)
    return _record(run, outcome)


def _lost(run: Run, status: Status) -> Outcome:
    """Record that nobody starts the run any more, unless another has begun it since that was its status."""
    with run.changing():
        if run.status() == status:
            return _record(run, UNSTARTED)
    return settle(run)


def _for_want_of_room(run: Run, outcome: Outcome) -> bool:
    """Did it fail of a full disk that it has not told itself? An expectation that did not hold has its own reason."""
    untold = outcome.exit_code == Exit.WORKLOAD and not outcome.what.startswith(FULL_DISK)
    return outcome.state is State.FAILED and untold and shutil.disk_usage(run.path).free < FULL_DISK_BYTES


def _record(run: Run, outcome: Outcome) -> Outcome:
    try:
        keep_answers(run)
    except MachineError as error:
        outcome = Outcome(State.FAILED, error.exit_code, error.what, error.where, error.remedy)
    status = run.status()
    if status is not None:
        try:
            run.write_status(closed(status, outcome, time.time()))
            write_report(run)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return _unrecorded(run, outcome)
    return outcome


def _unrecorded(run: Run, outcome: Outcome) -> Outcome:
    """The outcome that a full disk has no room for: it is found again, and recorded, by whoever asks next."""
    if outcome.what.startswith(FULL_DISK):
        return outcome
    what = f"{outcome.what}; {FULL_DISK}" if outcome.what else f"{FULL_DISK}: this end is not recorded yet"
    remedy = f"free some room, then {outcome.remedy}" if outcome.remedy else "free some room"
    return dataclasses.replace(outcome, what=what, where=outcome.where or str(run.path), remedy=remedy)
