"""A sweep, which is several runs: written down at once, carried out, watched, stopped and settled as one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Protocol

from radeon_stack.errors import Exit, MachineError, StackError
from radeon_stack.host.processes import Process
from radeon_stack.launch.engine import Handle, engine_named
from radeon_stack.launch.interrupts import interrupted
from radeon_stack.launch.launcher import Draft, begun_by_another, read_plan, write_records
from radeon_stack.launch.supervise import ELSEWHERE, FULL, FULL_DISK, UNSTARTED, Pace, call_off, carry_out, settle, stop
from radeon_stack.runs.events import Event, EventReader
from radeon_stack.runs.outcome import Outcome, closed, recorded
from radeon_stack.runs.store import Run, RunStore, State, Status, cannot_write
from radeon_stack.runs.sweep import Sweep, judge_sweep, members_of, read_sweep, write_sweep
from radeon_stack.runs.sweep_report import write_sweep_report

POLL_SECONDS = 0.1
AT_ONCE = 4  # members that an engine may be asked after as often as after one run
UNWRITTEN = Outcome(State.LOST, Exit.WORKLOAD, "the sweep was killed before it had a record", remedy="run it again")
GOES_ON = "a member goes on: its engine has not stopped it yet"


class Watcher(Protocol):
    """Who is shown a sweep: `runs.sweep_view` has one for a terminal."""

    def __call__(self, at: int, event: Event) -> None: ...

    def ended(self, at: int, outcome: Outcome) -> None: ...

    def say(self, text: str) -> None: ...


class Carrier(Protocol):
    """How an engine has the members carried out whose records are written: `starting`, with their launcher on record.

    An engine that begins them all at once, and needs no process of ours for them to go on, starts the drafts' plans,
    puts the handles on record by `write_begun`, and has `attach_sweep` watch: whoever asks next settles what has ended.
    """

    def carry_out(self, sweep: Run, drafts: Sequence[Draft], watcher: Watcher) -> Outcome:
        """Have them carried out and watch to the end of the last."""

    def leave(self, sweep: Run, drafts: Sequence[Draft]) -> None:
        """Have them carried out by something that outlives us; returns when that has begun."""


def carrier_for(drafts: Sequence[Draft]) -> Carrier:
    """Who carries these members out; they are all of one engine."""
    if engine_named(drafts[0].plan.engine).keeps:
        from radeon_stack.launch.slurm_array import JobArray

        return JobArray()
    return InTurn()


class InTurn:
    """One member after the other, by a process of ours: what a workstation has room for."""

    def carry_out(self, sweep: Run, drafts: Sequence[Draft], watcher: Watcher) -> Outcome:
        return keep(sweep, watcher)

    def leave(self, sweep: Run, drafts: Sequence[Draft]) -> None:
        if begun_by_another(sweep):
            return
        for run in members_of(sweep):
            call_off(run, UNSTARTED)
        if (status := sweep.status()) is not None:
            _record(sweep, UNSTARTED, status)
        raise MachineError(
            "the sweep did not start", where=str(sweep.path), remedy=f"see: radeon-stack runs show {sweep.id}"
        )


class Silent:
    """Nobody watches."""

    def __call__(self, at: int, event: Event) -> None:
        pass

    def ended(self, at: int, outcome: Outcome) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def write_sweep_records(sweep: Run, record: Sweep, drafts: Sequence[Draft], store: RunStore) -> None:
    """Write the sweep's records and those of the drafted members. MachineError when that cannot be done."""
    first = drafts[0]
    try:
        sweep.path.mkdir(parents=True, exist_ok=True)
        write_sweep(sweep, record)
        sweep.write_status(
            Status(
                state=State.STARTING,
                recipe=first.effective.name,
                preset=first.effective.preset,
                engine=first.plan.engine,
                launcher=asdict(Process.current()),
                started=time.time(),
            )
        )
    except OSError as error:
        raise cannot_write(store.home, error) from error
    for one in drafts:
        write_records(one, store)


def write_begun(sweep: Run, handles: Mapping[str, Handle]) -> None:
    """Put on record what an engine has begun at once: the handle of each member, by the id of its run.

    No process of ours is their keeper: that a member has ended is found by `settle`, and the sweep's end by
    `settle_sweep`. One that was called off meanwhile is ended.
    """
    for run in members_of(sweep):
        if run.id not in handles:
            continue
        with run.changing():
            status = run.status()
            if status is None:
                continue
            if status.state.ended:
                engine_named(status.engine).stop(handles[run.id], force=True)
                continue
            told = run.events.stat().st_size if run.events.exists() else 0
            handle = {**handles[run.id], "events_begin": told}
            going: dict[str, object] = {"state": State.RUNNING, "launcher": None, "handle": handle, "boot": ELSEWHERE}
            going["started"] = time.time()
            run.write_status(status.model_copy(update=going))
    with sweep.changing():
        status = sweep.status()
        if status is not None and not status.state.ended:
            sweep.write_status(status.model_copy(update={"state": State.RUNNING, "launcher": None}))


def keep(sweep: Run, watcher: Watcher) -> Outcome:
    """Carry out what has not ended, one after the other. One that fails does not keep the others from their turn.

    The first signal to us stops the member that goes on, as a run is stopped, and no other is begun.
    """
    runs = members_of(sweep)
    with interrupted() as wish:
        status = _begun(sweep, runs)
        if status.state.ended:
            return recorded(status)
        for at, run in enumerate(runs):
            if wish.count:
                call_off(run)
            outcome = settle(run) if wish.count else _carried_out(run, partial(watcher, at), watcher.say)
            _quietly(partial(watcher.ended, at, outcome))
            with suppress(OSError):  # a full disk, which the next records will tell of
                write_sweep_report(sweep)
        return _settle(sweep, status, interrupted=wish.count > 0)


