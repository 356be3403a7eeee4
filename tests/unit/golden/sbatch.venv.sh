#!/bin/bash
#SBATCH --job-name=radeon-stack-20260101-000000-train-llama-abcd
#SBATCH --output=/shared/home/runs/20260101-000000-train-llama-abcd/log.txt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=6144M
#SBATCH --account=lab
#SBATCH --time=60
#SBATCH --dependency=afterok:7
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --chdir=/
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
# 20260101-000000-train-llama-abcd, written by radeon-stack; it runs with a Python that its nodes share: /shared/venv/bin/python

run=/shared/home/runs/20260101-000000-train-llama-abcd
notes=$run/slurm
unset PYTHONPATH
export PYTHONUNBUFFERED=1
export NOTE='it'"'"'s $HOME'

# The newest attempt is the run's: one on a node that was given up sees here that it is not, and leaves it alone.
attempt=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
export RADEON_STACK_ATTEMPT=$attempt
mkdir -p "$notes"
printf '%s\n' "$attempt" >"$notes/attempt.$attempt" && mv "$notes/attempt.$attempt" "$notes/attempt" || exit 1
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
  printf '%s %s\n' "$attempt" "$code" >"$notes/ended.new" && mv "$notes/ended.new" "$notes/ended"
  exit "$code"
}

# Of an array this task alone: the bare id of one of them is that of all.
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
id=${id:-$SLURM_JOB_ID}
saved() { ls "$run/artifacts/checkpoints" 2>/dev/null; }
saved_before=$(saved)
about_the_job() { scontrol --oneliner show job "$id" 2>/dev/null; }
# Begun again by the controller, which takes a node for lost that this script is on: the run is the next attempt's.
begun_again() {
  case $(about_the_job) in
    *" Restarts=${SLURM_RESTART_COUNT:-0} "*) return 1 ;;
    *" Restarts="*) return 0 ;;
  esac
  return 1
}
preempted() { about_the_job | grep -q 'PreemptTime=[0-9]'; }
lost_a_node() {
  [ "$SLURM_JOB_NUM_NODES" -gt 1 ] && ! timeout 60 \
    srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 true
}
# In place of an end: what was ended before its time is queued again.
leave() {
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
  if [ "$vain" -ge 3 ]; then
    echo "radeon-stack: $why, 3 times without a new checkpoint: not begun again" >&2
    end
  fi
  echo "radeon-stack: $why: it is queued again, and goes on from its last checkpoint" >&2
  for pause in 0 5 30 60 120 300; do
    sleep "$pause"
    scontrol requeue "$id" && exit 0
  done
  end
}

part srun --nodes=2 --ntasks-per-node=1 --cpus-per-task=8 --export=ALL --kill-on-bad-exit=1 \
    --unbuffered /shared/venv/bin/python -m radeon_stack.workloads.node --nodes 2 --processes 1 \
  "${again[@]}"
leave
