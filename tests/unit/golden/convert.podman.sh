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