def settle_sweep(sweep: Run) -> Outcome:
    """How the sweep stands; its end is recorded now where nobody keeps it and no member goes on.

    One whose members were continued one by one until all were done is done. UsageError for a damaged record.
    """
    status = sweep.status()
    if status is None:
        return UNWRITTEN
    if status.state.ended and (status.state is State.DONE or not _all_done(sweep)):
        return recorded(status)
    if any(Process(**one).alive for one in (status.launcher, status.keeper) if one and not status.state.ended):
        return Outcome(State.RUNNING, Exit.OK)
    return _settle(sweep, status)


def attach_sweep(sweep: Run, watcher: Watcher) -> Outcome:
    """Watch, from the first event of each member, a sweep that others carry out; Ctrl-C only ends the watching."""
    waited = {at: (run, EventReader(run.events)) for at, run in enumerate(members_of(sweep))}
    look = Pace(sweep, settle_sweep, times=max(1.0, len(waited) / AT_ONCE))
    while True:
        outcome = look()
        for at, (run, reader) in list(waited.items()):
            status = run.status()  # before the events: an ended one tells no more
            ended = status is not None and status.state.ended
            for event in reader.finish() if ended else reader.poll():
                watcher(at, event)
            if status is not None and ended:
                watcher.ended(at, recorded(status))
                del waited[at]
        if outcome.state is not State.RUNNING:
            return outcome
        time.sleep(POLL_SECONDS)


def stop_sweep(sweep: Run, *, seconds: float, force: bool = False) -> Outcome:
    """Stop every member that goes on; those that nobody has begun are not begun any more."""
    deadline = time.monotonic() + seconds
    runs = members_of(sweep)
    for run in reversed(runs):  # the last first: else the keeper would begin the one that we come to next
        call_off(run)
    going = [run for run in runs if settle(run).state is State.RUNNING]
    with ThreadPoolExecutor(max_workers=max(1, len(going))) as together:  # each has the same time to save
        ends = list(together.map(partial(stop, seconds=seconds, force=force), going))
    if left := next((end for end in ends if not end.state.ended), None):
        return left
    while (outcome := settle_sweep(sweep)).state is State.RUNNING:  # its keeper records the end
        if time.monotonic() > deadline:
            return replace(outcome, what=GOES_ON)
        time.sleep(POLL_SECONDS)
    return outcome


def _begun(sweep: Run, runs: Sequence[Run]) -> Status:
    """The sweep's status with us as its keeper; as it was when it has ended."""
    with sweep.changing():
        status = sweep.status()
        if status is None:
            raise MachineError("the sweep has no status record", where=str(sweep.path))
        if status.state.ended:
            return status
        try:
            for run in runs:
                _adopt(run)  # before the sweep is seen to go on: who launched it may end then
            begun = status.model_copy(
                update={"state": State.RUNNING, "launcher": None, "keeper": asdict(Process.current())}
            )
            sweep.write_status(begun)
        except OSError as error:
            raise cannot_write(sweep.path, error) from error
        return begun


def _adopt(run: Run) -> None:
    """Be the one who will have this member carried out: while we live, it is not lost."""
    if not run.path.is_dir():
        return
    with run.changing():
        status = run.status()
        if status is not None and status.state is State.STARTING and status.keeper is None:
            run.write_status(status.model_copy(update={"launcher": asdict(Process.current())}))


def _carried_out(run: Run, watch: Callable[[Event], None], say: Callable[[str], None]) -> Outcome:
    try:
        return carry_out(run, read_plan(run), watch, say)
    except StackError as error:
        outcome = Outcome(State.FAILED, error.exit_code, error.what, error.where, error.remedy)
    except OSError as error:
        outcome = Outcome(State.FAILED, Exit.MACHINE, error.strerror or str(error), str(run.path))
    call_off(run, outcome)  # where it did not come to a record of its own
    _quietly(partial(say, f"{run.id}: {outcome.what}; the others go on"))
    return outcome


def _quietly(tell: Callable[[], None]) -> None:
    with suppress(OSError):  # its pipe or terminal has gone: nobody looks
        tell()


def _all_done(sweep: Run) -> bool:
    statuses = [run.status() for run in members_of(sweep)]
    return all(status is not None and status.state is State.DONE for status in statuses)


def _settle(sweep: Run, seen: Status, *, interrupted: bool = False) -> Outcome:
    """Judge the sweep by its members, and record that unless one of them goes on or cannot be asked."""
    members = read_sweep(sweep).members
    runs = members_of(sweep)
    ends = [settle(run) for run in runs]
    if any(end.state is State.RUNNING for end in ends):
        return Outcome(State.RUNNING, Exit.OK)
    outcome = judge_sweep(sweep, list(zip(members, ends, strict=True)), interrupted=interrupted)
    if any((status := run.status()) is not None and not status.state.ended for run in runs):
        return outcome  # its engine does not answer: that is seen when it does again
    return _record(sweep, outcome, seen)


def _record(sweep: Run, outcome: Outcome, seen: Status) -> Outcome:
    """Record the end, unless another has recorded or begun something since the status was the `seen` one."""
    with sweep.changing():
        status = sweep.status()
        if status != seen:
            return recorded(status) if status and status.state.ended else Outcome(State.RUNNING, Exit.OK)
        try:
            sweep.write_status(closed(status, outcome, time.time()))
            write_sweep_report(sweep)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return replace(outcome, what=f"{outcome.what}; {FULL_DISK}".removeprefix("; "), where=str(sweep.path))
    return outcome
