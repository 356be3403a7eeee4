"""A run that answers on a port: at this machine's own address alone, behind a key that is in one file alone."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.catalog.load import Effective, read, resolve
from radeon_stack.contracts.serve import KEY_FILE, ServeConfig
from radeon_stack.dialogue import Endpoint
from radeon_stack.errors import Exit, MachineError, UsageError, WorkloadError
from radeon_stack.images.environments import environment_for
from radeon_stack.images.resolve import Image
from radeon_stack.launch.docker import container_config, run_arguments
from radeon_stack.launch.endpoint import KEY_VARIABLE, endpoint_of, how_to_call, key_line, served, with_port, write_key
from radeon_stack.launch.exports import compose, quadlet
from radeon_stack.launch.launcher import Draft, draft, paste_lines, write_records
from radeon_stack.launch.plan import LaunchPlan, Port
from radeon_stack.launch.planner import ANY_ADDRESS, plan
from radeon_stack.runs import events as ev
from radeon_stack.runs.store import Run, RunStore
from radeon_stack.workloads.serve.child import Child, last_words
from radeon_stack.workloads.serve.choosing import choose
from radeon_stack.workloads.serve.guard import KEY_FILE_VARIABLE, Guard
from radeon_stack.workloads.serve.ready import wait_until_it_answers
from radeon_stack.workloads.serve.servers import command, environment
from tests.conftest import Cli
from tests.unit.test_launch import IMAGE, circumstances

HERE = Port("127.0.0.1", 8765, 8765)
KEY = "of-the-test-0123456789"


def recipe(folder: Path, **config: object) -> Effective:
    folder.mkdir(exist_ok=True)
    told: dict[str, object] = {"source": str(folder), "port": 8765, **config}
    return resolve(read("serve"), None, [f"{name}={json.dumps(value)}" for name, value in told.items()])


def serve_plan(tmp_path: Path, image: Image | None = IMAGE) -> LaunchPlan:
    return plan(
        recipe(tmp_path / "source"),
        circumstances(image=image),
        run_id="20260101-000000-serve-abcd",
        run_dir=tmp_path / "run",
        cache=tmp_path / "cache",
    )


@pytest.fixture
def drafted(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draft:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    made = draft(recipe(tmp_path / "source", port=0), circumstances(), RunStore(home))
    write_records(made, RunStore(home))
    return made


def test_its_port_is_published_at_one_address_and_nothing_else_is(tmp_path: Path) -> None:
    made = serve_plan(tmp_path)
    pairs = list(pairwise(run_arguments(made)))
    assert [value for flag, value in pairs if flag == "--publish"] == ["127.0.0.1:8765:8765"]
    assert ("--network", "bridge") in pairs and "an internal network has no way" in made.reasons["network"]
    config = container_config(made, "1.41")
    assert config["HostConfig"]["PortBindings"] == {"8765/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8765"}]}
    assert list(config["ExposedPorts"]) == ["8765/tcp"] and config["HostConfig"]["NetworkMode"] == "bridge"
    assert 'ports:\n      - "127.0.0.1:8765:8765"' in compose(made)
    assert "PublishPort=127.0.0.1:8765:8765" in quadlet(made).splitlines()
    assert made.command[-2:] == ("--listen", ANY_ADDRESS) and ("HF_HUB_OFFLINE", "1") in made.env


def test_without_a_container_the_server_itself_listens_there_and_a_key_given_is_not_handed_down(tmp_path: Path) -> None:
    made = serve_plan(tmp_path, image=None)
    assert made.ports == (HERE,) and "--listen" not in made.command
    assert KEY_VARIABLE in made.unset and made.network is None


@pytest.mark.parametrize("image", [IMAGE, None])
def test_a_plan_with_a_port_survives_being_written_down(tmp_path: Path, image: Image | None) -> None:
    made = serve_plan(tmp_path, image)
    assert LaunchPlan.from_record(json.loads(json.dumps(made.as_record()))) == made


def test_the_key_is_one_file_that_its_owner_alone_can_read_and_nowhere_else(drafted: Draft) -> None:
    file = drafted.run.path / KEY_FILE
    assert file.read_text() == KEY and stat.S_IMODE(file.stat().st_mode) == 0o600
    others = [path for path in drafted.run.path.rglob("*") if path.is_file() and path != file]
    assert {path.name for path in others} >= {"plan.json", "config.json", "status.json", "events.jsonl"}
    assert not [path for path in others if KEY in path.read_text()]
    config = container_config(drafted.plan, "1.41")
    assert KEY not in json.dumps(config) + " ".join(run_arguments(drafted.plan)) + compose(drafted.plan)
    assert drafted.plan.secrets == ()
    mounts = {mount.target: mount for mount in drafted.plan.mounts}
    assert mounts["/radeon-stack/run/api-key"].read_only and mounts["/radeon-stack/run/api-key"].source == str(file)
    assert KEY not in repr(endpoint_of(drafted.run)) + "\n".join(how_to_call(drafted.run, endpoint_of(drafted.run)))
    assert endpoint_of(drafted.run).key == KEY


def test_a_run_has_a_key_of_its_own_and_keeps_it(tmp_path: Path) -> None:
    keys = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for _ in range(2):
            write_key(tmp_path / name, {})
            keys.add((tmp_path / name / KEY_FILE).read_text())
    assert len(keys) == 2 and all(len(key) >= 43 for key in keys)


@pytest.mark.parametrize(
    "key", ["", "too-short", "with a blank in it 0123", "größer-als-sechzehn", "line\nbreak-0123456789"]
)
def test_a_key_that_no_header_takes_is_refused_before_anything_is_written(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(UsageError, match=KEY_VARIABLE):
        draft(recipe(tmp_path / "source"), circumstances(), RunStore(home))
    assert not list(RunStore(home))


def test_pasted_by_hand_the_key_is_as_closed(drafted: Draft, tmp_path: Path) -> None:
    assert key_line(drafted.run.path) in paste_lines(drafted, RunStore(tmp_path))
    subprocess.run(["bash", "-c", key_line(tmp_path)], check=True, env={"PATH": "/usr/bin:/bin"})
    file = tmp_path / KEY_FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    write_key(tmp_path, {KEY_VARIABLE: file.read_text()})  # it is one
    assert len(file.read_text()) == 43


def test_an_export_has_a_key_too(cli: Cli, home: Path, tmp_path: Path) -> None:
    python = environment_for("verify", home).python
    python.parent.mkdir(parents=True)
    python.touch()  # it is ready, then, and none is made
    (tmp_path / "source").mkdir()
    words = ("export", "serve", "--from", f"{tmp_path}/source", "--set", "port=0", "--engine", "local", "--as", "shell")
    made = cli(*words, "-o", tmp_path / "mine")
    assert made.code == Exit.OK, made.err
    key = tmp_path / "mine" / KEY_FILE
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_text() not in (tmp_path / "mine" / "run.sh").read_text()


def test_a_taken_port_is_told_with_the_way_out_and_0_is_one_that_is_free(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        wanted = recipe(tmp_path / "source", port=taken)
        with pytest.raises(MachineError, match=rf"config.port: port {taken} of 127.0.0.1 is taken; .*--set port=0"):
            with_port(wanted, live=True)
        assert with_port(wanted, live=False) is wanted  # of another machine we know nothing
        found = with_port(recipe(tmp_path / "source", port=0), live=True).config
        assert isinstance(found, ServeConfig) and found.port not in (0, taken)


def test_what_is_not_served_has_no_way_with(cli: Cli) -> None:
    refused = cli("run", "train-llama", "--preset", "demo", "--with", "vllm", "--engine", "local")
    assert refused.code == Exit.USAGE and "--with: train-llama serves nothing" in refused.error
    near = cli("run", "serve", "--from", ".", "--with", "lama.cpp", "--engine", "local")
    assert near.code == Exit.USAGE and "--with" in near.error and "'llama.cpp'" in near.error


def test_chat_takes_a_preset_of_the_server_that_it_starts(cli: Cli, tmp_path: Path) -> None:
    """What a machine of less memory is told to try."""
    (tmp_path / "m.gguf").touch()
    refused = cli("chat", "--from", str(tmp_path), "--preset", "dmo", "--once", "Hi", "--engine", "local")
    assert refused.code == Exit.USAGE and "no preset 'dmo'" in refused.error and "'demo'" in refused.error


def test_a_name_from_inside_cannot_leave_its_quotes(drafted: Draft) -> None:
    write = ev.EventWriter(drafted.run.events)
    write(ev.Fact(name="endpoint", value={"model": "a'; rm -rf ~ \x1b[2J\n#", "url": "http://elsewhere.example/v1"}))
    told = how_to_call(drafted.run, endpoint_of(drafted.run))
    assert "elsewhere" not in "\n".join(told) and "\x1b" not in "\n".join(told)
    words = subprocess.run(
        ["bash", "-c", f"curl() {{ printf '%s\\n' \"$#\"; }}\n{chr(10).join(told[1:4])}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert words.strip() == "7"


def test_it_answers_once_this_attempt_has_said_so_and_not_because_an_earlier_one_did(drafted: Draft) -> None:
    run = drafted.run
    assert served(run) == ""
    ev.EventWriter(run.events)(ev.Fact(name="endpoint", value={"model": "m"}))
    assert served(run) == "m"
    status = run.status()
    assert status is not None
    run.write_status(status.model_copy(update={"started": time.time() + 1}))  # as it is resumed
    assert served(run) == ""


# What is served


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    def make(*names: str) -> Path:
        for name in names:
            file = tmp_path / "made" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        return tmp_path / "made"

    return make


def config(**values: Any) -> ServeConfig:
    return ServeConfig.model_validate({"source": "/home/me/runs/20260101-serve", **values})


BOTH = ("llama.cpp", "vllm")
GGUF = tuple(f"artifacts/gguf/model-{name}.gguf" for name in ("bf16", "q4_k_m", "q8_0"))
MERGED = ("artifacts/merged/config.json", "artifacts/merged/model.safetensors")


@pytest.mark.parametrize(
    ("names", "asked", "installed", "served"),
    [
        (GGUF + MERGED, {}, BOTH, ("llama.cpp", "artifacts/gguf/model-q8_0.gguf")),
        (GGUF[:2], {}, BOTH, ("llama.cpp", "artifacts/gguf/model-bf16.gguf")),
        (GGUF, {"quantization": "q4_k_m"}, BOTH, ("llama.cpp", "artifacts/gguf/model-q4_k_m.gguf")),
        (GGUF + MERGED, {"server": "vllm"}, BOTH, ("vllm", "artifacts/merged")),
        (GGUF + MERGED, {}, ("vllm",), ("vllm", "artifacts/merged")),
        (MERGED, {}, BOTH, ("vllm", "artifacts/merged")),
        (("gguf/a.gguf",), {}, BOTH, ("llama.cpp", "gguf/a.gguf")),
        (("My.Q4_1.gguf",), {}, BOTH, ("llama.cpp", "My.Q4_1.gguf")),
        (("My.Q4_1.gguf", "My.Q8_0.gguf"), {"quantization": "q4_1"}, BOTH, ("llama.cpp", "My.Q4_1.gguf")),
        (("config.json", "model.safetensors"), {}, BOTH, ("vllm", ".")),
    ],
)
def test_what_is_there_decides_what_is_served_by_which_program(
    made: Callable[..., Path],
    names: tuple[str, ...],
    asked: dict[str, str],
    installed: tuple[str, ...],
    served: tuple[str, str],
) -> None:
    folder = made(*names)
    found = choose(config(**asked), folder, installed)
    assert (found.server, found.path) == (served[0], folder / served[1])
    assert found.name == "20260101-serve"


@pytest.mark.parametrize(
    ("names", "asked", "installed", "says"),
    [
        (("a.txt",), {}, BOTH, "--from: 20260101-serve has no GGUF file and no merged model; export it"),
        (GGUF, {"server": "vllm"}, BOTH, "config.server: 20260101-serve has GGUF files and no merged model"),
        (GGUF, {"quantization": "q6_k"}, BOTH, "no GGUF file in q6_k; there is: bf16, q4_k_m, q8_0"),
        (MERGED, {"quantization": "q8_0"}, BOTH, "no GGUF file in q8_0; there is: none"),
        (MERGED, {"server": "vllm", "quantization": "q8_0"}, BOTH, "vLLM serves the merged model, in 16 bit"),
        (MERGED, {}, ("llama.cpp",), "vllm is not installed where it runs; of the two there is: llama.cpp"),
        (GGUF, {}, (), "llama.cpp is not installed where it runs; of the two there is: neither"),
    ],
)
def test_what_cannot_be_served_is_told_with_what_there_is(
    made: Callable[..., Path], names: tuple[str, ...], asked: dict[str, str], installed: tuple[str, ...], says: str
) -> None:
    with pytest.raises((UsageError, MachineError)) as caught:
        choose(config(**asked), made(*names), installed)
    assert says in str(caught.value)


def test_vllm_compiles_nothing_where_pythons_headers_or_a_compiler_are_not(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server would start without, and end at the first question that has something compiled."""
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    wanted = config(server="vllm")
    folder = made(*MERGED)
    assert "--enforce-eager" in command(choose(wanted, folder, BOTH), wanted, "127.0.0.1")
    assert environment(tmp_path)["TORCHDYNAMO_DISABLE"] == "1"
    (tmp_path / "Python.h").touch()
    for missing in ("g++", "gcc"):
        monkeypatch.setattr(shutil, "which", lambda name, missing=missing: None if name == missing else name)
        assert environment(tmp_path)["TORCHDYNAMO_DISABLE"] == "1"
    monkeypatch.setenv("CC", "ccache cc")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "--enforce-eager" not in command(choose(wanted, folder, BOTH), wanted, "127.0.0.1")
    assert "TORCHDYNAMO_DISABLE" not in environment(tmp_path)


