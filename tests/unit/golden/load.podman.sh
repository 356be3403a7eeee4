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
