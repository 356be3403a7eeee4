"""What a person is told of a run that answers on a port: where, and how to call it."""

from __future__ import annotations

from collections.abc import Callable

from radeon_stack.errors import StackError
from radeon_stack.launch.endpoint import FACT, endpoint_of, how_to_call
from radeon_stack.runs.events import Event, Fact
from radeon_stack.runs.store import Run
from radeon_stack.runs.view import View


def announced(view: View, run: Run, ending: str = "Ctrl-C stops it") -> Callable[[Event], None]:
    """The view, which also says how a run is called, and ended, when it answers."""

    def watch(event: Event) -> None:
        view(event)
        if isinstance(event, Fact) and event.name == FACT:
            for line in (*calling(run), ending):
                view.say(line)

    return watch


def calling(run: Run) -> list[str]:
    """The lines; none for a run that answers on no port, or not yet."""
    try:
        endpoint = endpoint_of(run)
    except StackError:
        return []
    return how_to_call(run, endpoint) if endpoint.model else []
