"""A LaunchPlan as the script of a Slurm job, which begins the run again where a cluster ends it before its time."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from radeon_stack.errors import UsageError
from radeon_stack.images.convert import Conversion, conversion, converting, loading
from radeon_stack.images.resolve import Image
from radeon_stack.images.sites import SiteImage
from radeon_stack.launch.node_containers import FORWARDED, words
from radeon_stack.launch.plan import Job, LaunchPlan

FOLDER = "slurm"  # of the run directory: the script, and what it notes
SCRIPT = f"{FOLDER}/job.sh"
ATTEMPT = f"{FOLDER}/attempt"
ENDED = f"{FOLDER}/ended"
BEGINS = f"{FOLDER}/begins"
IN_VAIN_NOTE = f"{FOLDER}/in-vain"
MARGIN_SECONDS = 60  # Slurm sends the signal up to so much off what it is told: sbatch(1), --signal
IN_VAIN = 3  # beginnings without a new checkpoint after which it is not begun again
MEBI = 1 << 20
# What the script itself is about: an option of the user's own would undo it.
OURS = (
    *("array", "chdir", "comment", "error", "export", "export-file", "input", "job-name", "kill-on-invalid-dep"),
    *("no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "requeue", "signal"),
    *("test-only", "wait", "wrap", "gpus", "gpus-per-node", "gpus-per-task", "partition", "account", "time"),
    *("dependency", "mem", "cpus-per-task"),
)
OPTION = re.compile(r"--([a-z][a-z0-9-]*)(=[!-~]+)?")  # a blank would begin another one


def script(plan: LaunchPlan) -> str:
    """The file that sbatch takes. It needs bash and Slurm's commands; UsageError for what it has no way to write."""
    job = _job(plan)
    run = shlex.quote(plan.run_dir)
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options(plan)),
            f"# {_about(plan)}",
            "",
            f"run={run}",
            f"notes=$run/{FOLDER}",
            *(f': "${{{name}:?export {name} before sbatch}}"' for name in plan.secrets),
            *(() if plan.image else _environment(plan)),
            _BEGINNING,
            _AGAIN if job.requeue else _NOT_AGAIN,
            *(_image(plan, job) if plan.image else ()),
            f'part {_folded(work(plan, job))} \\\n  "${{again[@]}}"',
            "leave",
            "",
        ]
    ).replace("\n\n\n", "\n\n")


def array(folder: Path, members: Sequence[LaunchPlan]) -> str:
    """One job for several runs alike: each task carries out the script of its own run."""
    first = members[0]
    if any(options_alike(member) != options_alike(first) for member in members):
        raise UsageError("its runs ask the cluster for different things", where="--sweep")
    runs = " ".join(shlex.quote(member.run_dir) for member in members)
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --job-name={job_name(folder.name)}",
            f"#SBATCH --array=0-{len(members) - 1}",
            f"#SBATCH --output={_pattern(folder / FOLDER)}/task-%a.txt",
            *(f"#SBATCH {option}" for option in options_alike(first)),
            f"# {len(members)} runs of {_name(first)}, written by radeon-stack",
            "",
            f"runs=({runs})",
            f'exec bash "${{runs[SLURM_ARRAY_TASK_ID]}}/{SCRIPT}" >>"${{runs[SLURM_ARRAY_TASK_ID]}}/log.txt" 2>&1',
            "",
        ]
    )


def job_name(run: str) -> str:
    """What the job of a run, or sweep, of that id is called."""
    return f"radeon-stack-{run}"


def options(plan: LaunchPlan) -> list[str]:
    """What is asked of Slurm, each as an option of sbatch(1)."""
    return [
        f"--job-name={job_name(plan.run_id)}",
        f"--output={_pattern(Path(plan.run_dir))}/log.txt",
        *options_alike(plan),
    ]


