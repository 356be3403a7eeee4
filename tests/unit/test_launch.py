"""One LaunchPlan, a reason for each field; every rendering says the same, and nothing has more rights than it needs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.catalog.load import read, resolve
from radeon_stack.cli.explain import lines
from radeon_stack.errors import Exit, MachineError, UsageError
from radeon_stack.host.engines import EngineProbe
from radeon_stack.host.gpus import Topology
from radeon_stack.host.machine import Machine, User
from radeon_stack.host.processes import Process
from radeon_stack.host.selection import Selection
from radeon_stack.images.resolve import Image
from radeon_stack.launch.choose import Choice
from radeon_stack.launch.circumstances import Circumstances
from radeon_stack.launch.docker import container_config, run_arguments, run_command
from radeon_stack.launch.local import LocalEngine
from radeon_stack.launch.model_files import require_whole
from radeon_stack.launch.plan import LaunchPlan, Mount
from radeon_stack.launch.planner import plan
from tests.conftest import Cli
from tests.stages import STAGES, build

IMAGE = Image("sha256:" + "a" * 64, "radeon-stack/train:cpu", "docker: it fits")
HERE = Machine(Topology((), 1, (), ()), {}, 64 << 30, User(1000, 100, frozenset({100})))
DOCKER = EngineProbe("unix:///run/docker.sock", "28.5.2")


def circumstances(machine: Machine = HERE, image: Image | None = IMAGE, **more: Any) -> Circumstances:
    choice = Choice("docker" if image else "local", image, "docker: asked for", DOCKER if image else None)
    return Circumstances(machine, more.pop("selection", Selection((), "the recipe takes no GPU")), choice, **more)


def demo_plan(tmp_path: Path, *, image: Image | None = IMAGE, machine: Machine = HERE, **flags: str) -> LaunchPlan:
    sets = [f"{key.replace('__', '.')}={value}" for key, value in flags.items()]
    return plan(
        resolve(read("train-llama"), "demo", sets),
        circumstances(machine, image),
        run_id="20260101-000000-train-llama-abcd",
        run_dir=tmp_path / "run",
        cache=tmp_path / "cache",
    )


def model_in(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(weights() if name.endswith(".safetensors") else b"{}")
    return folder


def weights(size: int = 0) -> bytes:
    """A safetensors file of so many bytes of weights."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def test_every_field_of_the_plan_has_a_reason(tmp_path: Path) -> None:
    made = demo_plan(tmp_path)
    assert {name for name in made.reasons if "." not in name} == set(made.field_names())
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
    host = container_config(demo_plan(tmp_path), "1.41")["HostConfig"]
    assert not {"Privileged", "CapAdd", "PidMode", "PortBindings", "Annotations"} & set(host)


