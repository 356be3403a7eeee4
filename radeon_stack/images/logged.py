"""Commands whose output goes to a log, told as steps. Whatever ends us ends them too."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from radeon_stack.errors import StackError
from radeon_stack.images.progress import Step, reason

Command = Sequence[str]
PATIENCE_SECONDS, POLL_SECONDS = 5.0, 0.05


@dataclass(frozen=True)
class Logged:
    """Runs commands. `what` they are for is named in errors; `held` are descriptors that they keep open."""

    what: str
    log: Path
    tell: Callable[[Step], None]
    held: tuple[int, ...] = ()

    def run(
        self,
        title: str,
        *commands: Command,
        env: Mapping[str, str],
        failing: type[StackError],
        remedy: str = "",
    ) -> float:
        """Run them in their order as one step; its seconds. `failing` is raised with why one failed, and the log."""
        self.tell(Step(title, "running"))
        began = time.monotonic()
        for command in commands:
            with self.log.open("ab") as log:
                log.write(f"$ {shlex.join(command)}\n".encode())
                log.flush()
                begins = log.tell()
                code = self._wait(command, env, log.fileno())
            if code:
                self.tell(Step(title, "failed"))
                with self.log.open(encoding="utf-8", errors="replace") as log_text:
                    log_text.seek(begins)
                    why = reason(log_text)
                full = f"the full log: {self.log}"
                raise failing(why, where=f"{self.what}: {title}", remedy=f"{remedy}; {full}" if remedy else full)
        seconds = time.monotonic() - began
        self.tell(Step(title, "done", seconds))
        return seconds

    def _wait(self, command: Command, env: Mapping[str, str], output: int) -> int:
        """The exit code. An exception in the meantime, as by Ctrl-C, ends it with all that it has started."""
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            pass_fds=self.held,
        )
        try:
            return child.wait()
        except BaseException:
            _end(child)
            raise


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child and its group. Asked first: ninja's compilers are in groups of their own, and it ends them itself."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            child.poll()  # without this it would stay in its group
            os.killpg(child.pid, 0)
            time.sleep(POLL_SECONDS)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
