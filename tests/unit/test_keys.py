"""A key moves with everything that can change what it names, and with nothing else."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radeon_stack.catalog.kinds import Addition, Kind
from radeon_stack.catalog.platforms import Platform, load_platforms
from radeon_stack.catalog.wheels import Variant, Wheel
from radeon_stack.images.keys import key_of
from radeon_stack.images.render import image_key, package_files, requirements_key, wheel_key
from radeon_stack.images.spec import ImageSpec, image_spec
from tests.conftest import ROOT

NAME = "rocm7.1.1-gfx1201"
IMAGE, WHEEL, REQUIREMENTS = "image", "flash-attn", "requirements"
ALL = {IMAGE, WHEEL, REQUIREMENTS}

# Each fact of a platform, and the keys it moves. A new field that is not told here fails a test.
PLATFORM: dict[str, set[str]] = {
    "name": {IMAGE},
    "base": ALL,
    "digest": ALL,
    "python": {IMAGE},
    "torch": {IMAGE},
    "triton": {IMAGE},
    "rocm": ALL,  # its lock is another
    "gfx": {IMAGE, WHEEL},
    "drivers": {IMAGE},
    "official": set(),
    "source": set(),
    "home": {IMAGE},
    "brings": {IMAGE, REQUIREMENTS},  # … which are locked to agree with it: a test of its own
    "kinds": set(),  # of other kinds
}
# … of a spec, …
SPEC: dict[str, set[str]] = {"identity": ALL, "base": {IMAGE}, "trim": {IMAGE}}
# … and of a file in docker/: (file, a text in it, what stands there instead).
FILES: dict[tuple[str, str, str], set[str]] = {
    ("Dockerfile.j2", "WORKDIR /tmp", "WORKDIR /"): {IMAGE},
    ("Dockerfile.j2", "sh /build/stage.sh", "sh -x /build/stage.sh"): {IMAGE, WHEEL},
    ("Dockerfile.j2", "SHELL [", "ARG NEW\nSHELL ["): {IMAGE},
    ("Dockerfile.j2", "# What the base brought", "# Whatever the base brought"): set(),
    ("platforms.toml", "is a word in its `gfx`", "is listed in its `gfx`"): set(),
    ("kinds.toml", 'summary = "fine', 'summary = "finer'): set(),
    ("kinds.toml", '"torch", "transformers", "peft"', '"torch", "peft"'): {IMAGE},
    ("kinds.toml", "kernels = true\n", ""): {IMAGE},
    ("kinds.toml", 'imports = ["vllm"]', "imports = []"): set(),  # of another kind
    ("locks/train-rocm7.1.1.txt", "--hash=sha256:", "--hash=sha256:0"): {IMAGE, REQUIREMENTS},
    ("locks/train-rocm7.2.4.txt", "--hash=sha256:", "--hash=sha256:0"): set(),
    ("locks/wheel-flash-attn-triton.tools.txt", "--hash=sha256:", "--hash=sha256:0"): {IMAGE, WHEEL},
    ("locks/wheel-flash-attn-triton.source.txt", "--hash=sha256:", "--hash=sha256:0"): {IMAGE, WHEEL},
    ("locks/wheel-flash-attn-ck.tools.txt", "--hash=sha256:", "--hash=sha256:0"): set(),
    ("locks/dev.txt", "--hash=sha256:", "--hash=sha256:0"): set(),
    ("wheels/stage.sh", "set -eu", "set -eux"): {IMAGE, WHEEL},
    ("wheels/flash-attn/build.sh", "pip wheel .", "pip -v wheel ."): {IMAGE, WHEEL},
    ("wheels/llama-cpp-python/build.sh", "pip wheel .", "pip -v wheel ."): set(),
    ("wheels/flash-attn/wheel.toml", 'BUILD_TARGET = "rocm" }\n# The', 'BUILD_TARGET = "auto" }\n# The'): {
        IMAGE,
        WHEEL,
    },
    ("wheels/flash-attn/wheel.toml", "runtime_env = { FLASH", "runtime_env = { NO_FLASH"): {IMAGE},
    ("wheels/flash-attn/wheel.toml", 'modules = ["flash_attn.', 'modules = ["flash.'): {IMAGE},
    ("wheels/flash-attn/wheel.toml", 'job_memory = "5GiB"', 'job_memory = "6GiB"'): set(),
    ("wheels/flash-attn/wheel.toml", 'source = "Dao', 'source = "The Dao'): set(),
    ("wheels/flash-attn/wheel.toml", 'OPT_DIM = "64,128"', 'OPT_DIM = "128"'): set(),  # the other variant's
}


def spec(docker: Path | None = None, platform: Platform | None = None, **more: Any) -> ImageSpec:
    return image_spec("train", platform or load_platforms(docker)[NAME], docker=docker, **more)


def keys(made: ImageSpec) -> dict[str, str]:
    found = {IMAGE: image_key(made), REQUIREMENTS: requirements_key(made)}
    return found | {wheel.name: wheel_key(made, wheel) for wheel in made.wheels}


def moved(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


BEFORE = keys(spec())


def test_every_fact_of_a_platform_is_told_here() -> None:
    assert PLATFORM.keys() == {field.name for field in fields(Platform)}
    given_to_a_spec = {"identity", "base", "trim", "base_env"}
    derived = {"kind_name", "kind", "platform", "wheels", "variants", "runtime_env", "modules", "docker"}
    assert {field.name for field in fields(ImageSpec)} == given_to_a_spec | derived


def test_every_key_of_a_wheels_file_and_of_a_kinds_is_told_here() -> None:
    """Those of the models are few; the file table above changes each one that can move a key."""
    assert Wheel.model_fields.keys() == {"version", "job_memory", "default", "requires", "source", "variants"}
    variant = {"index", "git", "ref", "tools", "env", "runtime_env", "modules"}
    assert Variant.model_fields.keys() == variant
    fields = {"summary", "extra", "imports", "apart", "wheels", "cpu", "rocm", "kernels"}
    assert Kind.model_fields.keys() == fields
    assert Addition.model_fields.keys() == {"requirements", "imports", "without"}


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "digest": st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True),
    "rocm": st.just("7.2.4"),
    "gfx": st.sampled_from(["gfx1100", "gfx1200", "gfx1151"]),
    "env": st.dictionaries(st.sampled_from("ABC"), st.text("xyz", max_size=3)).map(lambda d: tuple(sorted(d.items()))),
    "drivers": st.lists(st.sampled_from(["6.12.12", "6.16.6", "6.19.4"]), min_size=1).map(tuple),
    "official": st.booleans(),
    "home": st.from_regex(r"/opt/[a-z]{1,8}", fullmatch=True),
    "kinds": st.just({"verify": load_platforms()["cpu"]}),
    "reasons": st.lists(st.text(max_size=5)).map(tuple),
}
WORDS = st.from_regex(r"[a-z][a-z0-9./-]{0,12}[a-z0-9]", fullmatch=True)


@pytest.mark.parametrize("name", [name for name in PLATFORM if name != "brings"])
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_fact_of_the_platform_moves_the_keys_that_depend_on_it_and_no_other(name: str, data: st.DataObject) -> None:
    platform = load_platforms()[NAME]
    versions = st.from_regex(r"[2-9]\.[0-9]\.[0-9]", fullmatch=True)
    value = data.draw(VALUES.get(name, versions if name in ("torch", "triton", "python") else WORDS))
    after = keys(spec(platform=replace(platform, **{name: value})))
    assert moved(BEFORE, after) == (PLATFORM[name] if value != getattr(platform, name) else set())


def test_what_a_base_brings_moves_the_image_and_by_a_lock_of_its_own_the_requirements(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    shutil.copytree(ROOT / "docker", docker)
    text = (docker / "locks/train-rocm7.1.1.txt").read_text()
    (docker / "locks/train-vllm-rocm7.1.1.txt").write_text(text.replace("--hash=sha256:", "--hash=sha256:0", 1))
    platform = replace(load_platforms(docker)[NAME], brings={"vllm": "1.0"})
    assert moved(BEFORE, keys(spec(docker, platform))) == PLATFORM["brings"]


@pytest.mark.parametrize("name", SPEC)
@settings(max_examples=5)
@given(value=WORDS)
def test_what_the_base_was_found_to_be_moves_everything_and_its_name_the_image_alone(name: str, value: str) -> None:
    before = spec()
    changes: dict[str, Any] = {"base": before.base, "identity": before.identity, "trim": False}
    changes[name] = True if name == "trim" else value
    assert moved(BEFORE, keys(spec(**changes))) == SPEC[name]


@pytest.mark.parametrize(("file", "old", "new"), FILES)
def test_a_line_of_a_file_moves_the_keys_that_depend_on_it_and_no_other(
    tmp_path: Path, file: str, old: str, new: str
) -> None:
    docker = tmp_path / "docker"
    shutil.copytree(ROOT / "docker", docker)
    text = (docker / file).read_text()
    assert old in text, f"{file} has no {old}"
    (docker / file).write_text(text.replace(old, new, 1))
    assert moved(BEFORE, keys(spec(docker))) == FILES[file, old, new]


def test_a_patch_beside_a_wheel_moves_its_key(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    shutil.copytree(ROOT / "docker", docker)
    (docker / "wheels/flash-attn/patches").mkdir()
    (docker / "wheels/flash-attn/patches/01-fix.patch").write_text("--- a\n+++ b\n")
    assert moved(BEFORE, keys(spec(docker))) == {IMAGE, WHEEL}


def test_another_variant_is_another_wheel() -> None:
    assert moved(BEFORE, keys(spec(choices={"flash-attn": "ck"}))) == {IMAGE, WHEEL}


def test_what_runs_inside_moves_the_image_and_the_command_line_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = package_files()
    assert "workloads/finetune/training.py" in inside and "codeobjects/elf.py" in inside
    assert not [name for name in inside if name.startswith(("cli/", "images/", "launch/", "host/", "catalog/"))]
    for name in ("workloads/finetune/training.py", "kernels/jit/linear.py", "kernels/variants.py"):
        changed = {**inside, name: b""}
        monkeypatch.setattr("radeon_stack.images.render.package_files", changed.copy)
        assert moved(BEFORE, keys(spec())) == {IMAGE}, name


@given(st.dictionaries(st.text(max_size=4), st.text(max_size=4)))
def test_a_key_knows_no_order(inputs: dict[str, str]) -> None:
    assert key_of(inputs) == key_of(dict(reversed(inputs.items())))
    assert len(key_of(inputs)) == 16
