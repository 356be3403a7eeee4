"""An environment in an image's place: named by what is in it, made once, and there only when it does what it is for."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from radeon_stack.catalog.load import Effective, read, resolve
from radeon_stack.cli.run import require_environment
from radeon_stack.errors import BuildError, Exit, ImageError, MachineError, UsageError
from radeon_stack.host.selection import Selection
from radeon_stack.images.environments import (
    PACKAGE,
    Environment,
    environment_for,
    environment_key,
    lacking,
    local_wheel_key,
)
from radeon_stack.images.making import make, require_programs
from radeon_stack.images.progress import Step, reason
from radeon_stack.images.uv import cpu_torch, find_links
from radeon_stack.launch import choose
from radeon_stack.launch.planner import plan
from tests.conftest import ROOT, Cli, wait_for
from tests.unit.test_launch import HERE, circumstances

NO_GPU = Selection((), "the recipe takes no GPU")
HOME = Path("/nowhere")
TORCH = "class version:\n    hip = None\n__version__ = '2.13.0'\n"
KINDS = """
[tiny]
summary = "what is tried here"
extra = "none"
imports = ["torch", "pebble"]
wheels.cpu = ["pebble"]
[bare]
summary = "without a wheel that is built"
extra = "none"
imports = ["torch", "packaging"]
cpu.imports = ["json"]
"""
WHEEL = """
version = "1.0"
job_memory = "1GiB"
default.cpu = "build"
source = "none"
[variants.build]
git = "{git}"
ref = "{commit}"
"""


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A wheel of a few files, as an installer takes it."""
    info = f"{name}-{version}.dist-info"
    about = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, *about, f"{info}/RECORD"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in {**files, **about, f"{info}/RECORD": record}.items():
            archive.writestr(inside, text)
    return path


