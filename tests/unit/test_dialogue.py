"""Talking to a server that is not trusted: its stream, its errors, its bytes; and `chat` on top of it."""

from __future__ import annotations

import json
import os
import pty
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.contracts.serve import HEALTH, KEY_FILE
from radeon_stack.dialogue import Conversation, Endpoint, answer, chunks, healthy, pieces, reason
from radeon_stack.errors import Exit, WorkloadError
from radeon_stack.host.processes import Process
from radeon_stack.launch.launcher import draft, write_records
from radeon_stack.runs import events as ev
from radeon_stack.runs.store import Run, RunStore, State
from tests.conftest import ROOT, Cli, wait_for
from tests.unit.test_launch import circumstances
from tests.unit.test_serve import KEY, recipe


def said(*texts: str) -> bytes:
    """A stream as servers send it."""
    told = [{"choices": [{"delta": {"role": "assistant"}}]}, *({"choices": [{"delta": {"content": t}}]} for t in texts)]
    return b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in told) + b"data: [DONE]\n\n"


class Server(ThreadingHTTPServer):
    """Answers whatever the test lays down, and keeps what it was asked."""

    daemon_threads = True
    status, reply, pause = 200, said("Hel", "lo"), 0.0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[Any] = []
        self.left = threading.Event()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("127.0.0.1", self.server_address[1], KEY, "m")


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.send_response(200 if self.path == HEALTH else 404)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        self.send_response(self.server.status)
        self.end_headers()
        try:
            for line in self.server.reply.splitlines(keepends=True):
                self.wfile.write(line)
                self.wfile.flush()
                time.sleep(self.server.pause)
        except OSError:
            self.server.left.set()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_an_answer_comes_in_pieces_and_the_question_goes_with_key_model_and_options(server: Server) -> None:
    message = {"role": "user", "content": "Hi"}
    assert list(answer(server.endpoint, [message], max_tokens=3)) == ["Hel", "lo"]
    asked = {"messages": [message], "stream": True, "model": "m", "max_tokens": 3}
    assert server.asked == [("/v1/chat/completions", f"Bearer {KEY}", asked)]


def test_no_proxy_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert healthy(server.endpoint, HEALTH) and not healthy(server.endpoint, "/nowhere")
    assert list(answer(server.endpoint, [])) == ["Hel", "lo"]


