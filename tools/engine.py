"""A private, throw-away Docker engine for tests: `python tools/engine.py start --root DIR`, then `stop`.

`start` prints the DOCKER_HOST to use and nothing else on stdout. The engine has its own data, state, socket
and pid file below DIR, so it shares nothing with an engine that may be running, and `stop` ends this one alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

START_SECONDS = 60
STOP_SECONDS = 30
POLL_SECONDS = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("--root", type=Path, required=True, help="the engine's folder")
    arguments = parser.parse_args()
    root: Path = arguments.root.absolute()
    return start(root) if arguments.action == "start" else stop(root)


def start(root: Path) -> int:
    """Start the engine unless it answers already; exit code 3 when it cannot be had."""
    if not answers(root):
        if why := impossible():
            return fail(why)
        root.mkdir(parents=True, exist_ok=True)
        with (root / "dockerd.log").open("wb") as log:
            child = subprocess.Popen(
                command(root), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not answers(root):
            if child.poll() is not None or time.monotonic() > deadline:
                tail = (root / "dockerd.log").read_text(errors="replace").splitlines()[-5:]
                return fail("the engine did not start:\n" + "\n".join(tail))
            time.sleep(POLL_SECONDS)
    print(f"unix://{root / 'docker.sock'}")
    return 0


def stop(root: Path) -> int:
    """End the engine of this folder by its pid, and wait for it to be gone."""
    try:
        pid = int((root / "docker.pid").read_text())
        # The pid may be another process's by now: only a dockerd of this folder is ended.
        if str(root) not in Path(f"/proc/{pid}/cmdline").read_text():
            return 0
        os.kill(pid, signal.SIGTERM)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return 0
    deadline = time.monotonic() + STOP_SECONDS
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            return fail(f"the engine (pid {pid}) does not end")
        time.sleep(POLL_SECONDS)
    return 0


def command(root: Path) -> list[str]:
    return [
        "dockerd",
        *("--data-root", str(root / "data")),
        *("--exec-root", str(root / "exec")),
        *("--pidfile", str(root / "docker.pid")),
        *("--host", f"unix://{root / 'docker.sock'}"),
    ]


def impossible() -> str:
    """Why no engine can be started here, or nothing."""
    if shutil.which("dockerd") is None:
        return "dockerd is not installed (Debian: apt-get install --no-install-recommends docker.io)"
    if os.geteuid() != 0:
        return "dockerd needs root"
    return ""


def answers(root: Path) -> bool:
    """Does the engine answer a ping on its socket?"""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(2)
        try:
            connection.connect(str(root / "docker.sock"))
            connection.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            return b"200 OK" in connection.recv(256)
        except OSError:
            return False


def fail(why: str) -> int:
    print(f"engine: {why}", file=sys.stderr)
    return 3


if __name__ == "__main__":
    sys.exit(main())