def locked(file: Path) -> str:
    name, version, *_ = file.name.split("-")
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}\n"


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two kinds of which all lies on disk: torch and packaging in name alone, and a wheel from a repository."""
    links, docker, source = tmp_path / "links", tmp_path / "docker", tmp_path / "source"
    wheel(links, "torch", "2.13.0+cpu", {"torch/__init__.py": TORCH})
    requirements = {"packaging/__init__.py": "", "packaging/requirements.py": "Requirement = None\n"}
    packaging = wheel(links, "packaging", "99.0", requirements)
    wheel(source, "pebble", "1.0", {"pebble.py": "def main(): print('rolling')\n"})
    git(source, "init", "--quiet")
    git(source, "add", ".")
    git(source, "commit", "--quiet", "--message", "a wheel")
    commit = git(source, "rev-parse", "HEAD")

    (docker / "wheels" / "pebble").mkdir(parents=True)
    (docker / "locks").mkdir()
    for name in ("platforms.toml", "wheels/stage.sh"):
        shutil.copyfile(ROOT / "docker" / name, docker / name)
    (docker / "kinds.toml").write_text(KINDS)
    (docker / "wheels" / "pebble" / "wheel.toml").write_text(WHEEL.format(git=f"file://{source}", commit=commit))
    (docker / "wheels" / "pebble" / "build.sh").write_text('cp ./*.whl "$WHEELS"\n')
    (docker / "locks" / "sources.toml").write_text(f'[commits]\n"file://{source} {commit}" = "{commit}"\n')
    (docker / "locks" / "wheel-pebble-build.tools.txt").write_text("")
    for kind in ("tiny", "bare"):
        (docker / "locks" / f"{kind}-cpu.txt").write_text(locked(packaging))
    monkeypatch.setenv("UV_FIND_LINKS", str(links))
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    return docker


def rewrite(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def left(environment: Environment) -> set[str]:
    """What lies beside its name, by what comes after that."""
    names = (path.name for path in environment.folder.parent.iterdir())
    return {name.removeprefix(environment.folder.name) for name in names}


def made(environment: Environment) -> list[Step]:
    told: list[Step] = []
    make(environment, told.append)
    return told


# What it is named by


@pytest.mark.parametrize(
    ("file", "old", "new", "moves"),
    [
        ("locks/tiny-cpu.txt", "packaging==99", "packaging==98", True),
        ("locks/bare-cpu.txt", "packaging==99", "packaging==98", False),
        ("platforms.toml", 'torch = "2.13.0"', 'torch = "2.13.1"', True),
        ("wheels/stage.sh", "set -eu", "set -eux", True),
        ("wheels/pebble/build.sh", "cp ", "cp -f ", True),
        ("wheels/pebble/wheel.toml", 'job_memory = "1GiB"', 'job_memory = "2GiB"', False),
        ("wheels/pebble/wheel.toml", "[variants.build]", '[variants.build]\nenv = { FAST = "1" }', True),
        ("kinds.toml", 'imports = ["torch", "pebble"]', 'imports = ["torch"]', True),
        ("kinds.toml", "what is tried here", "whatever is tried", False),
    ],
)
def test_the_name_moves_with_what_is_in_it_and_with_nothing_else(
    docker: Path, file: str, old: str, new: str, moves: bool
) -> None:
    before = environment_for("tiny", HOME, docker).folder
    assert before.parent == HOME / "environments" and before.name.startswith("tiny-cpu-")
    rewrite(docker / file, old, new)
    assert (environment_for("tiny", HOME, docker).folder != before) is moves


def test_the_name_moves_with_the_python_and_with_whose_radeon_stack_it_is(docker: Path) -> None:
    spec = environment_for("tiny", HOME, docker).spec
    before = environment_key(spec)
    assert environment_key(spec, "cpython-3.99-x86_64") != before
    assert environment_key(spec, package=Path("/another/checkout/radeon_stack")) != before
    assert local_wheel_key(spec, spec.wheels[0], "cpython-3.99-x86_64") != local_wheel_key(spec, spec.wheels[0])


def test_a_kind_that_there_is_not_is_a_bad_value() -> None:
    with pytest.raises(UsageError, match="no kind of image 'verfy'; did you mean 'verify'"):
        environment_for("verfy", HOME)


# What is told to whom


@pytest.mark.parametrize(
    ("environ", "settings", "links"),
    [
        ({}, "", ""),
        ({}, "/wheels\n/more wheels\n", "/wheels,/more,wheels"),
        ({"PIP_FIND_LINKS": "/a /b"}, "/wheels", "/a,/b"),
        ({"UV_FIND_LINKS": "/c,/d", "PIP_FIND_LINKS": "/a"}, "/wheels", "/c,/d"),
    ],
)
def test_wheels_on_disk_are_found_where_uv_or_pip_is_told_of_them(
    environ: dict[str, str], settings: str, links: str
) -> None:
    assert find_links(environ, lambda: settings) == links


def test_torch_comes_from_pytorchs_own_index_unless_it_lies_on_disk() -> None:
    assert cpu_torch("2.13.0", "") == ["torch==2.13.0", "--torch-backend", "cpu"]
    assert cpu_torch("2.13.0", "/wheels") == ["torch==2.13.0"]


def test_the_reason_is_the_last_line_that_tells_of_an_error_with_its_deepest_cause() -> None:
    lines = ["Resolving", "error: Failed to fetch: `a`", "  cause: error sending", "  cause: no route", "bye"]
    assert reason(lines) == "error: Failed to fetch: `a`: no route"
    assert reason([*lines, "ERROR: No matching distribution", "ERROR: subprocess-exited-with-error"]) == (
        "ERROR: No matching distribution"
    )
    assert reason(["one", "two", ""]) == "two" and reason([]) == "it said nothing"


# What a machine lacks


def test_a_missing_compiler_is_told_before_anything_is_made(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = environment_for("tiny", docker.parent / "home", docker)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "g++" else f"/usr/bin/{name}")
    with pytest.raises(MachineError, match=r"there is no g\+\+, and pebble is compiled here") as caught:
        make(environment, lambda step: pytest.fail(step.title))
    assert caught.value.remedy == "install them: sudo apt install g++"
    assert left(environment) == {".lock"}
    require_programs([], ["uv"])  # what compiles nothing needs no compiler


def test_a_python_without_pip_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="ensurepip"):
        require_programs([], None)
    require_programs([], ["uv"])


# The making


def test_it_is_made_once_and_a_wheel_is_compiled_once(docker: Path, tmp_path: Path) -> None:
    environment = environment_for("tiny", tmp_path / "home", docker)
    assert not environment.ready
    told = made(environment)
    ended = [step.title for step in told if step.state == "done"]
    assert told[0].state == "note" and "once" in told[0].title and "compile pebble" in told[0].title
    fetched = ["an empty environment", "torch 2.13.0", "packages by hash: 1"]
    assert ended == [*fetched, "pebble 1.0, compiled", "pebble 1.0", "verified"]
    assert environment.ready and left(environment) == {"", ".log", ".lock"}

    # Its scripts know where they are now, what runs in it is this radeon-stack, and the checks are on record.
    for script in ("pebble", "activate"):
        text = (environment.folder / "bin" / script).read_text()
        assert str(environment.folder) in text and ".partial" not in text
    run = subprocess.run([environment.folder / "bin" / "pebble"], capture_output=True, text=True, check=True)
    assert run.stdout == "rolling\n"
    ask = [environment.python, "-c", "import radeon_stack; print(radeon_stack.__path__[0])"]
    clean = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    shown = subprocess.run(ask, capture_output=True, text=True, check=True, env=clean, cwd=tmp_path).stdout.strip()
    assert Path(shown).resolve() == PACKAGE
    record = json.loads((environment.folder / "radeon-stack" / "build.json").read_text())
    assert record["packages"]["python"] == {"packaging": "99.0", "pebble": "1.0", "torch": "2.13.0+cpu"}
    assert set(record["wheels"]) == {"pebble-1.0-py3-none-any.whl"}

    assert made(environment) == []
    rewrite(docker / "locks" / "tiny-cpu.txt", "packaging==", "\npackaging==")
    another = environment_for("tiny", tmp_path / "home", docker)
    assert another.folder != environment.folder
    told = made(another)
    assert ("pebble 1.0, from the store", "cached") in [(step.title, step.state) for step in told]
    assert "compile" not in told[0].title
    assert lacking(environment.spec) == ("pebble",)  # of which this Python has nothing


def test_what_cannot_be_had_is_told_with_the_log_and_leaves_nothing(docker: Path, tmp_path: Path) -> None:
    rewrite(docker / "locks" / "bare-cpu.txt", "--hash=sha256:", f"--hash=sha256:{'0' * 64} #")
    environment = environment_for("bare", tmp_path / "home", docker)
    with pytest.raises(ImageError, match=r"Failed to download `packaging==99\.0`: Hash mismatch") as caught:
        made(environment)
    assert caught.value.where == "the environment for bare: packages by hash: 1"
    assert str(environment.log) in caught.value.remedy and environment.log.read_text().count("$ ") > 2
    assert not environment.ready and left(environment) == {".log", ".lock"}


def test_what_does_not_keep_its_promise_does_not_exist(docker: Path, tmp_path: Path) -> None:
    rewrite(docker / "kinds.toml", 'cpu.imports = ["json"]', 'cpu.imports = ["no_such_module"]')
    environment = environment_for("bare", tmp_path / "home", docker)
    with pytest.raises(BuildError, match=r"checks failed \(imports\): .*no_such_module"):
        made(environment)
    assert left(environment) == {".log", ".lock"}


def test_what_a_killed_attempt_left_is_cleared(docker: Path, tmp_path: Path) -> None:
    environment = environment_for("bare", tmp_path / "home", docker)
    half = environment.folder.with_name(f"{environment.folder.name}.partial")
    (half / "bin").mkdir(parents=True)
    (half / "bin" / "left").touch()
    made(environment)
    assert environment.ready and not (environment.folder / "bin" / "left").exists() and not half.exists()
    # And a Python that has gone takes the environment with it: it is made anew.
    environment.python.unlink()
    environment.python.symlink_to("/no/such/python3")
    assert not environment.ready and made(environment) and environment.ready


def another_run(environment: Environment, docker: Path) -> subprocess.Popen[str]:
    """A process that makes the environment and prints its steps."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from radeon_stack.images.environments import environment_for\nfrom radeon_stack.images.making import make\n"
        "kind, home, docker = sys.argv[1:]\n"
        "make(environment_for(kind, Path(home), Path(docker)), lambda step: print(step.state, step.title, flush=True))"
    )
    command = [sys.executable, "-c", code, environment.kind, str(environment.home), str(docker)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_second_run_waits_for_the_first_and_finds_it_ready(docker: Path, tmp_path: Path) -> None:
    environment = environment_for("bare", tmp_path / "home", docker)
    environment.folder.parent.mkdir(parents=True)
    with environment.folder.with_name(f"{environment.folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with another_run(environment, docker) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "note waiting for another run: it is making the environment for bare\n"
            environment.python.parent.mkdir(parents=True)
            environment.python.symlink_to(sys.executable)
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert other.stdout.read() == ""
        assert other.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_it_leaves_no_child_and_nothing_half_made(
    docker: Path, tmp_path: Path, number: signal.Signals
) -> None:
    told = tmp_path / "pid"
    (docker / "wheels" / "pebble" / "build.sh").write_text(f"echo $$ > {told}.new; mv {told}.new {told}; sleep 60\n")
    environment = environment_for("tiny", tmp_path / "home", docker)
    with another_run(environment, docker) as other:
        pid = int(wait_for(lambda: told.exists() and told.read_text(), what="the wheel's build"))
        other.send_signal(number)
        assert other.wait(20) not in (0, None)
    wait_for(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes())
    assert left(environment) == {".log", ".lock"}


# Which Python a run takes


def on_verify(preset: str | None = "demo", **more: str) -> Effective:
    return resolve(read("probe"), preset, ("image=verify", *(f"{key}={text}" for key, text in more.items())))


def test_this_python_is_taken_when_it_has_all_that_the_kind_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "lacking", lambda spec: ())
    choice = choose.choose(on_verify(), NO_GPU, "local", None, HOME)
    assert choice.environment is None and choice.python == sys.executable
    assert choice.python_why == "this Python has all that verify promises"


def test_else_an_environment_which_need_not_be_there_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(choose, "lacking", lambda spec: ("llama_cpp", "vllm"))
    choice = choose.choose(on_verify(), NO_GPU, "local", None, HOME)
    assert choice.environment is not None and not choice.environment.ready
    assert choice.python == str(choice.environment.folder / "bin" / "python")
    here = replace(circumstances(HERE, None), choice=choice)
    told = plan(on_verify(), here, run_id="a", run_dir=tmp_path, cache=tmp_path)
    assert told.command[0] == choice.python
    assert "this Python lacks llama_cpp, vllm" in told.reasons["command"]
    assert {"PYTHONPATH", "PYTHONHOME"} <= set(told.unset)


def test_training_stays_with_this_python() -> None:
    choice = choose.choose(resolve(read("train-llama"), "demo"), NO_GPU, "local", None, HOME)
    assert choice.environment is None and choice.python == sys.executable


def test_a_recipe_that_needs_a_gpu_is_refused_and_so_is_a_kind_that_there_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choose, "lacking", lambda spec: ("vllm",))
    with pytest.raises(MachineError, match="for the CPU alone") as caught:
        choose.choose(on_verify(None), NO_GPU, "local", None, HOME)
    assert caught.value.remedy.startswith("build an image: make image ") and "KIND=verify" in caught.value.remedy
    with pytest.raises(UsageError, match="no kind of image 'verfy'") as bad:
        choose.choose(resolve(read("probe"), "demo", ("image=verfy",)), NO_GPU, "local", None, HOME)
    assert bad.value.where.endswith("probe.toml: image")


def test_a_dry_run_says_that_it_would_be_made_and_makes_nothing(cli: Cli, home: Path) -> None:
    words = ("run", "probe", "--preset", "demo", "--set", "image=verify", "--engine", "local", "--dry-run")
    told = cli(*words)
    assert told.code == Exit.OK
    first, *_, last = told.out.splitlines()
    record: dict[str, Any] = cli(*words, "--json").json
    if "environment" not in record:
        pytest.skip("this Python has all that verify promises")
    assert first == "# first, once: a run by radeon-stack makes the environment for verify"
    assert f"{home}/environments/verify-cpu-" in last
    assert record["environment"]["ready"] is False and not (home / "environments").exists()


def test_a_run_makes_it_first_and_tells_the_steps_on_stderr(
    docker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = environment_for("bare", tmp_path / "home", docker)
    drafted: Any = SimpleNamespace(environment=environment)
    require_environment(drafted)
    told = capsys.readouterr()
    assert environment.ready and told.out == ""
    assert told.err.splitlines()[0] == "· making an environment for bare, once: a minute or two"
    assert [line[0] for line in told.err.splitlines()[1:]] == ["✓"] * 4
    require_environment(drafted)
    assert capsys.readouterr().err == ""
