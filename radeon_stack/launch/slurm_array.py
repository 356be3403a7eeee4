"""A sweep as one job array: a task for each of its runs, which the cluster begins as it has room."""

from __future__ import annotations

from collections.abc import Sequence

from radeon_stack import atomic
from radeon_stack.errors import Exit
from radeon_stack.launch.launcher import Draft
from radeon_stack.launch.sbatch import FOLDER, array
from radeon_stack.launch.slurm import SlurmEngine, prepared, submitted
from radeon_stack.launch.sweeping import Watcher, attach_sweep, stop_sweep, write_begun
from radeon_stack.runs.outcome import Outcome
from radeon_stack.runs.store import Run


class JobArray:
    """A `sweeping.Carrier`: nobody of ours keeps it."""

    def leave(self, sweep: Run, drafts: Sequence[Draft]) -> None:
        engine, plans = SlurmEngine(), [one.plan for one in drafts]
        script = sweep.path / FOLDER / "array.sh"
        text = array(sweep.path, plans)
        handles = {plan.run_id: prepared(plan, engine) for plan in plans}
        script.parent.mkdir(exist_ok=True)
        atomic.write_text(script, text)
        job = submitted(script, sweep.id)
        write_begun(
            sweep, {plan.run_id: {**handles[plan.run_id], "job": f"{job}_{task}"} for task, plan in enumerate(plans)}
        )

    def carry_out(self, sweep: Run, drafts: Sequence[Draft], watcher: Watcher) -> Outcome:
        self.leave(sweep, drafts)
        try:
            return attach_sweep(sweep, watcher)
        except KeyboardInterrupt:
            watcher.say("stopping all of them: they save first (Ctrl-C again leaves them to it)")
            outcome = stop_sweep(sweep, seconds=max(one.plan.stop_seconds for one in drafts))
            return outcome if outcome.state.ended else Outcome(outcome.state, Exit.INTERRUPTED, outcome.what)
