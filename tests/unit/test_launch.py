"""One LaunchPlan, a reason for each field; every rendering says the same, and nothing has more rights than it needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.catalog.load import read, resolve
from radeon_stack.errors import MachineError, UsageError
from radeon_stack.host.gpus import Gpu, gfx_name, gpus
from radeon_stack.host.machine import Machine
from radeon_stack.host.processes import Process
from radeon_stack.images.resolve import Image
from radeon_stack.launch.docker import create_arguments, run_arguments
from radeon_stack.launch.plan import LaunchPlan, Mount
from radeon_stack.launch.planner import plan

IMAGE = Image("sha256:" + "a" * 64, "radeon-stack/train:cpu", "docker: it fits")
HERE = Machine(gpus=(), memory=64 << 30, uid=1000, gid=100)


def demo_plan(tmp_path: Path, *, image: Image | None = IMAGE, machine: Machine = HERE, **flags: str) -> LaunchPlan:
    sets = [f"{key.replace('__', '.')}={value}" for key, value in flags.items()]
    return plan(
        resolve(read("train-llama"), "demo", sets),
        machine,
        run_id="20260101-000000-train-llama-abcd",
        run_dir=tmp_path / "run",
        cache=tmp_path / "cache",
        engine="docker" if image else "local",
        why="docker: asked for",
        image=image,
    )


def model_in(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def staged_machine(root: Path, *nodes: tuple[int, int]) -> None:
    """A /sys tree with a CPU node and GPU nodes of (gfx_target_version, render minor)."""
    for index, (version, minor) in enumerate([(0, 0), *nodes]):
        node = root / "sys/class/kfd/kfd/topology/nodes" / str(index)
        node.mkdir(parents=True)
        (node / "properties").write_text(f"gfx_target_version {version}\ndrm_render_minor {minor}\n")


def test_every_field_of_the_plan_has_a_reason(tmp_path: Path) -> None:
    made = demo_plan(tmp_path)
    assert set(made.reasons) == set(made.field_names())
    assert all(len(reason) > 10 for reason in made.reasons.values())


def test_a_plan_without_a_reason_for_each_field_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shm"):
        made = demo_plan(tmp_path)
        replace(made, reasons={name: why for name, why in made.reasons.items() if name != "shm"})


@pytest.mark.parametrize("image", [IMAGE, None])
def test_a_plan_survives_being_written_down(tmp_path: Path, image: Image | None) -> None:
    made = demo_plan(tmp_path, image=image)
    assert LaunchPlan.from_record(json.loads(json.dumps(made.as_record()))) == made


def test_the_container_has_the_least_it_needs(tmp_path: Path) -> None:
    flags = run_arguments(demo_plan(tmp_path))
    pairs = set(pairwise(flags))
    assert {
        ("--cap-drop", "ALL"),
        ("--security-opt", "no-new-privileges"),
        ("--network", "none"),
        ("--ipc", "private"),
        ("--user", "1000:100"),
        ("--memory", str(6 << 30)),
        ("--shm-size", str(1 << 30)),
    } <= pairs
    assert {"--init", "--read-only"} <= set(flags)
    assert not {"--privileged", "host", "--cap-add", "--device", "--group-add", "--publish"} & set(flags)
    arguments = create_arguments(demo_plan(tmp_path))
    assert not {"privileged", "cap_add", "pid_mode", "ports"} & set(arguments)


def test_what_runs_inside_cannot_rewrite_the_records_that_the_host_acts_upon(tmp_path: Path) -> None:
    mounts = {mount.target: mount for mount in demo_plan(tmp_path).mounts}
    writable = {target for target, mount in mounts.items() if not mount.read_only}
    assert writable == {f"/radeon-stack/{name}" for name in ("run/events.jsonl", "run/artifacts", "cache")}
    assert mounts["/radeon-stack/run/config.json"].read_only
    assert str(tmp_path / "run") not in {mount.source for mount in mounts.values()}


def test_a_model_folder_is_mounted_to_be_read_only(tmp_path: Path) -> None:
    model = model_in(tmp_path / "My Model", "config.json", "tokenizer.json", "model.safetensors")
    made = demo_plan(tmp_path, config__model=json.dumps(str(model)))
    mount = Mount(str(model), "/radeon-stack/models/My Model", True)
    assert mount in made.mounts
    assert f"type=bind,source={model},target={mount.target},readonly" in run_arguments(made)
    assert made.command[-1] == mount.target


def test_a_comma_in_a_path_does_not_become_a_mount_option(tmp_path: Path) -> None:
    model = model_in(tmp_path / "a,readonly=false", "config.json", "tokenizer.json", "model.safetensors")
    made = demo_plan(tmp_path, config__model=json.dumps(str(model)))
    assert f'type=bind,"source={model}","target=/radeon-stack/models/{model.name}",readonly' in run_arguments(made)


def test_a_secret_is_a_name_in_plan_and_command_and_a_value_only_for_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    made = demo_plan(tmp_path, secrets='["HF_TOKEN"]')
    assert made.secrets == ("HF_TOKEN",)
    assert "hf_very_secret" not in json.dumps(made.as_record()) + json.dumps(run_arguments(made))
    assert create_arguments(made)["environment"]["HF_TOKEN"] == "hf_very_secret"  # noqa: S105
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="HF_TOKEN is not set"):
        create_arguments(made)


def test_a_gpu_recipe_gets_kfd_and_the_chosen_render_node_and_nothing_else(tmp_path: Path) -> None:
    staged_machine(tmp_path, (120001, 128), (120001, 129))
    for node in ("dev/kfd", "dev/dri/renderD128", "dev/dri/renderD129"):
        (tmp_path / node).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / node).write_text("")
    machine = replace(HERE, gpus=tuple(gpus(tmp_path)), sysroot=tmp_path)
    model = model_in(tmp_path / "m", "config.json", "tokenizer.json", "model.safetensors")
    effective = resolve(read("train-llama"), None, [], {"--model": {"config": {"model": str(model)}}})
    made = plan(effective, machine, run_id="r", run_dir=tmp_path, cache=tmp_path, engine="docker", image=IMAGE)
    assert made.devices == ("/dev/kfd", "/dev/dri/renderD128")
    assert made.groups == ((tmp_path / "dev/kfd").stat().st_gid,)


def test_a_gpu_recipe_without_a_gpu_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"needs 1 GPU; on this machine none is visible.*--preset demo"):
        plan(
            resolve(read("train-llama")), HERE, run_id="r", run_dir=tmp_path, cache=tmp_path, engine="local", image=None
        )


def test_more_memory_than_the_machine_has_is_refused_with_the_key(tmp_path: Path) -> None:
    with pytest.raises(
        MachineError, match=r"resources.memory: train-llama asks for 6GiB of memory, this machine has 4GiB"
    ):
        demo_plan(tmp_path, machine=replace(HERE, memory=4 << 30))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (None, "no model folder"),
        ((), "lacks config.json"),
        (("config.json",), "lacks a tokenizer"),
        (("config.json", "tokenizer.json"), "lacks weights"),
    ],
)
def test_an_incomplete_model_folder_is_refused_before_anything_starts(
    tmp_path: Path, names: tuple[str, ...] | None, says: str
) -> None:
    if names is not None:
        model_in(tmp_path / "m", *names)
    with pytest.raises(UsageError, match=says) as caught:
        demo_plan(tmp_path, config__model=json.dumps(str(tmp_path / "m")))
    assert str(caught.value).startswith("--set config.model: config.model: ")


@pytest.mark.parametrize(
    ("dataset", "says"),
    [("birthdy", "allowed: 'birthday', or a file ending in .jsonl"), ("none.jsonl", "no data file")],
)
def test_a_missing_data_set_is_refused_before_anything_starts(tmp_path: Path, dataset: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        demo_plan(tmp_path, data__dataset=dataset)


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (120001, "gfx1201"),
        (110000, "gfx1100"),
        (110501, "gfx1151"),
        (90010, "gfx90a"),
        (90402, "gfx942"),
        (90500, "gfx950"),
    ],
)
def test_gfx_names_are_decoded_with_minor_and_stepping_in_hex(version: int, name: str) -> None:
    assert gfx_name(version) == name


def test_gpus_are_read_from_a_staged_tree_and_the_cpu_is_none_of_them(tmp_path: Path) -> None:
    staged_machine(tmp_path, (120001, 128), (110000, 130))
    assert gpus(tmp_path) == [Gpu(0, "gfx1201", "/dev/dri/renderD128"), Gpu(1, "gfx1100", "/dev/dri/renderD130")]


@given(st.binary(max_size=200))
def test_no_properties_file_makes_detection_fail(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    root = tmp_path_factory.mktemp("sys")
    staged_machine(root, (120001, 128))
    (root / "sys/class/kfd/kfd/topology/nodes/1/properties").write_bytes(content)
    gpus(root)


def test_a_process_is_told_apart_by_its_start_also_when_it_has_gone() -> None:
    assert Process.current().alive
    assert not Process(os.getpid(), 1).alive
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    found = Process.of(child.pid)
    assert found is not None and found.alive
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not found.alive
    assert Process.of(child.pid) is None