def options_alike(plan: LaunchPlan) -> list[str]:
    """Those that say nothing of which run it is."""
    job = _job(plan)
    for option in job.more:
        found = OPTION.fullmatch(option)
        if found is None or any(name.startswith(found[1]) for name in OURS):  # Slurm takes beginnings of its words
            raise UsageError(f"'{option}' is not for you to set here", where="--sbatch", remedy="--sbatch=--qos=high")
    lead = plan.stop_seconds + MARGIN_SECONDS
    if job.minutes is not None and job.minutes * 60 <= lead:
        raise UsageError(
            f"{job.minutes} min are over before anything is saved: {lead} s are kept for that",
            where="--time",
            remedy=f"ask for more than {-(-lead // 60)} minutes",
        )
    return [
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={job.cpus}",
        *([f"--gpus-per-node={job.gpus}"] if job.gpus else []),
        *([f"--mem={-(-plan.memory // MEBI)}M"] if plan.memory else []),
        *([f"--partition={_word(job.partition, '--partition')}"] if job.partition else []),
        *([f"--account={_word(job.account, '--account')}"] if job.account else []),
        *([f"--time={job.minutes}"] if job.minutes is not None else []),
        *([f"--dependency={_word(job.after, '--after')}", "--kill-on-invalid-dep=yes"] if job.after else []),
        "--chdir=/",
        "--open-mode=append",
        "--export=ALL",
        f"--signal=B:USR1@{lead}",
        "--requeue" if job.requeue else "--no-requeue",
        *job.more,
    ]


def srun(plan: LaunchPlan) -> list[str]:
    """One task a node; the first that ends badly ends the others, which have time to save."""
    job = _job(plan)
    # SLURM_EXPORT_ENV, SLURM_CPU_BIND and the like would come from a job in which sbatch was called.
    return [
        "srun",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={job.cpus}",
        "--export=ALL",
        "--kill-on-bad-exit=1",
        "--unbuffered",
    ]


def work(plan: LaunchPlan, job: Job) -> list[str]:
    """What is run on each node, by `srun`."""
    if plan.image is None:
        return [*srun(plan), *plan.command]
    around = words(plan, _conversion(plan, job).name, FORWARDED, storage=job.storage)
    return [*srun(plan), *around.srun, *around.before, *plan.command]


def _environment(plan: LaunchPlan) -> list[str]:
    return [*(f"unset {name}" for name in plan.unset), *(f"export {n}={shlex.quote(v)}" for n, v in plan.env)]


def _image(plan: LaunchPlan, job: Job) -> list[str]:
    """Have the image's file made, once for the site; and where each node has images of its own, put it there."""
    made = _conversion(plan, job)
    lines = ["image=$(cat <<'END'", converting(made).rstrip("\n"), "END", ")", 'part sh -c "$image"']
    if load := loading(made):
        lines += ["image=$(cat <<'END'", load.rstrip("\n"), "END", ")"]
        lines.append(f'part srun --nodes={job.nodes} --ntasks-per-node=1 sh -c "$image"')
    return [*lines, ""]


def _conversion(plan: LaunchPlan, job: Job) -> Conversion:
    image = SiteImage(Image(str(plan.image), "", ""), job.download, job.plain)
    return conversion(image, str(plan.client), Path(job.images), job.storage)


_BEGINNING = """
# The newest attempt is the run's: one on a node that was given up sees here that it is not, and leaves it alone.
attempt=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
export RADEON_STACK_ATTEMPT=$attempt
mkdir -p "$notes"
printf '%s\\n' "$attempt" >"$notes/attempt.$attempt" && mv "$notes/attempt.$attempt" "$notes/attempt" || exit 1
rm -f "$notes/ended"
size() { stat -c %s "$1" 2>/dev/null || echo 0; }
echo "$(size "$run/log.txt") $(size "$run/events.jsonl")" >"$notes/begins"
again=()
if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then rm -f "$notes/in-vain"; else again=(--resume); fi

# USR1: the time is nearly up. USR2: somebody stops the run. TERM: scancel, which tells the processes itself.
stopping='' step='' code=0
ask() {
  stopping=$1
  [ -n "$step" ] && (while kill -USR1 "$step" 2>/dev/null; do sleep 5; done) &
}
trap 'ask time' USR1
trap 'ask stop' USR2
trap 'stopping=${stopping:-cancelled}' TERM

# A signal ends a `wait`, not what is waited for; its exit code may be had by another one.
part() {
  "$@" </dev/null &
  step=$!
  [ -z "$stopping" ] || ask "$stopping"
  while :; do
    wait "$step"
    code=$?
    [ "$code" -gt 128 ] || break
    kill -0 "$step" 2>/dev/null && continue
    wait "$step" 2>/dev/null
    last=$?
    [ "$last" -eq 127 ] || code=$last
    break
  done
  [ "$code" -eq 0 ] || leave
}

end() {
  printf '%s %s\\n' "$attempt" "$code" >"$notes/ended.new" && mv "$notes/ended.new" "$notes/ended"
  exit "$code"
}
"""

