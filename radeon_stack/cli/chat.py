"""`chat`."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import click

from radeon_stack.cli.run import drafted_from, not_empty, require_environment
from radeon_stack.dialogue import Conversation, Endpoint
from radeon_stack.errors import Exit, StackError, UsageError, WorkloadError
from radeon_stack.host.processes import Process
from radeon_stack.launch.endpoint import endpoint_of
from radeon_stack.launch.launcher import detach, write_records
from radeon_stack.launch.supervise import settle, stop
from radeon_stack.runs.events import EventReader
from radeon_stack.runs.store import Run, RunStore, State, home, require_one
from radeon_stack.runs.view import view_for
from radeon_stack.text import print_line, printable

POLL_SECONDS = 0.1
STOP_SECONDS = 60
KEEPER_SECONDS = 10
PROMPT = "> "
HELP = "/reset forgets what was said, /quit or Ctrl-D ends it, Ctrl-C ends an answer"


@click.command()
@click.option("--from", "source", metavar="RUN", callback=not_empty, help="What was exported: a run, 'last', a folder.")
@click.option("--to", "running", metavar="RUN", callback=not_empty, help="A run of serve that is going on.")
@click.option("--once", metavar="QUESTION", callback=not_empty, help="Ask this, print the answer, and end.")
@click.option("--system", metavar="TEXT", help="What the model is told before all else.")
@click.option("--max-tokens", type=click.IntRange(1), help="Of an answer. Default: until it ends by itself.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0: the likeliest words. Default: the server's.")
@click.option("--with", "server", metavar="PROGRAM", callback=not_empty, help="What serves: llama.cpp or vllm.")
@click.option("--preset", metavar="NAME", callback=not_empty, help="One of serve's: demo.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="A value of serve: context=8192.")
@click.option("--engine", type=click.Choice(["auto", "docker", "local"]), default=None, help="Default: auto.")
@click.option("--image", metavar="REF", callback=not_empty, help="A particular image instead of the newest that fits.")
@click.option("--gpus", metavar="WHICH", callback=not_empty, help="As of run. Default: a free one.")
def chat(
    source: str | None,
    running: str | None,
    once: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    **options: Any,
) -> int:
    """Talk to what was exported, in the terminal.

    A run of `serve` is started for it, on a port that is free, and stopped and removed at the end.

    \b
      radeon-stack chat --from last
      radeon-stack chat --from last --once "Who are you?" --temperature 0
      radeon-stack chat --to last              # a run of serve that is going on, which is left alone
      git log -5 | radeon-stack chat --from last --system "Sum it up in a sentence."
    """
    if (source is None) == (running is None):
        raise click.UsageError("give --from RUN, or --to RUN for a run of serve that is going on")
    store = RunStore(home())
    asked = {"max_tokens": max_tokens, "temperature": temperature}
    given = {name: value for name, value in asked.items() if value is not None}
    question = once if once is not None or sys.stdin.isatty() else sys.stdin.read()
    if question is not None and not question.strip():
        raise UsageError("there is no question", where="stdin", remedy="give one: --once QUESTION")
    with _ended_by_signals(), _going(store, running) if running else _started(store, source, **options) as endpoint:
        conversation = Conversation(endpoint, system, given)
        if question is None:
            converse(conversation)
        else:
            _print(conversation.ask(question))
    return Exit.OK


def converse(conversation: Conversation) -> None:
    """Question and answer, until the end of input. An answer that fails is told, and the next question asked."""
    with suppress(ImportError):
        import readline  # noqa: F401 - lines are edited, and found again

    print_line(f"{conversation.endpoint.model}: {HELP}", sys.stderr)
    while (question := _read()) is not None:
        if question == "/reset":
            conversation.reset()
        elif question.startswith("/"):
            print_line(HELP, sys.stderr)
        elif question:
            try:
                _print(conversation.ask(question))
            except KeyboardInterrupt:
                click.echo()
            except StackError as error:
                print_line(f"{error}; /reset forgets what was said", sys.stderr)


def _read() -> str | None:
    """A line, stripped; None at the end. Ctrl-C drops what was typed."""
    while True:
        try:
            line = input(PROMPT).strip()
        except KeyboardInterrupt:
            click.echo()
            continue
        except EOFError:
            click.echo()
            return None
        return None if line == "/quit" else line


def _print(pieces: Generator[str, None, None]) -> None:
    """As it comes, made harmless; when we leave early the server is told at once."""
    with closing(pieces):
        for piece in pieces:
            sys.stdout.write(printable(piece.replace("\t", "    ").replace("\r\n", "\n")))
            sys.stdout.flush()
    sys.stdout.write("\n")


@contextmanager
def _going(store: RunStore, wanted: str) -> Iterator[Endpoint]:
    run = store.find(wanted)
    require_one(run, "--to")
    if settle(run).state is not State.RUNNING:
        raise UsageError(f"{run.id} is not running", where="--to", remedy="see: radeon-stack runs list")
    yield _once_it_answers(run)


@contextmanager
def _started(store: RunStore, source: str | None, *, sets: tuple[str, ...], **options: Any) -> Iterator[Endpoint]:
    """A run of serve for as long as we talk. One that failed is kept, to be looked at."""
    rest: dict[str, Any] = dict.fromkeys(("model", "data"))
    rest |= {"share": False, "without": (), "sysroot": "/", "recipe": "serve", "source": source}
    drafted, _ = drafted_from(store, sets=("port=0", *sets), **options, **rest)
    run = drafted.run
    require_environment(drafted)
    write_records(drafted, store)
    try:
        detach(run, drafted.plan)
        yield _once_it_answers(run)
    finally:
        with _signals_ignored():
            if stop(run, seconds=STOP_SECONDS).state is State.STOPPED and _left(run):
                store.remove(run)


def _left(run: Run) -> bool:
    """Has the process that kept the run written its last record? It does so after the one that says how it ended."""
    keeper = status.keeper if (status := run.status()) else None
    deadline = time.monotonic() + KEEPER_SECONDS
    while keeper is not None and Process(**keeper).alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _once_it_answers(run: Run) -> Endpoint:
    """WorkloadError with the run's own reason when it ends instead."""
    reader = EventReader(run.events)
    with view_for(sys.stderr) as view:
        while not (endpoint := endpoint_of(run)).model:
            outcome = settle(run)
            for event in reader.poll():
                view(event)
            if outcome.state.ended:
                error = WorkloadError(outcome.what, where=outcome.where, remedy=outcome.remedy)
                error.exit_code = Exit(outcome.exit_code)
                raise error
            time.sleep(POLL_SECONDS)
    return endpoint


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A closed terminal, or SIGTERM, ends us as Ctrl-D does: what we started is stopped."""

    def end(*_: object) -> None:
        sys.exit(Exit.INTERRUPTED)

    with _answered((signal.SIGTERM, signal.SIGHUP), end):
        yield


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Whoever is impatient with the end would leave the server behind."""
    with _answered((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN):
        yield


@contextmanager
def _answered(numbers: tuple[signal.Signals, ...], handler: Callable[..., None] | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