@pytest.mark.parametrize(
    ("stream", "texts"),
    [
        (b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: [DONE]\n\n', ["a"]),
        (b'data:{"choices":[{"delta":{"content":"a"}}]}\r\n\r\ndata: [DONE]\r\n\r\n', ["a"]),
        (b': ping\n\nevent: x\ndata: {"choices":\ndata: [{"delta":{"content":"a"}}]}\n\ndata: [DONE]', ["a"]),
        (b'data: {"choices":[]}\n\ndata: {"choices":[{"delta":{"content":null}}]}\n\ndata: [DONE]\n\n', []),
        (said("a", "", "b") + b"data: never read\n\n", ["a", "b"]),
    ],
)
def test_server_sent_events_are_read_as_they_are_meant(stream: bytes, texts: list[str]) -> None:
    assert list(pieces(chunks(stream.splitlines(keepends=True)))) == texts


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (b"", "the answer broke off"),
        (said("a").removesuffix(b"data: [DONE]\n\n"), "the answer broke off"),
        (b"data: {nonsense\n\n", "what is no JSON"),
        (b"data: 7\n\n", "what is no part of an answer"),
        (b'data: {"choices": [7]}\n\n', "what is no part of an answer"),
        (b'data: {"choices": [{"delta": null}]}\n\n', "what is no part of an answer"),
        (b'data: {"error": {"message": "too long\\u001b[2J"}}\n\n', "the server ended the answer: too long�[2J"),
    ],
)
def test_a_stream_that_is_none_is_told(stream: bytes, says: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        list(pieces(chunks(stream.splitlines(keepends=True))))
    assert says in str(caught.value)


@given(st.binary(max_size=300) | st.lists(st.sampled_from([b"data:", b"[DONE]", b"\n", b"{}", b"\xff"])).map(b"".join))
def test_any_bytes_are_an_answer_or_an_error_of_ours(stream: bytes) -> None:
    with suppress(WorkloadError):
        list(pieces(chunks(stream.splitlines(keepends=True))))


@pytest.mark.parametrize(
    ("status", "reply", "says"),
    [
        (401, b'{"error": {"message": "Incorrect API key provided"}}', "(401): Incorrect API key provided"),
        (422, b'{"detail": [{"loc": ["body"]}]}', '(422): [{"loc": ["body"]}]'),
        (500, b"\x1b]0;title\x07<html>", "(500): �]0;title�<html>"),
        (500, b"", "(500): no reason"),
    ],
)
def test_a_refusal_says_what_the_server_says_made_harmless(
    server: Server, status: int, reply: bytes, says: str
) -> None:
    server.status, server.reply = status, reply
    with pytest.raises(WorkloadError) as caught:
        list(answer(server.endpoint, []))
    assert says in str(caught.value) and server.endpoint.url in str(caught.value)


def test_an_endless_line_is_not_gathered(server: Server) -> None:
    server.reply = b"data: " + b"x" * (3 << 20)
    with pytest.raises(WorkloadError, match="more than a line has room for"):
        list(answer(server.endpoint, []))


def test_nobody_there_is_an_error_of_ours() -> None:
    with pytest.raises(WorkloadError, match=r"does not answer: .*refused"):
        list(answer(Endpoint("127.0.0.1", 9, KEY), []))


def test_reasons_of_any_form_are_a_line() -> None:
    assert [reason(told) for told in ({"error": "x"}, {"message": "x"}, "x\ny", None)] == ["x", "x", "x y", "null"]


def test_a_conversation_remembers_what_was_answered_also_when_it_was_left_early(server: Server) -> None:
    talk = Conversation(server.endpoint, "Be brief.")
    assert "".join(talk.ask("Hi")) == "Hello"
    server.reply, server.pause = said("one", *["more"] * 200), 0.02
    with closing(talk.ask("Count")) as begun:
        assert next(begun) == "one"
    assert server.left.wait(10)  # it is told
    server.status, server.reply, server.pause = 400, b"{}", 0.0
    with pytest.raises(WorkloadError):
        list(talk.ask("Lost"))
    system = {"role": "system", "content": "Be brief."}
    assert [message["content"] for message in talk.messages] == ["Be brief.", "Hi", "Hello", "Count", "one"]
    talk.reset()
    assert talk.messages == [system]


# chat


@pytest.fixture
def going(server: Server, home: Path, tmp_path: Path) -> Run:
    """A run of serve as its records show it: our own process keeps it, and the test's server answers."""
    made = draft(recipe(tmp_path / "source", port=0), circumstances(image=None), RunStore(home))
    port = replace(made.plan.ports[0], host=server.server_address[1], container=server.server_address[1])
    made = replace(made, plan=replace(made.plan, ports=(port,)))
    write_records(made, RunStore(home))
    (made.run.path / KEY_FILE).write_text(KEY)
    status = made.run.status()
    assert status is not None
    me = Process.current()
    keeper = {"pid": me.pid, "started": me.started}
    made.run.write_status(status.model_copy(update={"state": State.RUNNING, "keeper": keeper}))
    ev.EventWriter(made.run.events)(ev.Fact(name="endpoint", value={"model": "m"}))
    return made.run


def test_one_question_gives_its_answer_and_nothing_else(cli: Cli, server: Server, going: Run) -> None:
    told = cli("chat", "--to", "last", "--once", "Hi", "--system", "Be brief.", "--temperature", "0")
    assert (told.code, told.out, told.err) == (Exit.OK, "Hello\n", "")
    (_, key, asked), *_ = server.asked
    assert key == f"Bearer {KEY}" and asked["temperature"] == 0 and asked["model"] == "m"
    assert [message["content"] for message in asked["messages"]] == ["Be brief.", "Hi"]


def test_a_question_comes_by_a_pipe(cli: Cli, server: Server, going: Run) -> None:
    assert cli("chat", "--to", going.id, input="What is\nthis?").out == "Hello\n"
    assert server.asked[0][2]["messages"] == [{"role": "user", "content": "What is\nthis?"}]
    empty = cli("chat", "--to", going.id, input=" \n")
    assert empty.code == Exit.USAGE and "there is no question" in empty.error


def test_an_answer_cannot_drive_the_terminal(cli: Cli, server: Server, going: Run) -> None:
    server.reply = said("\x1b[2J\x1b]0;t\x07", "\ta\r\n", "\ud83d", "‮b", "\x9b5A")
    assert cli("chat", "--to", "last", "--once", "Hi").out == "�[2J�]0;t�    a\n��b�5A\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give --from RUN, or --to RUN"),
        (("--from", "last", "--to", "last"), "give --from RUN, or --to RUN"),
        (("--to", "nothing", "--once", "Hi"), "no run 'nothing'"),
        (("--to", "last", "--once", ""), "--once: is empty"),
        (("--from", "last", "--once", "Hi"), "has made artifacts/gguf or artifacts/merged"),
    ],
)
def test_a_mistake_is_a_line(cli: Cli, going: Run, words: tuple[str, ...], says: str) -> None:
    told = cli("chat", *words)
    assert told.code == Exit.USAGE and says in told.error and told.out == ""