_NOT_AGAIN = """
leave() {
  [ "$(cat "$notes/attempt")" = "$attempt" ] || exit 1
  end
}
"""

_AGAIN = f"""
# Of an array this task alone: the bare id of one of them is that of all.
id=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
id=${{id:-$SLURM_JOB_ID}}
saved() {{ ls "$run/artifacts/checkpoints" 2>/dev/null; }}
saved_before=$(saved)
about_the_job() {{ scontrol --oneliner show job "$id" 2>/dev/null; }}
# Begun again by the controller, which takes a node for lost that this script is on: the run is the next attempt's.
begun_again() {{
  case $(about_the_job) in
    *" Restarts=${{SLURM_RESTART_COUNT:-0}} "*) return 1 ;;
    *" Restarts="*) return 0 ;;
  esac
  return 1
}}
preempted() {{ about_the_job | grep -q 'PreemptTime=[0-9]'; }}
lost_a_node() {{
  [ "$SLURM_JOB_NUM_NODES" -gt 1 ] && ! timeout 60 \\
    srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 true
}}
# In place of an end: what was ended before its time is queued again.
leave() {{
  [ "$(cat "$notes/attempt")" = "$attempt" ] || exit 1
  [ "$code" -ne 0 ] || end
  ! begun_again || exit 1
  why=
  case $stopping in
    time) why='its time was up' ;;
    '') if preempted; then why='others came first'; elif lost_a_node; then why='a node does not answer'; fi ;;
  esac
  [ -n "$why" ] || end
  vain=0
  [ "$(saved)" != "$saved_before" ] || vain=$(($(cat "$notes/in-vain" 2>/dev/null || echo 0) + 1))
  echo "$vain" >"$notes/in-vain"
  if [ "$vain" -ge {IN_VAIN} ]; then
    echo "radeon-stack: $why, {IN_VAIN} times without a new checkpoint: not begun again" >&2
    end
  fi
  echo "radeon-stack: $why: it is queued again, and goes on from its last checkpoint" >&2
  for pause in 0 5 30 60 120 300; do
    sleep "$pause"
    scontrol requeue "$id" && exit 0
  done
  end
}}
"""


def _job(plan: LaunchPlan) -> Job:
    if plan.job is None:
        raise UsageError("this run asks nothing of a cluster", where="--as sbatch", remedy="add --engine slurm")
    return plan.job


def _name(plan: LaunchPlan) -> str:
    return plan.run_id.rpartition("-")[0] or plan.run_id


def _about(plan: LaunchPlan) -> str:
    whose = f"in {plan.client} on its nodes" if plan.image else f"with a Python that its nodes share: {plan.command[0]}"
    return f"{plan.run_id}, written by radeon-stack; it runs {whose}"


def _pattern(folder: Path) -> str:
    """A folder in a file name pattern of sbatch: `%` and `\\` mean something there, and blanks end the option."""
    text = str(folder)
    if re.search(r"[\\\s\"']", text):
        raise UsageError(f"Slurm cannot write to {text!r}", where="RADEON_STACK_HOME", remedy="a folder without blanks")
    return text.replace("%", "%%")


def _word(text: str | None, where: str) -> str:
    if not text or not re.fullmatch(r"[A-Za-z0-9_.,:+?@/-]+", text):
        raise UsageError(f"'{text}' is no name", where=where)
    return text


def _folded(words: Sequence[str]) -> str:
    """A command over several lines: each option on its own."""
    lines: list[str] = []
    for word in words:
        quoted = shlex.quote(word)
        if lines and (not word.startswith("--") or len(lines[-1]) + len(quoted) < 90):
            lines[-1] += f" {quoted}"
        else:
            lines.append(quoted)
    return " \\\n    ".join(lines)
