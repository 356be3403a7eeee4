"""Dockerfiles are rendered to the byte; builds get their secrets as files, and a client that can build is found."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from radeon_stack.catalog.platforms import platform_name, platforms
from radeon_stack.errors import BuildError, MachineError, UsageError
from radeon_stack.images.builder import BuildSettings, build, build_command, building_client, default_ca
from radeon_stack.images.spec import ImageSpec, dockerfile, write_context

GOLDEN = Path(__file__).parent / "golden"
KNOWN = platforms()


def spec(name: str) -> ImageSpec:
    return ImageSpec("train", name, KNOWN[name])


@pytest.mark.parametrize("name", KNOWN)
def test_the_dockerfile_of_each_platform_is_the_golden_one(name: str) -> None:
    golden = GOLDEN / f"Dockerfile.{name}"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(dockerfile(spec(name)))
    assert dockerfile(spec(name)) == golden.read_text()


@pytest.mark.parametrize("name", KNOWN)
def test_no_lock_brings_torch_or_triton_or_anything_of_nvidias(name: str) -> None:
    lock = Path(__file__).parents[2] / "docker" / "locks" / f"{KNOWN[name].lock}.txt"
    packages = [line.split("==")[0] for line in lock.read_text().splitlines() if "==" in line]
    assert "transformers" in packages and "bitsandbytes" in packages
    assert not [p for p in packages if p in ("torch", "triton") or p.startswith(("nvidia", "pytorch-triton"))]
    hashed = lock.read_text().count("--hash=sha256:")
    assert hashed >= len(packages)


def test_a_base_is_named_by_its_digest_once_one_is_known() -> None:
    digest = "sha256:" + "0" * 64
    platform = KNOWN["cpu"].model_copy(update={"digest": digest})
    assert f"FROM radeon-stack/stand-in:cpu@{digest}\n" in dockerfile(ImageSpec("train", "cpu", platform))


def test_the_context_holds_all_that_the_dockerfile_copies_and_no_caches(tmp_path: Path) -> None:
    write_context(spec("cpu"), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"Dockerfile", "requirements.txt", "radeon_stack"}
    assert (tmp_path / "radeon_stack/workloads/finetune/__main__.py").is_file()
    assert not list(tmp_path.rglob("__pycache__"))


def test_secrets_are_named_by_file_and_never_by_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "pip.conf"
    conf.write_text("[global]\nindex-url = https://user:hunter2@mirror.invalid/simple\n")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hunter2@proxy.invalid")
    command = build_command("docker", tmp_path, "t", BuildSettings(ca=tmp_path / "ca.pem", pip_conf=conf))
    assert f"id=pip,src={conf}" in command and f"id=ca,src={tmp_path / 'ca.pem'}" in command
    assert command[command.index("HTTPS_PROXY") - 1] == "--build-arg"
    assert "hunter2" not in " ".join(command)


def test_an_unknown_platform_is_answered_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"no platform 'rocm7.1.1-gfx1202'; did you mean 'rocm7.1.1-gfx1201'\?"):
        platform_name("gfx1202", "7.1.1", KNOWN)


def client(folder: Path, exit_code: int) -> Path:
    folder.mkdir()
    script = folder / "docker"
    script.write_text(f"#!/bin/sh\nexit {exit_code}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def test_a_client_without_buildx_is_passed_over_for_one_that_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer, older = client(tmp_path / "newer", 1), client(tmp_path / "older", 0)
    monkeypatch.setenv("PATH", f"{newer.parent}:{older.parent}:/usr/bin:/bin")
    assert building_client() == str(older)
    monkeypatch.setenv("PATH", str(newer.parent))
    with pytest.raises(MachineError, match="no BuildKit; install Docker"):
        building_client()


def test_a_failed_build_is_told_with_its_last_line() -> None:
    with pytest.raises(BuildError, match=r"exit 3\): the reason"):
        build(["sh", "-c", "echo step; echo the reason; exit 3"], lambda line: None)


def test_the_machines_own_private_ca_is_passed_on(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text("")
    assert default_ca({"SSL_CERT_FILE": str(bundle)}) == bundle
    assert default_ca({"SSL_CERT_FILE": "/nowhere"}) is None
