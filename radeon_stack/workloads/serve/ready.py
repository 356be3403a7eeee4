"""A health check proves nothing: a server is ready when it has answered a question."""

from __future__ import annotations

import time

from radeon_stack.contracts.serve import HEALTH
from radeon_stack.dialogue import Endpoint, answer, healthy
from radeon_stack.errors import WorkloadError
from radeon_stack.workloads.serve.child import Child

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
            raise WorkloadError(
                f"the server was not ready in {seconds:g} s",
                where="config.ready_seconds",
                remedy="give it more, or see what it does: radeon-stack runs logs RUN",
            )
        time.sleep(POLL_SECONDS)
    if child.ended:  # somebody else's server answered
        raise child.failure()
    left = max(deadline - time.monotonic(), 1.0)
    for _ in answer(endpoint, QUESTION, seconds=left, max_tokens=TOKENS, temperature=0):
        pass