def test_neither_servers_command_line_names_the_key(made: Callable[..., Path]) -> None:
    folder = made(*GGUF, *MERGED)
    for server in BOTH:
        wanted = config(server=server, port=8765, threads=3)
        words = command(choose(wanted, folder, BOTH), wanted, "127.0.0.1")
        assert "key" not in " ".join(words).replace(str(folder), "") and "8765" in " ".join(words)
        assert "127.0.0.1" in " ".join(words)


# The guard


def answered(guard: Guard, **scope: Any) -> int:
    """The status with which a request is answered: 200 by what stands behind."""
    told: list[Any] = []

    async def send(message: Any) -> None:
        told.append(message)

    asyncio.run(guard({"type": "http", "method": "GET", "path": "/", "headers": [], **scope}, nothing, send))
    return int(told[0].get("status") or told[0]["code"])


async def nothing() -> dict[str, Any]:
    return {"type": "http.disconnect"}


async def behind(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guard:
    (tmp_path / KEY_FILE).write_text(KEY)
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / KEY_FILE))
    return Guard(behind)


def bearer(text: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", text.encode())]


def test_nobody_is_answered_without_the_key_on_any_path_but_one(guard: Guard) -> None:
    assert answered(guard, headers=bearer(f"Bearer {KEY}"), path="/v1/models") == 200
    assert answered(guard, path="/health") == 200
    for path in ("/v1/models", "/", "/docs", "/invocations", "/metrics", "/health/", "//health"):
        assert answered(guard, path=path) == 401, path
    assert answered(guard, path="/health", method="POST") == 401
    assert answered(guard, path="/v1/chat/completions", method="OPTIONS") == 401  # a web page's first question
    for text in (KEY, f"bearer {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer ", f"Basic {KEY}", "Bearer é"):
        assert answered(guard, headers=bearer(text)) == 401, text
    assert answered(guard, headers=bearer(f"Bearer {KEY}") * 2) == 401
    assert answered(guard, type="websocket", path="/v1/realtime") == 1008


def test_an_empty_key_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / KEY_FILE).write_text("\n")
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / KEY_FILE))
    with pytest.raises(ValueError, match="is empty"):
        Guard(behind)


