"""The server as a child: what it prints goes to the log, its last words are kept, and it is ended with us."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType

from radeon_stack.errors import WorkloadError
from radeon_stack.text import one_line

LAST_LINES = 200
STOP_SECONDS = 30.0  # then it is killed; the whole run has two minutes
TELLING = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt)\b.*|.*\b(error|failed|cannot)\b.*", re.IGNORECASE)


class Child:
    """A process for as long as the `with` lasts: asked to stop at its end, killed when it does not."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command, self._environment = command, environment
        self._last: deque[str] = deque(maxlen=LAST_LINES)

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
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(1.0)  # helpers of its own may hold the pipe open: the engine ends them with us

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> None:
        """Until it has ended."""
        self._process.wait()

    def failure(self) -> WorkloadError:
        """Why it ended, by its last line that tells."""
        self._reader.join(1.0)
        code = self._process.returncode
        why = last_words(list(self._last)) or (f"killed by signal {-code}" if code < 0 else f"exit code {code}")
        return WorkloadError(
            f"the server ended: {why}", where="log.txt", remedy="all it said: radeon-stack runs logs RUN"
        )

    def _pass_on(self) -> None:
        for line in self._process.stdout or ():
            text = line.decode(errors="replace")
            self._last.append(text)
            sys.stdout.write(text)
            sys.stdout.flush()


def last_words(lines: Sequence[str]) -> str:
    """The last line that names an error, else the last one."""
    told = [line.strip() for line in lines if line.strip()]
    telling = [line for line in told if TELLING.match(line)]
    return one_line((telling or told or [""])[-1], 300)
