"""The same runs inside a real container, through a real engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from radeon_stack.catalog.load import read, resolve
from radeon_stack.errors import Exit, MachineError
from radeon_stack.host.engines import client
from radeon_stack.host.machine import User, probe
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.launch.circumstances import Asked, find_out
from radeon_stack.launch.docker import create, run_arguments
from radeon_stack.launch.launcher import draft, write_records
from radeon_stack.launch.planner import VENV_PYTHON, plan
from radeon_stack.launch.supervise import carry_out
from radeon_stack.launch.verification import kernel_audit_plan, verification_plan
from radeon_stack.runs import events as ev
from radeon_stack.runs.store import Run, RunStore, State
from tests.conftest import ROOT, Cli, Result, wait_for
from tests.stages import STAGES, build

pytestmark = [pytest.mark.engine, pytest.mark.work, pytest.mark.usefixtures("image")]
DOCKER = ("--engine", "docker")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No container of ours outlives its test."""
    yield
    left = client().containers.list(all=True, filters={"label": ["radeon-stack.run"]})
    names = [container.name for container in left]
    for container in left:
        container.remove(force=True)
    assert names == []


def losses(told: Any) -> dict[int, float]:
    return {metric["step"]: metric["loss"] for metric in told["metrics"] if "loss" in metric}


def container_of(run: Run) -> Any:
    def found() -> Any:
        containers = client().containers.list(filters={"label": [f"radeon-stack.run={run.path}"]})
        return containers[0] if containers else None

    return wait_for(found, what="the container")


def the_run(home: Path) -> Run:
    return wait_for(lambda: next(iter(RunStore(home)), None), what="the run's directory")


def step_reached(run: Run, step: int) -> bool:
    return any(isinstance(event, ev.Metric) and event.step >= step for event in ev.read_events(run.events))


