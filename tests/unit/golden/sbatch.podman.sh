#!/bin/bash
#SBATCH --job-name=radeon-stack-20260101-000000-train-llama-abcd
#SBATCH --output=/shared/home/runs/r/log.txt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=6144M
#SBATCH --time=60
#SBATCH --chdir=/
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
# 20260101-000000-train-llama-abcd, written by radeon-stack; it runs in podman on its nodes

run=/shared/home/runs/r
notes=$run/slurm
: "${HF_TOKEN:?export HF_TOKEN before sbatch}"

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

image=$(cat <<'END'
set -eu
umask 077
fail() { echo "radeon-stack: $(uname -n): $1; $2" >&2; exit 5; }
whole() { [ -f "$file" ] && [ "$(cat "$file.record" 2>/dev/null)" = "$reference $(stat -c %s "$file")" ]; }
lock() { exec 9>>"$1"; flock 9 2>/dev/null; }
room() {  # folder, KiB, remedy
  free=$(df -Pk "$1" | awk 'NR == 2 { print $4 }') || free=
  if [ -n "$free" ] && [ "$free" -lt "$2" ]; then
    fail "about $(($2 / 1024)) MiB are needed in $1, $((free / 1024)) are free" "$3"
  fi
}
own() {  # a folder in a place where everyone may write: made for us alone, or refused
  mkdir -m 700 "$1" 2>/dev/null || true
  if [ -L "$1" ] || [ "$(stat -c %u "$1")" != "$(id -u)" ]; then
    fail "$1 is not yours" "have it removed, or name another folder of this node"
  fi
}
file=/shared/home/images/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.tar
reference=registry.example.org/radeon/train@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
engine() { env -u XDG_RUNTIME_DIR -u DBUS_SESSION_BUS_ADDRESS podman --root /var/tmp/radeon-stack-1000/storage --runroot /var/tmp/radeon-stack-1000/run --cgroup-manager=cgroupfs --events-backend=none "$@" >&2 9>&-; }
steady() {
  (
    flock 9 2>/dev/null || true
    engine info >/dev/null 2>&1 || { engine system migrate && engine rm --all --force --time 0; }
  ) 9>>"$1/lock"
}
! whole || exit 0
mkdir -p /shared/home/images || fail 'cannot make /shared/home/images' 'or put the home folder elsewhere: RADEON_STACK_HOME=DIR'
if lock "$file.lock"; then locked=yes; else locked=; fi
! whole || exit 0
room /shared/home/images 25165824 'remove images that no run needs, or put the home folder elsewhere: RADEON_STACK_HOME=DIR'
own /var/tmp/radeon-stack-1000
room /var/tmp/radeon-stack-1000 25165824 'free some on this node'
steady /var/tmp/radeon-stack-1000
# What a killed attempt left; without a lock it may be another node's.
if [ -n "$locked" ]; then rm -rf -- "$file".*.partial; fi
partial="$file.$(uname -n).$$.partial"
trap 'rm -rf -- "$partial" "$partial.record"' EXIT
trap 'exit 130' INT TERM
engine pull --quiet registry.example.org/radeon/train@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa || fail 'podman made no image of registry.example.org/radeon/train@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' 'see above; what this node does not reach, a login node can convert'
engine tag registry.example.org/radeon/train@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa localhost/radeon-stack/site:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa || fail 'podman made no image of registry.example.org/radeon/train@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' 'see above; what this node does not reach, a login node can convert'
engine save --quiet --format oci-archive --output "$partial" localhost/radeon-stack/site:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa || fail 'podman made no image of registry.example.org/radeon/train@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' 'see above; what this node does not reach, a login node can convert'
sync "$partial"
echo "$reference $(stat -c %s "$partial")" >"$partial.record"
mv -f "$partial.record" "$file.record"
mv -f "$partial" "$file"
END
)
part sh -c "$image"
image=$(cat <<'END'
set -eu
umask 077
fail() { echo "radeon-stack: $(uname -n): $1; $2" >&2; exit 5; }
whole() { [ -f "$file" ] && [ "$(cat "$file.record" 2>/dev/null)" = "$reference $(stat -c %s "$file")" ]; }
lock() { exec 9>>"$1"; flock 9 2>/dev/null; }
room() {  # folder, KiB, remedy
  free=$(df -Pk "$1" | awk 'NR == 2 { print $4 }') || free=
  if [ -n "$free" ] && [ "$free" -lt "$2" ]; then
    fail "about $(($2 / 1024)) MiB are needed in $1, $((free / 1024)) are free" "$3"
  fi
}
own() {  # a folder in a place where everyone may write: made for us alone, or refused
  mkdir -m 700 "$1" 2>/dev/null || true
  if [ -L "$1" ] || [ "$(stat -c %u "$1")" != "$(id -u)" ]; then
    fail "$1 is not yours" "have it removed, or name another folder of this node"
  fi
}
file=/shared/home/images/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.tar
reference=registry.example.org/radeon/train@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
engine() { env -u XDG_RUNTIME_DIR -u DBUS_SESSION_BUS_ADDRESS podman --root /var/tmp/radeon-stack-1000/storage --runroot /var/tmp/radeon-stack-1000/run --cgroup-manager=cgroupfs --events-backend=none "$@" >&2 9>&-; }
steady() {
  (
    flock 9 2>/dev/null || true
    engine info >/dev/null 2>&1 || { engine system migrate && engine rm --all --force --time 0; }
  ) 9>>"$1/lock"
}
own /var/tmp/radeon-stack-1000
steady /var/tmp/radeon-stack-1000
lock /var/tmp/radeon-stack-1000/lock || true
# Containers of jobs that were killed; those that run stay.
engine container prune --force || true
! engine image exists localhost/radeon-stack/site:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa || exit 0
whole || fail "there is no whole $file" "convert the image first, on a node that reaches its registry"
room /var/tmp/radeon-stack-1000 25165824 'on this node: env -u XDG_RUNTIME_DIR -u DBUS_SESSION_BUS_ADDRESS podman --root /var/tmp/radeon-stack-1000/storage --runroot /var/tmp/radeon-stack-1000/run --cgroup-manager=cgroupfs --events-backend=none image prune --all'
engine load --quiet --input "$file" || fail 'podman made no image of registry.example.org/radeon/train@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' 'see above; what this node does not reach, a login node can convert'
engine image exists localhost/radeon-stack/site:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa || fail "podman loaded another image than $file is of" "remove that file: it is then made anew"
END
)
part srun --nodes=2 --ntasks-per-node=1 sh -c "$image"

