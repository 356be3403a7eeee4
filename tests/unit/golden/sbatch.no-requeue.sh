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
#SBATCH --no-requeue
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

leave() {
  [ "$(cat "$notes/attempt")" = "$attempt" ] || exit 1
  end
}

part srun --nodes=2 --ntasks-per-node=1 --cpus-per-task=8 --export=ALL --kill-on-bad-exit=1 \
    --unbuffered /shared/venv/bin/python -m radeon_stack.workloads.node --nodes 2 --processes 1 \
  "${again[@]}"
leave