# The server's process

# As vLLM tells it: its engine the reason, in colour, and then its server that it has none.
VLLM_FAILS = """\
\x1b[1;36m(EngineCore_DP0 pid=7)\x1b[0;0m ERROR 09-18 10:34:29 [core.py:718] EngineCore failed to start.
(EngineCore_DP0 pid=7) ERROR 09-18 10:34:29 [core.py:718] Traceback (most recent call last):
(EngineCore_DP0 pid=7) ERROR 09-18 10:34:29 [core.py:718]   File "/error/core.py", line 91, in __init__
(EngineCore_DP0 pid=7) ERROR 09-18 10:34:29 [core.py:718] ValueError: No available memory for the cache blocks.
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
STAYS = "import time; time.sleep(20)"


@pytest.mark.parametrize(
    ("lines", "last"),
    [
        (["Traceback", "ValueError: no architecture 'x'", "warnings.warn("], "ValueError: no architecture 'x'"),
        (["loading", "llama_model_load: error loading model", "done"], "llama_model_load: error loading model"),
        (["loading", "", "gone"], "gone"),
        (VLLM_FAILS.splitlines(), "ValueError: No available memory for the cache blocks."),
        ([], ""),
        (["x\x1b[2J" + "y" * 1000], "x�[2J" + "y" * 294 + "…"),
    ],
)  # fmt: skip
def test_a_servers_last_words_are_the_line_that_tells(lines: list[str], last: str) -> None:
    assert last_words(lines) == last


def test_a_server_that_ends_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with Child([sys.executable, "-c", "print('hello'); raise OSError('address in use')"], {}) as child:
        child.wait()
        assert child.failure().what == "the server ended: OSError: address in use"
    assert "hello" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("then", "says"),
    [
        (STAYS, "the server's engine failed: ValueError: No available memory"),
        (
            f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{STAYS}']); sys.exit(1)",
            "the server ended: ValueError: No available memory",
        ),
    ],
)
def test_a_server_whose_engine_has_failed_is_not_waited_for_whoever_stays(
    monkeypatch: pytest.MonkeyPatch, then: str, says: str
) -> None:
    monkeypatch.setattr("radeon_stack.workloads.serve.child.REASON_SECONDS", 0.5)
    fake = f"print({VLLM_FAILS!r}, end='', flush=True); {then}"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        here = Endpoint("127.0.0.1", silent.getsockname()[1], KEY, "m")
        begun = time.monotonic()
        with (
            pytest.raises(WorkloadError, match=re.escape(says)),
            Child([sys.executable, "-c", fake], {}) as child,
        ):
            wait_until_it_answers(here, child, 50)
    assert time.monotonic() - begun < 10


# Well until it is asked.
FAILS_AT_A_QUESTION = """
import http.server, os, sys, time
class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        for line in ("EngineCore encountered a fatal error.", "RuntimeError: HIP error: page fault"):
            print("(EngineCore_DP0 pid=7) ERROR 09-18 10:34:29 [core.py:7]", line, flush=True)
        if sys.argv[2] == "ends":
            os._exit(1)
        time.sleep(20)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Server).serve_forever()