def test_rootless_podmans_groups_are_asked_for_in_its_own_words(tmp_path: Path) -> None:
    made = replace(demo_plan(tmp_path), groups=("keep-groups",), client="podman")
    host = container_config(made, "1.41")["HostConfig"]
    assert host["Annotations"] == {"run.oci.keep_original_groups": "1"} and not host.get("GroupAdd")
    assert run_command(made)[0] == "podman" and ("--group-add", "keep-groups") in set(pairwise(run_command(made)))


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
    assert "HF_TOKEN=hf_very_secret" in container_config(made, "1.41")["Env"]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="HF_TOKEN is not set"):
        container_config(made, "1.41")
    with pytest.raises(UsageError, match="HF_TOKEN is not set"):
        LocalEngine().start(made)


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
    ("name", "content", "says"),
    [
        ("model.safetensors", weights(100)[:-30], "cut short: it has 142 bytes of 172"),
        ("model.safetensors", weights(100) + b"\0", "too long"),
        ("model.safetensors", weights(100)[:40], "cut short within its header"),
        ("model.safetensors", b"", "not a safetensors file"),
        ("model.safetensors", random.Random(1).randbytes(1000), "not a safetensors file"),
        ("model.safetensors", b"\5\0\0\0\0\0\0\0nojso", "not readable JSON"),
        ("model.safetensors", b'\x08\0\0\0\0\0\0\0{"a": 1}', "no plausible tensor: a"),
        ("model.safetensors", weights(100).replace(b"[0, ", b"[-1,"), "no plausible tensor: a"),
        ("config.json", b"", "not readable JSON"),
        ("tokenizer.json", b"{", "not readable JSON"),
        ("tokenizer_config.json", b"\0" * 500, "not readable JSON"),
        ("generation_config.json", b"[]", "not a JSON object"),
    ],
)
def test_a_damaged_model_is_refused_with_its_file_before_anything_starts(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    model = model_in(tmp_path / "m", "config.json", "tokenizer.json", "model.safetensors")
    (model / name).write_bytes(content)
    with pytest.raises(UsageError, match=says) as caught:
        demo_plan(tmp_path, config__model=json.dumps(str(model)))
    assert str(caught.value).startswith(f"{model / name}: ") and str(caught.value).endswith("; download it again")


@pytest.mark.parametrize("shard", ["b.safetensors", "../b.safetensors"])
def test_a_shard_that_an_index_names_has_to_be_there_where_the_index_counts(tmp_path: Path, shard: str) -> None:
    model = model_in(tmp_path / "m", "config.json", "tokenizer.json", "a.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": shard}}))
    (tmp_path / "b.safetensors").write_bytes(weights())
    with pytest.raises(UsageError, match=r"index.json: names .*b.safetensors, which is not there; download it again"):
        demo_plan(tmp_path, config__model=json.dumps(str(model)))
    (model / "model.safetensors").write_bytes(weights())
    demo_plan(tmp_path, config__model=json.dumps(str(model)))


def test_a_model_of_many_large_files_is_looked_at_in_no_time(tmp_path: Path) -> None:
    model = model_in(tmp_path / "m", "config.json", "tokenizer.json")
    header = weights(5 << 20).replace(bytes(5 << 20), b"")
    for number in range(16):
        with (model / f"model-{number:05}-of-00016.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + (5 << 20))  # a hole
    began = time.process_time()
    require_whole(model)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ("birthdy", "allowed: 'birthday', or a file ending in .jsonl"),
        ("none.jsonl", r"no data file .*none.jsonl \(nothing there\); give one: --data FILE"),
        ("folder.jsonl", r"\(a folder\)"),
        ("pipe.jsonl", r"\(no regular file\)"),
    ],
)
def test_a_missing_data_set_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.jsonl").mkdir()
    os.mkfifo("pipe.jsonl")
    with pytest.raises(UsageError, match=says):
        demo_plan(tmp_path, data__dataset=dataset)


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


def test_explain_reads_as_values_with_their_reasons(cli: Cli, tmp_path: Path) -> None:
    made = demo_plan(tmp_path)
    said = "\n".join(lines(made))
    assert "memory          6GiB\n    the recipe's limit" in said and "devices         none" in said
    assert f"{tmp_path}/cache → /radeon-stack/cache: what is expensive to make again" in said
    assert all(name in said for name in made.field_names())
    alone = cli("explain", "train-llama", "--preset", "demo", "--engine", "local")
    assert alone.out.splitlines()[-1].startswith(
        "a child process, no container: it has what you have: no client, image"
    )


def test_a_run_for_another_machine_is_only_looked_at(cli: Cli, tmp_path: Path) -> None:
    tree = build(STAGES["r9700"], tmp_path)
    words = ("run", "train-llama", "--preset", "demo", "--engine", "local", "--sysroot", tree)
    refused = cli(*words)
    assert refused.code == Exit.USAGE and "add --dry-run" in refused.error
    assert cli(*words, "--dry-run").code == Exit.OK


def test_a_folder_above_is_mounted_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_in(tmp_path / "model", "config.json", "tokenizer.json", "model.safetensors")
    (model / "below").mkdir()
    monkeypatch.chdir(model / "below")
    made = demo_plan(tmp_path, config__model='".."')
    assert Mount(str(model), "/radeon-stack/models/model", True) in made.mounts
