"""The server as a child: what it prints goes to the log, its last words are kept, and it is ended with us."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType

from radeon_stack.errors import WorkloadError
from radeon_stack.text import one_line

LAST_LINES = 200
STOP_SECONDS = 30.0  # then it is killed; the whole run has two minutes
# vLLM computes in a process of its own. When that has failed, its server may stay for ever, and answer nobody.
ENGINE_FAILED = re.compile(
    r"EngineCore (failed to start|encountered a fatal error)\.$|RuntimeError: Engine core initialization failed\b"
    r"|\[shutdown\] \w+: engine core exited unexpectedly|(Engine core|Worker) proc .* died unexpectedly"  # killed
)
REASON_SECONDS = 2.0  # that it has to say why, or to end by itself
FAILED_SECONDS = 3.0  # that it has to stop then
POLL_SECONDS = 0.2
ELSEWHERE = "See root cause above"
COLOUR = re.compile(r"\x1b\[[\d;]*m")
# `(EngineCore_DP0 pid=12) ERROR 09-18 10:34:29 [core.py:718] `: who of vLLM's processes says it, and where.
PREFIX = re.compile(r"(\(\w+ pid=\d+\) +)?([A-Z]+ [\d-]+ [\d:]+ \[[\w./-]+:\d+\] +)?")
TELLING = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt)\b.*|.*\b(error|failed|cannot)\b.*", re.IGNORECASE)


class Child:
    """A process for as long as the `with` lasts: asked to stop at its end, killed when it does not."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command, self._environment = command, environment
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._failed: float | None = None
        """Since when it says that its engine has failed."""

    def __enter__(self) -> Child:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment,
        )
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS if self._failed is None else FAILED_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(1.0)  # helpers of its own may hold the pipe open: the engine ends them with us

    @property
    def ended(self) -> bool:
        """Has its process ended, or what computes for it?"""
        if self._process.poll() is not None:
            return True
        return self._failed is not None and time.monotonic() - self._failed > REASON_SECONDS

    def wait(self, seconds: float = math.inf) -> None:
        """Until it has ended, or so long."""
        deadline = time.monotonic() + seconds
        while not self.ended and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def failure(self) -> WorkloadError:
        """Why it ended, by its last line that tells."""
        code = self._process.poll()
        if code is not None:
            self._reader.join(1.0)
        why = last_words(list(self._last)) or (
            f"killed by signal {-code}" if code and code < 0 else f"exit code {code}"
        )
        return WorkloadError(
            f"the server ended: {why}" if code is not None else f"the server's engine failed: {why}",
            where="log.txt",
            remedy="all it said: radeon-stack runs logs RUN",
        )

    def _pass_on(self) -> None:
        for line in self._process.stdout or ():
            text = line.decode(errors="replace")
            self._last.append(text)
            if self._failed is None and ENGINE_FAILED.match(_bare(text)):
                self._failed = time.monotonic()
            sys.stdout.write(text)
            sys.stdout.flush()


def last_words(lines: Sequence[str]) -> str:
    """The last line that names an error, else the last one; not one that sends its reader to another."""
    told = [bare for line in lines if (bare := _bare(line))]
    telling = [line for line in told if TELLING.match(line)]
    own = [line for line in telling if ELSEWHERE not in line]
    return one_line((own or telling or told or [""])[-1], 300)


def _bare(line: str) -> str:
    """What is said, without who says it."""
    line = COLOUR.sub("", line).strip()
    match = PREFIX.match(line)
    return line[match.end() :] if match else line