part srun --nodes=2 --ntasks-per-node=1 --cpus-per-task=8 --export=ALL --kill-on-bad-exit=1 \
    --unbuffered env -u XDG_RUNTIME_DIR -u DBUS_SESSION_BUS_ADDRESS podman --root /var/tmp/radeon-stack-1000/storage \
    --runroot /var/tmp/radeon-stack-1000/run --cgroup-manager=cgroupfs --events-backend=none run \
    --rm --pull=never --cgroups=disabled --log-driver=none --workdir=/ --init --read-only \
    --user 0:0 --shm-size 1073741824 --ipc private --network host --cap-drop ALL \
    --security-opt no-new-privileges --tmpfs /tmp --device /dev/kfd --device /dev/dri \
    --group-add keep-groups --mount type=bind,source=/shared/home/runs/r/config.json,target=/radeon-stack/run/config.json,readonly \
    --mount type=bind,source=/shared/home/cache,target=/radeon-stack/cache --env HOME=/radeon-stack/cache \
    --env 'NOTE=a, b=$HOME' --env HF_TOKEN --label radeon-stack.run=/shared/home/runs/r \
    --stop-signal SIGTERM --stop-timeout 120 --env ROCR_VISIBLE_DEVICES --env HIP_VISIBLE_DEVICES \
    --env CUDA_VISIBLE_DEVICES --env GPU_DEVICE_ORDINAL --env RANK --env WORLD_SIZE --env LOCAL_RANK \
    --env LOCAL_WORLD_SIZE --env GROUP_RANK --env MASTER_ADDR --env MASTER_PORT --env 'SLURM_*' \
    --env RADEON_STACK_ATTEMPT --entrypoint= localhost/radeon-stack/site:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa /opt/venv/bin/python \
  "${again[@]}"
leave