def test_the_demo_gives_the_same_result_in_a_container_and_without_one(cli: Cli, home: Path) -> None:
    """The one without has a test of its own to its end; here it is stopped when it has told enough to compare."""
    demo = ("run", "train-llama", "--preset", "demo", "--json")
    outside = subprocess.Popen(
        [sys.executable, "-m", "radeon_stack", *demo, "--engine", "local"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = the_run(home)
    wait_for(lambda: step_reached(run, 8), seconds=600, what="step 8")
    outside.send_signal(signal.SIGINT)
    out, err = outside.communicate(timeout=120)
    assert outside.returncode == Exit.INTERRUPTED, err
    expected = losses(json.loads(out))
    assert list(expected)[:8] == list(range(1, 9)) and expected[8] < expected[1] - 1

    inside = cli(*demo, *DOCKER)
    assert inside.code == Exit.OK, inside.err
    told = inside.json["result"]
    assert (told["correct_before"], told["correct_after"], told["correct_merged"]) == (0, 5, 5)
    found = losses(inside.json)
    assert list(found) == list(range(1, 25))
    for step, loss in expected.items():
        assert abs(found[step] - loss) <= 1e-3 * loss, step
    assert inside.json["image"].startswith("sha256:")


def written_at(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model_before(tiny_model: Path) -> dict[str, int]:
    """When the model's files were written, as it was before the run below."""
    return written_at(tiny_model)


@pytest.fixture(scope="module")
def whole(
    image: str,
    model_before: dict[str, int],
    cli: Cli,
    tiny_run: tuple[str, ...],
    shared_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Result:
    """The tiny run in a container from its beginning to its end, in a home of its own: to be looked at."""
    home = tmp_path_factory.mktemp("whole")
    (home / "cache").symlink_to(shared_cache)
    result = cli(*tiny_run, *DOCKER, env={**os.environ, "RADEON_STACK_HOME": str(home)})
    assert result.code == Exit.OK, result.err
    return result


def test_what_a_container_writes_belongs_to_the_caller_and_the_model_is_read_only(
    whole: Result, tiny_model: Path, model_before: dict[str, int]
) -> None:
    directory = Path(whole.json["directory"])
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in directory.rglob("*")}
    assert owners == {(os.getuid(), os.getgid())}
    assert written_at(tiny_model) == model_before


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to another user needs root")
def test_a_caller_other_than_root_gets_a_whole_run_and_owns_all_of_it(
    tiny_run: tuple[str, ...], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Uid 12345 has no name and no home in the image."""
    store = RunStore(tmp_path_factory.mktemp("other"))
    sets = [value for flag, value in pairwise(tiny_run) if flag == "--set"]
    for file in (tiny_model, *tiny_model.iterdir()):
        file.chmod(file.stat().st_mode | 0o055)
    effective = resolve(read("train-llama"), "demo", sets, {"--model": {"config": {"model": str(tiny_model)}}})
    here = find_out(effective, Sysroot(), Asked(engine="docker"), store.home)
    caller = replace(here.machine, user=User(12345, 12345, frozenset()))
    drafted = draft(effective, replace(here, machine=caller), store)
    write_records(drafted, store)
    for path in (store.home, *store.home.rglob("*")):
        os.chown(path, 12345, 12345)
    outcome = carry_out(drafted.run, drafted.plan, lambda event: None, lambda text: None)
    assert outcome.state is State.DONE, drafted.run.log.read_text()
    owners = {path.stat().st_uid for path in drafted.run.artifacts.rglob("*")} | {drafted.run.events.stat().st_uid}
    assert owners == {12345}


def test_a_run_is_resumed_in_the_image_that_it_had(cli: Cli, home: Path) -> None:
    """Not in the newest one that fits: here in one that is gone, which is told."""
    store = RunStore(home)
    effective = resolve(read("train-llama"), "demo")
    drafted = draft(effective, find_out(effective, Sysroot(), Asked(engine="docker"), home), store)
    gone = "sha256:" + "a" * 64
    write_records(replace(drafted, plan=replace(drafted.plan, image=gone)), store)
    status = drafted.run.status()
    assert status is not None
    drafted.run.write_status(status.model_copy(update={"state": State.FAILED}))
    told = cli("explain", "--resume", "last")
    assert told.code == Exit.IMAGE and gone in told.error


@pytest.mark.skipif(os.path.exists("/dev/kfd"), reason="this machine has a /dev/kfd to give")
def test_a_device_that_the_engine_has_not_is_told_with_its_remedy(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    effective = resolve(read("train-llama"), "demo")
    drafted = draft(effective, find_out(effective, Sysroot(), Asked(engine="docker"), store.home), store)
    write_records(drafted, store)
    with pytest.raises(MachineError, match="error gathering device information") as caught:
        carry_out(drafted.run, replace(drafted.plan, devices=("/dev/kfd",)), lambda event: None, lambda text: None)
    status = drafted.run.status()
    assert "radeon-stack doctor" in caught.value.remedy
    assert status is not None and status.diagnosis is not None and status.diagnosis.signature == "RS-ER-007"


def test_a_verification_on_a_gpu_runs_with_what_known_issues_ask_for(tmp_path: Path) -> None:
    tree = Sysroot(build(STAGES["rx9070-and-rx9060xt"], tmp_path))
    labels = {"radeon-stack.gfx": "gfx1200", "radeon-stack.rocm": "7.1.1", "radeon-stack.torch": "2.9.1"}
    image = SimpleNamespace(id="sha256:" + "a" * 64, labels=labels)
    made = verification_plan(image, probe(tree), tree, on_gpu=True)
    assert made.devices == ("/dev/kfd", "/dev/dri/renderD129")
    assert ("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", "1") in made.env
    assert "TORCH_ROCM" not in str(verification_plan(image, probe(tree), tree, on_gpu=False).env)


def test_an_images_kernels_are_audited_by_its_own_python_as_confined_as_its_verification(tmp_path: Path) -> None:
    tree = Sysroot(build(STAGES["rx9070-and-rx9060xt"], tmp_path))
    image = SimpleNamespace(id="sha256:" + "a" * 64, labels={"radeon-stack.gfx": "gfx1201"})
    made = kernel_audit_plan(image, probe(tree), tree, ("--target", "gfx1201"))
    assert made.command == (VENV_PYTHON, "-m", "radeon_stack.kernels.audit", "--target", "gfx1201")
    assert made.devices == () and made.mounts == () and made.network == "none"
    assert made == replace(
        verification_plan(image, probe(tree), tree, on_gpu=False), command=made.command, run_id=made.run_id
    )


def test_sdk_and_printed_command_make_the_same_container(tmp_path: Path) -> None:
    effective = resolve(read("train-llama"), "demo")
    for folder in ("run/artifacts", "cache"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("config.json", "events.jsonl"):
        (tmp_path / "run" / file).touch()
    here = find_out(effective, Sysroot(), Asked(engine="docker"), tmp_path)
    made = plan(effective, here, run_id="same", run_dir=tmp_path / "run", cache=tmp_path / "cache")
    ours = create(client(), made)
    theirs = subprocess.run(
        ["docker", "create", *run_arguments(made)[2:]], capture_output=True, text=True, check=True
    ).stdout.strip()
    containers = [client().api.inspect_container(identity) for identity in (ours.id, theirs)]
    for identity in (ours.id, theirs):
        client().containers.get(identity).remove(force=True)
    sdk, command = (
        {key: described[key] for key in ("Config", "HostConfig", "Mounts", "Path", "Args")} for described in containers
    )
    for described in (sdk, command):
        for part in ("Hostname", "AttachStdout", "AttachStderr", "ConsoleSize"):
            described["Config"].pop(part, None)
        described["HostConfig"].pop("ConsoleSize", None)
        described["HostConfig"].pop("LogConfig", None)
        described["Config"]["Env"].sort()
        described["Mounts"].sort(key=lambda mount: mount["Destination"])
        described["HostConfig"]["Mounts"].sort(key=lambda mount: mount["Target"])
        # Empty, absent and null are the same to the engine.
        for table in (described["Config"], described["HostConfig"]):
            for key in [key for key, value in table.items() if not value]:
                del table[key]
    assert sdk == command
    host = sdk["HostConfig"]
    assert host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges"] and host["Init"] is True
    assert (host["NetworkMode"], host["IpcMode"], host["ShmSize"]) == ("none", "private", 1 << 30)
    assert "Privileged" not in host and host["ReadonlyRootfs"] is True


def test_the_printed_commands_can_be_pasted(cli: Cli, tiny_run: tuple[str, ...]) -> None:
    printed = cli(*[part for part in tiny_run if part != "--json"], *DOCKER, "--dry-run").out
    done = subprocess.run(["sh", "-e"], input=printed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = cli("runs", "show", "last", "--json").json
    assert list(losses(told)) == list(range(1, 13)) and told["result"]["steps"] == 12


def test_auto_takes_the_engine_when_an_image_fits_and_says_why(cli: Cli, tiny_run: tuple[str, ...]) -> None:
    planned = cli(*tiny_run, "--dry-run").json["fields"]["engine"]
    assert planned["value"] == "docker"
    assert "radeon-stack/train:cpu is labelled train for cpu" in planned["reason"]


def test_an_image_that_the_engine_has_not_is_exit_5(cli: Cli, tiny_run: tuple[str, ...]) -> None:
    result = cli(*tiny_run, *DOCKER, "--image", "radeon-stack/none:such")
    assert result.code == Exit.IMAGE
    assert "the engine has no image radeon-stack/none:such; build it: make image ARCH=cpu" in result.error


def test_killed_in_its_container_and_resumed_the_loss_curve_is_the_uninterrupted_one(
    cli: Cli, tiny_run: tuple[str, ...], whole: Result, home: Path
) -> None:
    assert cli(*tiny_run, *DOCKER, "--detach").code == Exit.OK
    run = the_run(home)
    wait_for(lambda: step_reached(run, 5), what="step 5")
    container_of(run).kill(signal="SIGKILL")
    attached = cli("runs", "attach", "last")
    assert attached.code == Exit.WORKLOAD and "killed (SIGKILL)" in attached.error
    resumed = cli("run", "--resume", "last", "--json")
    assert resumed.code == Exit.OK, resumed.err
    assert resumed.json["engine"] == "docker"
    expected, found = losses(whole.json), losses(resumed.json)
    assert all(abs(found[step] - loss) <= 1e-3 * loss for step, loss in expected.items())


def test_ctrl_c_stops_the_container_cleanly_and_removes_it(tiny_run: tuple[str, ...], home: Path) -> None:
    attached = subprocess.Popen(
        [sys.executable, "-m", "radeon_stack", *tiny_run, *DOCKER, "--set", "train.steps=500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = the_run(home)
    wait_for(lambda: step_reached(run, 2), what="step 2")
    attached.send_signal(signal.SIGINT)
    out, err = attached.communicate(timeout=120)
    assert attached.returncode == Exit.INTERRUPTED, err
    assert json.loads(out)["state"] == "stopped"
    assert isinstance(ev.read_events(run.events)[-1], ev.Stopped)


def test_what_is_out_of_memory_is_told_as_killed(cli: Cli, tiny_run: tuple[str, ...]) -> None:
    result = cli(*tiny_run, *DOCKER, "--set", "resources.memory=128MiB")
    assert result.code == Exit.WORKLOAD
    assert "for want of memory" in result.error


class TestADeadEngine:
    """An engine of this test's own is killed in the middle of a run."""

    def test_the_run_says_so_with_exit_3_and_is_settled_when_the_engine_is_back(
        self, cli: Cli, tiny_run: tuple[str, ...], home: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        root = tmp_path_factory.mktemp("engine")
        tool = [sys.executable, str(ROOT / "tools" / "engine.py")]
        started = subprocess.run([*tool, "start", "--root", str(root)], capture_output=True, text=True, check=False)
        if started.returncode == 3:
            pytest.skip(started.stderr.strip())
        saved = subprocess.Popen(["docker", "save", "radeon-stack/train:cpu"], stdout=subprocess.PIPE)
        subprocess.run(
            ["docker", "load"],
            stdin=saved.stdout,
            env={**os.environ, "DOCKER_HOST": started.stdout.strip()},
            check=True,
            capture_output=True,
        )
        there = {**os.environ, "DOCKER_HOST": started.stdout.strip()}
        try:
            attached = subprocess.Popen(
                [sys.executable, "-m", "radeon_stack", *tiny_run, *DOCKER, "--set", "train.steps=500"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=there,
            )
            run = the_run(home)
            wait_for(lambda: step_reached(run, 2), what="step 2")
            subprocess.run([*tool, "stop", "--root", str(root)], check=True)
            out, err = attached.communicate(timeout=120)
            assert attached.returncode == Exit.MACHINE, err
            assert "stopped answering" in err and f"--resume {run.id}" in err
            assert json.loads(out)["state"] == "lost"
            assert "no container engine answers" in cli("runs", "show", "last", env=there).out
            subprocess.run([*tool, "start", "--root", str(root)], check=True, capture_output=True)
            # Back again: what became of the workload is seen, and the container is taken down.
            assert cli("runs", "list", "--json", env=there).json[0]["state"] in ("stopped", "failed")
            names = subprocess.run(
                ["docker", "ps", "--all", "--format", "{{.Names}}"],
                env=there,
                capture_output=True,
                text=True,
                check=True,
            )
            assert names.stdout == ""
        finally:
            subprocess.run([*tool, "stop", "--root", str(root)], check=True)
