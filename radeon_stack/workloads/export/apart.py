"""A step in a process of its own: what it held is given back, its memory is its own, and a crash ends nobody else."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radeon_stack.errors import CheckError, MachineError, StackError, UsageError, WorkloadError
from radeon_stack.workloads.bench.isolate import how_it_ended, last_words

POLL_SECONDS = 0.1
FULL = "No space left on device"
OUT_OF_MEMORY = (
    "was it for want of memory? see dmesg for 'oom'; give more (--set resources.memory=…), or leave a loader out "
    "(--set loaders='[\"llama.cpp\"]'), and continue: radeon-stack run --resume RUN"
)
TAIL_BYTES = 64 << 10
TOLD: dict[str, type[StackError]] = {one.__name__: one for one in (CheckError, MachineError, UsageError, WorkloadError)}


@dataclass(frozen=True)
class Done:
    """What a step answered, how long it took (seconds) and the most memory it had (bytes, resident)."""

    value: dict[str, Any]
    seconds: float
    peak_memory: int


def called(module: str, request: Mapping[str, Any], tick: Callable[[], None] = lambda: None) -> Done:
    """Have `module:answer` take a request in a child and give its answer; `tick` is called while it works.

    The errors that a child tells in our words are raised here; WorkloadError has the last words of one that just ended.
    """
    with tempfile.TemporaryDirectory(prefix="radeon-stack-") as folder:
        asked, answered = Path(folder, "asked.json"), Path(folder, "answered.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", __name__, module, str(asked), str(answered)]
        code, done, said = _run(command, Path(folder, "said"), tick)
        told = json.loads(answered.read_text(encoding="utf-8")) if answered.is_file() else {}
    if number := told.get("errno"):
        raise OSError(number, os.strerror(number), told["file"])
    if error := told.get("error"):
        raise TOLD.get(error["kind"], WorkloadError)(error["what"], where=error["where"], remedy=error["remedy"])
    if code or "value" not in told:
        raise _ended(module.rpartition(".")[2], code, said)
    return Done(told["value"], done.seconds, done.peak_memory)


def run(command: Sequence[str], tick: Callable[[], None] = lambda: None) -> Done:
    """Run somebody else's program to its end. WorkloadError with its last words when it fails."""
    with tempfile.TemporaryDirectory(prefix="radeon-stack-") as folder:
        code, done, said = _run(command, Path(folder, "said"), tick)
    if code:
        raise _ended(Path(command[1]).name, code, said)
    return done


def _ended(name: str, code: int, said: str) -> WorkloadError:
    """The error for a process that ended without an answer. The kernel ends one without a word when memory is short."""
    killed = code == -signal.SIGKILL
    if FULL in said:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return WorkloadError(
        f"{name}: {how_it_ended(code)}: {said}",
        where="log.txt",
        remedy=OUT_OF_MEMORY if killed else "the whole of it: radeon-stack runs logs RUN",
    )


def _run(command: Sequence[str], said: Path, tick: Callable[[], None]) -> tuple[int, Done, str]:
    begun = time.monotonic()
    with said.open("wb") as output:
        # In this process's group: whoever ends that group, as engines do, ends it too.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            tick()
            time.sleep(POLL_SECONDS)
    finally:
        with suppress(ChildProcessError, ProcessLookupError):  # it has ended and was waited for
            os.waitpid(child.pid, os.WNOHANG)
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
        child.returncode = 0  # Popen need not wait for it
        text = _heard(said)
    code = os.waitstatus_to_exitcode(status)
    return code, Done({}, time.monotonic() - begun, usage.ru_maxrss << 10), " | ".join(last_words(text))


def _heard(said: Path) -> str:
    """Its end, once the whole of it is in the log."""
    with said.open("rb") as stream:
        while block := stream.read(1 << 20):
            sys.stderr.write(block.decode(errors="replace"))
        sys.stderr.flush()
        stream.seek(max(0, said.stat().st_size - TAIL_BYTES))
        return stream.read().decode(errors="replace")


def main(argv: Sequence[str]) -> int:
    """The child's side."""
    from importlib import import_module

    module, asked, answered = argv
    try:
        value = import_module(module).answer(json.loads(Path(asked).read_text(encoding="utf-8")))
        told: dict[str, Any] = {"value": value}
    except StackError as error:
        kind = type(error).__name__
        told = {"error": {"kind": kind, "what": error.what, "where": error.where, "remedy": error.remedy}}
    except OSError as error:  # its number is what a full disk is known by
        if error.errno is None:
            raise
        told = {"errno": error.errno, "file": str(error.filename or "")}
    Path(answered).write_text(json.dumps(told), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # an engine's threads may not end by themselves


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
