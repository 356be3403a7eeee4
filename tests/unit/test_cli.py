"""The command line as a user meets it: one line for an error, the right exit code, JSON where it was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from radeon_stack.cli import COMMANDS
from radeon_stack.cli import cli as program
from radeon_stack.errors import Exit
from radeon_stack.runs import events as ev
from radeon_stack.runs.store import RunStore, State, Status
from tests.conftest import Cli

NO_ENGINE = {**os.environ, "DOCKER_HOST": "unix:///nowhere/docker.sock"}


def finished_run(home: Path) -> Any:
    run = RunStore(home).new("train-llama")
    run.artifacts.mkdir(parents=True)
    write = ev.EventWriter(run.events)
    write(ev.Metric(step=1, values={"loss": 5.0}))
    write(ev.Result(values={"correct_before": 0, "correct_after": 5, "samples": 5}))
    run.log.write_text("hello from the log\n")
    run.write_status(
        Status(state=State.DONE, recipe="train-llama", engine="local", started=1.0, ended=2.0, exit_code=0)
    )
    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_listed_for_a_command_is_its_own(name: str) -> None:
    command = program.get_command(click.Context(program), name)
    assert command is not None
    assert (command.help or "").splitlines()[0].strip() == COMMANDS[name][1]


@pytest.mark.parametrize("words", [(), ("runs",), ("image",)])
def test_a_group_without_a_command_shows_its_help(cli: Cli, words: tuple[str, ...]) -> None:
    told = cli(*words)
    assert told.code == Exit.USAGE and not told.out
    assert told.err.splitlines() == cli(*words, "--help").out.splitlines()
    assert len(told.err.splitlines()) > 10


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run", "train-lama"], Exit.USAGE, "no recipe 'train-lama'; did you mean 'train-llama'?"),
        (["runs", "nope"], Exit.USAGE, "No such command 'nope'; see: "),
        (["runs", "sho"], Exit.USAGE, "Did you mean 'show'?"),
        (["rnu"], Exit.USAGE, "no command 'rnu'; did you mean 'run'?"),
        (["run"], Exit.USAGE, "which recipe?"),
        (["run", "train-llama", "--prest", "demo"], Exit.USAGE, "--preset"),
        (["run", "train-llama", "--preset", "dem"], Exit.USAGE, "did you mean 'demo'?"),
        (["run", "train-llama", "--preset", "demo", "--set", "train.stepz=5"], Exit.USAGE, "did you mean 'steps'?"),
        (["run", "train-llama", "--preset", "demo", "--set", "train.steps=x"], Exit.USAGE, "allowed: an integer"),
        (
            ["run", "train-llama", "--preset", "demo", "--model", "/nowhere"],
            Exit.USAGE,
            "--model: config.model: no model",
        ),
        (
            ["run", "train-llama", "--preset", "demo", "--data", "x.csv"],
            Exit.USAGE,
            "ending in .jsonl, .json or .parquet",
        ),
        (["run", "train-llama"], Exit.MACHINE, "--preset demo"),
        (["run", "train-llama", "--preset", "demo", "--engine", "docker"], Exit.MACHINE, "no container engine answers"),
        *(
            ([*words, option, ""], Exit.USAGE, f"{option}: is empty; give a value")
            for words in (["run", "train-llama"], ["explain", "train-llama"])
            for option in ("--preset", "--model", "--data", "--image", "--gpus")
        ),
        (["export", "train-llama", "--as", "shell", "-o", ""], Exit.USAGE, "is empty; give a value"),
        (["run", "--resume", ""], Exit.USAGE, "the name is empty"),
        (["run", "train-llama", "--preset", "demo", "--compare", ""], Exit.USAGE, "the name is empty"),
        (["run", "--resume", "last", "--preset", "demo"], Exit.USAGE, "--resume continues a run as it was"),
        (
            ["run", "train-llama", "--preset", "demo", "--image", "me/mine", "--engine", "local"],
            Exit.USAGE,
            "--image: the local engine takes no image",
        ),
        (
            ["run", "train-llama", "--preset", "demo", "--image", "me/mine"],
            Exit.MACHINE,
            "--image: an image needs an engine, and no container engine answers",
        ),
        (["run", "--resume", "nothing"], Exit.USAGE, "no runs in"),
        (["runs", "show", "last"], Exit.USAGE, "no runs in"),
        (["image", "render", "--arch", "gfx9"], Exit.USAGE, "no platform"),
        (["image", "build", "--arch", "cpu"], Exit.MACHINE, "radeon-stack: no container engine answers"),
        (["image", "audit", "./none.whl"], Exit.USAGE, "./none.whl: there is no such file"),
        (["image", "audit", "none.so"], Exit.USAGE, "none.so: there is no such file"),
        (["image", "audit", "/opt/None"], Exit.USAGE, "/opt/None: there is no such file"),
        (["image", "size", "./none"], Exit.USAGE, "./none: there is no such file"),
        (["image", "audit", "radeon-stack/train:cpu"], Exit.MACHINE, "no container engine answers"),
        (["image", "list", "--json"], Exit.MACHINE, "radeon-stack: no container engine answers"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_with_its_remedy_and_exit_code(
    cli: Cli, arguments: list[str], code: int, says: str
) -> None:
    result = cli(*arguments, env={**NO_ENGINE, "RADEON_STACK_HOME": os.environ["RADEON_STACK_HOME"]})
    assert result.code == code, result.err
    assert says in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert result.err.startswith("radeon-stack: ")
    assert result.out == ""


def test_the_platforms_are_listed_without_an_engine_too(cli: Cli) -> None:
    told = cli("image", "list", env=NO_ENGINE)
    assert told.code == Exit.OK and not told.out
    assert "no container engine answers" in told.err.splitlines()[0]
    assert "platforms: cpu" in told.err and "gfx1201" in told.err and "--engine" not in told.err


def test_debug_shows_the_traceback(cli: Cli) -> None:
    result = cli("--debug", "run", "train-lama")
    assert "Traceback" in result.err and "UsageError" in result.err


@pytest.mark.parametrize("place", ["file/below", "/proc/no/such"])
def test_a_home_that_cannot_be_written_is_named_with_the_way_out(cli: Cli, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    home = str(tmp_path / place)
    result = cli(
        "run", "train-llama", "--preset", "demo", "--engine", "local", env={**os.environ, "RADEON_STACK_HOME": home}
    )
    if "lacks" in result.err:
        pytest.skip("this Python lacks the packages of the extra 'work': make setup")
    assert result.code == Exit.MACHINE
    assert f"{home}: cannot write there" in result.err and "RADEON_STACK_HOME=DIR" in result.err


def test_list_and_show_speak_json(cli: Cli) -> None:
    recipes = {recipe["name"]: recipe for recipe in cli("list", "--json").json}
    assert "demo" in recipes["train-llama"]["presets"]
    shown = cli("show", "train-llama", "--preset", "demo", "--set", "train.steps=7", "--json").json["values"]
    assert shown["config.train.steps"] == {"value": 7, "from": "--set train.steps"}
    assert shown["config.train.max_grad_norm"]["from"].endswith("train-llama.toml")
    assert shown["expect.final_loss_max"] == {"value": None, "from": "default"}


def test_show_tells_where_each_value_comes_from(cli: Cli) -> None:
    lines = cli("show", "train-llama", "--preset", "demo").out.splitlines()
    assert any(line.split() == ["config.train.steps", "24", "train-llama.toml:", "presets.demo"] for line in lines)


def test_runs_are_listed_shown_logged_reported_and_removed(cli: Cli, home: Path) -> None:
    run = finished_run(home)
    assert "0 → 5 of 5 right" in cli("runs", "list").out
    assert cli("runs", "list", "--json").json[0]["state"] == "done"
    assert "0/5 before, 5/5 after" in cli("runs", "show", "last").out
    assert cli("runs", "show", "last", "--json").json["metrics"] == [{"step": 1, "loss": 5.0}]
    assert cli("runs", "logs", "last").out == "hello from the log\n"
    report = cli("runs", "report", "last").out.strip()
    assert Path(report).is_file()
    assert "would delete" in cli("runs", "rm", "last", "--dry-run").out
    for few in ("", "2", run.id[:3]):
        assert cli("runs", "rm", few).code == Exit.USAGE
    assert run.path.exists()
    assert cli("runs", "rm", "last").code == 0
    assert not run.path.exists()


@pytest.mark.parametrize(
    "encoding", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_without_utf_8_is_told_what_it_can_show(cli: Cli, home: Path, encoding: dict[str, str]) -> None:
    finished_run(home)
    listed = cli("runs", "list", env={**os.environ, **encoding})
    assert listed.code == Exit.OK, listed.err
    assert "0 ? 5 of 5 right" in listed.out
    assert cli("runs", "show", "last", env={**os.environ, **encoding}).code == Exit.OK
    assert cli("runs", "show", "größe", env={**os.environ, **encoding}).error.startswith("radeon-stack: no run 'gr")


@pytest.mark.parametrize("words", [("list", "--json"), ("show", "last"), ("show", "last", "--json")])
def test_a_reader_that_went_away_is_no_failure(home: Path, words: tuple[str, ...]) -> None:
    finished_run(home)
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "radeon_stack", "runs", *words],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (Exit.OK, "")


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stdout_or_stderr_is_no_failure(cli: Cli, home: Path, closed: int) -> None:
    finished_run(home)
    assert cli("runs", "list", preexec_fn=lambda: os.close(closed)).code == Exit.OK


def test_a_run_that_has_ended_cannot_be_stopped(cli: Cli, home: Path) -> None:
    run = finished_run(home)
    result = cli("runs", "stop", "last")
    assert (result.code, result.error) == (Exit.USAGE, f"radeon-stack: {run.id} is not running")


def test_a_finished_run_is_not_resumed(cli: Cli, home: Path) -> None:
    finished_run(home)
    result = cli("run", "--resume", "last")
    assert result.code == Exit.USAGE
    assert "is done; there is nothing to continue" in result.error


def test_on_a_narrow_terminal_a_listed_run_goes_on_at_a_word(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(home)
    why = "right_after is 0, at least 1 was expected of the answers"
    run.write_status(run.status().model_copy(update={"state": State.FAILED, "what": why}))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    program.main(["runs", "list"], standalone_mode=False)
    told = capsys.readouterr().out
    assert all(len(line) <= 80 for line in told.splitlines())
    assert " ".join(told.split()) == f"{run.id} failed local {why}"
    assert told.splitlines()[1].startswith("    ")


def test_a_response_cannot_drive_the_terminal(cli: Cli, home: Path) -> None:
    run = finished_run(home)
    ev.EventWriter(run.events)(ev.Artifact(name="evil\x1b[2J", path="x\x1b]0;title\x07"))
    assert "\x1b" not in cli("runs", "show", "last").out


def test_json_and_error_go_to_different_streams(cli: Cli, home: Path) -> None:
    result = cli("run", "train-llama", "--json")
    assert result.out == "" and result.code == Exit.MACHINE


def test_image_render_writes_a_context_and_refuses_a_full_folder(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "context"
    assert "docker build --tag radeon-stack/train:cpu" in cli("image", "render", "--arch", "cpu", "-o", folder).out
    assert (folder / "Dockerfile").read_text() == cli("image", "render", "--arch", "cpu").out
    again = cli("image", "render", "--arch", "cpu", "-o", folder)
    assert again.code == Exit.USAGE and "is not empty" in again.error


def test_image_build_dry_run_prints_the_command(cli: Cli) -> None:
    command = cli("image", "build", "--arch", "cpu", "--dry-run", "--json").json["command"]
    assert command[:2] == ["docker", "build"] and command[command.index("--tag") + 1] == "radeon-stack/train:cpu"


def test_dry_run_needs_no_home_and_makes_none(cli: Cli, tmp_path: Path) -> None:
    home = tmp_path / "none"
    result = cli(
        "run", "train-llama", "--preset", "demo", "--dry-run", "--engine", "local", "--json",
        env={**NO_ENGINE, "RADEON_STACK_HOME": str(home)},
    )  # fmt: skip
    if "lacks" in result.err:
        pytest.skip("this Python lacks the packages of the extra 'work': make setup")
    record = json.loads(result.out)
    assert record["fields"]["engine"]["value"] == "local"
    assert record["command"][0] == "env"
    assert not home.exists()
