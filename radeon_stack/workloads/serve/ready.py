"""A health check proves nothing: a server is ready when it has answered a question."""

from __future__ import annotations

import threading
import time

from radeon_stack.contracts.serve import HEALTH
from radeon_stack.dialogue import Endpoint, answer, healthy
from radeon_stack.errors import WorkloadError
from radeon_stack.workloads.serve.child import REASON_SECONDS, Child

POLL_SECONDS = 0.2
QUESTION = [{"role": "user", "content": "Hello"}]
TOKENS = 4


def wait_until_it_answers(endpoint: Endpoint, child: Child, seconds: float) -> None:
    """Returns when it has. WorkloadError with its last words when it ended, or did not in so many seconds."""
    deadline = time.monotonic() + seconds
    while not healthy(endpoint, HEALTH):
        if child.ended:
            raise child.failure()
        if time.monotonic() > deadline:
            raise _not_ready(seconds)
        time.sleep(POLL_SECONDS)
    if child.ended:  # somebody else's server answered
        raise child.failure()
    _ask(endpoint, child, max(deadline - time.monotonic(), 1.0))


def _ask(endpoint: Endpoint, child: Child, seconds: float) -> None:
    """One question. Asked in a thread: a server that its engine has left at it may keep the connection open."""
    wrong: list[Exception] = []
    deadline = time.monotonic() + seconds  # of the whole answer; a server's pings count for none

    def ask() -> None:
        try:
            for _ in answer(endpoint, QUESTION, seconds=seconds, max_tokens=TOKENS, temperature=0):
                pass
        except Exception as error:  # whatever it is, it is the asker's
            wrong.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    while asking.is_alive() and not child.ended:
        if time.monotonic() > deadline + POLL_SECONDS:
            raise _not_ready(seconds)
        asking.join(POLL_SECONDS)
    if wrong:
        child.wait(2 * REASON_SECONDS)  # one that dies of it closes the connection first, and says why
    if child.ended:
        raise child.failure()
    if wrong:
        raise wrong[0]


def _not_ready(seconds: float) -> WorkloadError:
    return WorkloadError(
        f"the server was not ready in {seconds:.0f} s",
        where="config.ready_seconds",
        remedy="give it more, or see what it does: radeon-stack runs logs RUN",
    )
