"""A conversation with an OpenAI-compatible server, by the standard library alone. Nothing that it says is trusted."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from radeon_stack.errors import WorkloadError
from radeon_stack.text import one_line

DONE = b"[DONE]"
MAX_LINE_BYTES = 1 << 20
MAX_ERROR_BYTES = 1 << 16
SECONDS = 600.0  # without a word; a long question is read for minutes on a CPU
Message = dict[str, str]


@dataclass(frozen=True)
class Endpoint:
    """Where a server answers, to whom, and what it calls its model ("": it has but one)."""

    host: str
    port: int
    key: str = field(repr=False)
    model: str = ""

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"


def answer(
    endpoint: Endpoint, messages: Sequence[Message], *, seconds: float = SECONDS, **options: Any
) -> Iterator[str]:
    """The answer to a conversation, piece by piece, as it comes. Leaving it early tells the server to stop.

    WorkloadError when the server refuses, ends in the middle, or says what is no answer.
    """
    asked = {"messages": list(messages), "stream": True, **({"model": endpoint.model} if endpoint.model else {})}
    body = json.dumps(asked | options).encode()
    with _asked(endpoint, "POST", "/v1/chat/completions", body, seconds) as response:
        yield from pieces(chunks(_lines(response)))


@dataclass
class Conversation:
    """What was said so far, and how to go on. Of an answer that was left early, what came of it counts."""

    endpoint: Endpoint
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget it all but what the system says."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer, piece by piece. A question without any is not remembered."""
        asked: Message = {"role": "user", "content": question}
        said: list[str] = []
        try:
            for piece in answer(self.endpoint, [*self.messages, asked], **self.options):
                said.append(piece)
                yield piece
        finally:
            if said:
                self.messages += [asked, {"role": "assistant", "content": "".join(said)}]


def healthy(endpoint: Endpoint, path: str, *, seconds: float = 5.0) -> bool:
    """Does it say that it is well?"""
    try:
        with _asked(endpoint, "GET", path, None, seconds):
            return True
    except WorkloadError:
        return False


def chunks(lines: Iterable[bytes]) -> Iterator[Any]:
    """The JSON of each event in a stream of server-sent events, up to `[DONE]`. A stream without that is cut short."""
    data: list[bytes] = []
    for line in lines:
        text = line.rstrip(b"\r\n")
        if text.startswith(b"data:"):
            data.append(text.removeprefix(b"data:").removeprefix(b" "))
        elif not text and data:  # an empty line ends an event; comments (`:`) and other fields say nothing here
            whole, data = b"\n".join(data), []
            if whole == DONE:
                return
            yield _json(whole)
    if b"\n".join(data) != DONE:
        raise WorkloadError("the answer broke off")


def pieces(told: Iterable[Any]) -> Iterator[str]:
    """The text that each chunk of an answer adds. WorkloadError for an error among them."""
    for chunk in told:
        if isinstance(chunk, dict) and "error" in chunk:
            raise WorkloadError(f"the server ended the answer: {reason(chunk)}")
        try:
            text = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise WorkloadError("the server said what is no part of an answer") from error
        if isinstance(text, str) and text:
            yield text


def reason(told: Any) -> str:
    """What an error of the API says, on a line: OpenAI's form or FastAPI's, or whatever came."""
    found = told.get("error", told) if isinstance(told, dict) else told
    for key in ("message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return one_line(found if isinstance(found, str) else json.dumps(found), 300)


@contextmanager
def _asked(
    endpoint: Endpoint, method: str, path: str, body: bytes | None, seconds: float
) -> Iterator[http.client.HTTPResponse]:
    """The response to a request. No proxy is asked, whatever the environment names: it is this machine.

    The key goes with questions alone: before the server has the port, another program may listen there.
    """
    headers = {"Content-Type": "application/json"}
    if body is not None:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=seconds)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        if response.status != http.client.OK:
            told = response.read(MAX_ERROR_BYTES)
            raise WorkloadError(f"the server refused ({response.status}): {_refusal(told)}", where=endpoint.url)
        yield response
    except (OSError, http.client.HTTPException) as error:
        what = str(error) or type(error).__name__
        raise WorkloadError(f"the server does not answer: {one_line(what)}", where=endpoint.url) from error
    finally:
        connection.close()


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while line := response.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            raise WorkloadError("the server said more than a line has room for")
        yield line


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WorkloadError("the server said what is no JSON") from error


def _refusal(told: bytes) -> str:
    try:
        return reason(json.loads(told))
    except (ValueError, RecursionError):
        return one_line(told.decode(errors="replace"), 300) or "no reason"
