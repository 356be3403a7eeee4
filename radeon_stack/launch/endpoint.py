"""What a run has that answers on a port: the port, a key of its own, and how it is called by both.

The key is a file in the run directory, which its owner alone can read. A variable would show in `docker inspect`, and
in the environment of every process below; an argument, to everyone on the machine.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shlex
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from radeon_stack import atomic
from radeon_stack.catalog.load import Effective
from radeon_stack.contracts.sections import Listens
from radeon_stack.contracts.serve import KEY_FILE
from radeon_stack.dialogue import Endpoint
from radeon_stack.errors import MachineError, UsageError
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.torchrun import LOOPBACK
from radeon_stack.runs.events import Fact, read_events
from radeon_stack.runs.store import Run
from radeon_stack.text import one_line

KEY_VARIABLE = "RADEON_STACK_API_KEY"
KEY = re.compile(r"[!-~]{16,512}")  # what an HTTP header takes, and nobody guesses
KEY_BYTES = 32
FACT = "endpoint"
MOST_OF_A_NAME = 200


def with_port(effective: Effective, *, live: bool) -> Effective:
    """The recipe with a port that is free: its own, or one that the kernel gives where it says 0.

    MachineError for one that is taken, where it is the machine that we are on. UsageError for a key that is none.
    """
    if not isinstance(effective.config, Listens) or (effective.config.port and not live):
        return effective
    _given_key(os.environ)
    config = effective.config.model_copy(update={"port": _free(effective.config.port)})
    return replace(effective, config=config)


def _free(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: one that ended just now is no bar
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise MachineError(
                f"port {port} of {LOOPBACK} is {'taken' if taken else f'not to be had: {error.strerror}'}",
                where="config.port",
                remedy="take another, or one that is free: --set port=0",
            ) from error
        return int(probe.getsockname()[1])


def write_key(folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Write the key that clients have to send: `RADEON_STACK_API_KEY`, or a new one unless the run has one already."""
    given = _given_key(environ)
    file = folder / KEY_FILE
    if given is not None or not file.exists():
        atomic.write_text(file, given or secrets.token_urlsafe(KEY_BYTES), mode=0o600)


def _given_key(environ: Mapping[str, str]) -> str | None:
    given = environ.get(KEY_VARIABLE)
    if given is not None and not KEY.fullmatch(given):
        raise UsageError(
            "not a key: 16 to 512 printable ASCII characters, without blanks",
            where=KEY_VARIABLE,
            remedy="unset it, and one is made",
        )
    return given


def key_line(folder: Path) -> str:
    """A shell line that does the same by hand. Its parentheses keep the umask to itself."""
    file = shlex.quote(str(folder / KEY_FILE))
    return f"(umask 077; head -c {KEY_BYTES} /dev/urandom | base64 -w 0 | tr '+/' '-_' | tr -d = > {file})"


def endpoint_of(run: Run) -> Endpoint:
    """Where a run answers, by its plan: not by what the workload tells. UsageError where it does not."""
    try:
        ports = LaunchPlan.from_record(run.read_json(run.plan)).ports
    except (KeyError, TypeError, ValueError):
        ports = ()
    if not ports:
        how = "start one that does: radeon-stack run serve --from last"
        raise UsageError(f"{run.id} answers on no port", remedy=how)
    try:
        key = (run.path / KEY_FILE).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise UsageError("there is no key to be read", where=str(run.path / KEY_FILE)) from error
    return Endpoint(ports[0].address, ports[0].host, key, model=served(run))


def served(run: Run) -> str:
    """The model's name for clients; "" while it does not answer yet, also where an earlier attempt did."""
    status = run.status()
    told = [event for event in read_events(run.events) if isinstance(event, Fact) and event.name == FACT]
    if not told or status is None or told[-1].time < status.started or not isinstance(told[-1].value, dict):
        return ""
    return one_line(str(told[-1].value.get("model", "")), MOST_OF_A_NAME)


def how_to_call(run: Run, endpoint: Endpoint) -> list[str]:
    """What a person types. The key stays in its file: an argument would show it to everyone on the machine."""
    file = shlex.quote(str(run.path / KEY_FILE))
    told = json.dumps({"model": endpoint.model, "messages": [{"role": "user", "content": "Hello"}]})
    return [
        f"serving {endpoint.model} at {endpoint.url}",
        f"  curl {endpoint.url}/chat/completions -H 'Content-Type: application/json' \\",
        f'    -H @<(echo "Authorization: Bearer $(cat {file})") \\',
        f"    -d {shlex.quote(told)}",
        f"  openai.OpenAI(base_url={endpoint.url!r}, api_key=open({str(run.path / KEY_FILE)!r}).read())",
        f"  radeon-stack chat --to {run.id}",
    ]