def test_a_run_that_has_ended_is_not_talked_to(cli: Cli, going: Run) -> None:
    status = going.status()
    assert status is not None
    going.write_status(status.model_copy(update={"state": State.STOPPED}))
    told = cli("chat", "--to", "last", "--once", "Hi")
    assert told.code == Exit.USAGE and f"--to: {going.id} is not running" in told.error


def test_it_is_listed_and_shown_with_the_way_to_call_it(cli: Cli, going: Run) -> None:
    assert "serving m at http://127.0.0.1:" in cli("runs", "list").out
    shown = cli("runs", "show", "last").out
    assert f"radeon-stack chat --to {going.id}" in shown and "Authorization: Bearer $(cat " in shown
    assert KEY not in shown + json.dumps(cli("runs", "show", "last", "--json").json)
    assert stat.S_IMODE((going.path / KEY_FILE).stat().st_mode) == 0o600


class Terminal:
    """`radeon-stack chat` on a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self._end, theirs = pty.openpty()
        command = [sys.executable, "-m", "radeon_stack", "chat", *words]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)), env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def read_until(self, text: str) -> None:
        def there() -> bool:
            os.set_blocking(self._end, False)
            with suppress(BlockingIOError, OSError):
                self.seen += os.read(self._end, 1 << 16).decode(errors="replace")
            return text in self.seen

        wait_for(there, seconds=30, what=f"{text!r} in {self.seen!r}")
        self.seen = self.seen.partition(text)[2]


def test_a_conversation_on_a_terminal_goes_on_after_ctrl_c_and_a_refusal(server: Server, going: Run) -> None:
    terminal = Terminal("--to", "last")
    terminal.read_until("m: /reset forgets what was said")
    terminal.type("Hi\n")
    terminal.read_until("Hello")
    server.reply, server.pause = said("one", *["more"] * 500), 0.02
    terminal.type("Count\n")
    terminal.read_until("one")
    terminal.type("\x03")
    assert server.left.wait(10)
    terminal.read_until("> ")
    server.status, server.reply, server.pause = 400, b'{"error": {"message": "maximum context"}}', 0.0
    terminal.type("Again\n")
    terminal.read_until("maximum context")
    server.status, server.reply = 200, said("Fine")
    terminal.read_until("> ")
    terminal.type("dropped\x03")
    terminal.read_until("> ")
    terminal.type("/reset\n/what\nNew\n")
    terminal.read_until("/quit or Ctrl-D ends it")
    terminal.read_until("Fine")
    terminal.type("\x04")
    assert terminal.process.wait(20) == Exit.OK
    asked = [[message["content"] for message in body["messages"]] for _, _, body in server.asked]
    assert asked[0] == ["Hi"] and asked[1] == ["Hi", "Hello", "Count"] and asked[3] == ["New"]
    assert asked[2][:3] == ["Hi", "Hello", "Count"] and asked[2][3].startswith("one")


# `chat --from` with a server that loads for ever, and takes its time to end.
SLOW_SERVER = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(2), sys.exit(143)))
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
while True:
    time.sleep(0.1)
"""
CHAT = f"""
import sys
from dataclasses import replace
from pathlib import Path
from radeon_stack.cli import chat, main
from radeon_stack.launch.launcher import draft
from tests.unit.test_launch import circumstances
from tests.unit.test_serve import recipe
folder = Path(sys.argv.pop(1))
def drafted_from(store, **options):
    made = draft(recipe(folder / "source", port=0), circumstances(image=None), store)
    command = (sys.executable, "-c", {SLOW_SERVER!r}, str(folder / "server"))
    return replace(made, plan=replace(made.plan, command=command)), ""
chat.drafted_from = drafted_from
main()
"""


@pytest.mark.parametrize("when", ["as its keeper is started", "while it loads"])
def test_a_chat_that_is_left_with_more_than_one_ctrl_c_leaves_no_server(home: Path, tmp_path: Path, when: str) -> None:
    words = [sys.executable, "-c", CHAT, str(tmp_path), "chat", "--from", "x", "--once", "Hi"]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True) as chat:
        server = tmp_path / "server"
        reached = server.exists if when == "while it loads" else lambda: any(home.glob("runs/*/status.json"))
        wait_for(reached, seconds=30, what="the run")
        for _ in range(3):
            chat.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert chat.wait(30) in (Exit.INTERRUPTED, -signal.SIGINT)  # the last one may come as Python itself ends
    time.sleep(2)  # a server that was about to start would be there by now
    assert not list(home.glob("runs/*"))
    assert not server.exists() or Process.of(int(server.read_text())) is None