"""


@pytest.mark.parametrize(("how", "says"), [("stays", "the server's engine failed"), ("ends", "the server ended")])
def test_a_server_that_fails_at_the_first_question_says_why_at_once(
    monkeypatch: pytest.MonkeyPatch, how: str, says: str
) -> None:
    monkeypatch.setattr("radeon_stack.workloads.serve.child.REASON_SECONDS", 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    with (
        pytest.raises(WorkloadError, match=f"{says}: RuntimeError: HIP error: page fault"),
        Child([sys.executable, "-c", FAILS_AT_A_QUESTION, str(port), how], {}) as child,
    ):
        wait_until_it_answers(Endpoint("127.0.0.1", port, KEY, "m"), child, 50)
    assert time.monotonic() - begun < 10


def test_an_engine_that_fails_later_ends_the_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radeon_stack.workloads.serve.child.REASON_SECONDS", 0.1)
    line = "(EngineCore_DP0 pid=7) ERROR 09-18 10:34:29 [core.py:718] EngineCore encountered a fatal error."
    with Child([sys.executable, "-c", f"print({line!r}, flush=True); {STAYS}"], {}) as child:
        child.wait()
        assert child.failure().what == "the server's engine failed: EngineCore encountered a fatal error."


def test_a_server_that_only_mentions_its_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radeon_stack.workloads.serve.child.REASON_SECONDS", 0.0)
    line = "INFO 09-18 10:34:29 [api.py:1] asked: what does 'EngineCore failed to start.' mean?"
    with Child([sys.executable, "-c", f"print({line!r}, 'read', sep='\\n', flush=True); {STAYS}"], {}) as child:
        while "read\n" not in child._last:
            time.sleep(0.01)
        assert not child.ended


def test_one_that_will_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radeon_stack.workloads.serve.child.STOP_SECONDS", 0.2)
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    with Child([sys.executable, "-c", stubborn], {}) as child:
        while "deaf\n" not in child._last:
            assert not child.ended
    assert child._process.returncode == -9


def test_a_run_that_answers_on_no_port_is_not_called(home: Path) -> None:
    run = Run(home / "runs" / "20260101-000000-train-abcd")
    with pytest.raises(UsageError, match="answers on no port; start one that does"):
        endpoint_of(run)


def test_one_whose_key_has_gone_is_told_by_its_file(drafted: Draft) -> None:
    (drafted.run.path / KEY_FILE).unlink()
    with pytest.raises(UsageError, match="api-key: there is no key to be read"):
        endpoint_of(drafted.run)


def test_the_plan_of_what_answers_nobody_says_so(tmp_path: Path) -> None:
    from tests.unit.test_launch import demo_plan

    made = demo_plan(tmp_path)
    assert made.ports == () and made.reasons["ports"] == "it answers nobody"
    assert "--publish" not in run_arguments(replace(made)) and "ports" not in compose(made)
