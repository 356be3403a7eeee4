"""Releases × gfx: what is supported, in what order, with what environment; what is not is answered with what is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from radeon_stack.catalog.kinds import find_kind, load_kinds
from radeon_stack.catalog.platforms import load_platforms
from radeon_stack.catalog.wheels import load_wheels
from radeon_stack.errors import UsageError
from tests.conftest import ROOT

KNOWN = load_platforms()
DOCKER = ROOT / "docker"


def changed(tmp_path: Path, file: str, old: str, new: str) -> Path:
    """The docker folder with one change."""
    folder = tmp_path / "docker"
    shutil.copytree(DOCKER, folder)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    return folder


def test_releases_stand_in_their_own_order_and_not_in_that_of_their_numbers() -> None:
    releases = list(dict.fromkeys(platform.rocm for platform in KNOWN.values() if platform.rocm))
    assert releases == ["6.4.4", "7.0.2", "7.1.1", "7.2.4", "7.14"]


def test_every_gfx_that_was_asked_for_is_there_in_some_release_and_the_cpu_too() -> None:
    found = {platform.gfx for platform in KNOWN.values()}
    cards = {"gfx1100", "gfx1101", "gfx1102", "gfx1151", "gfx1200", "gfx1201", "gfx90a", "gfx942", "gfx950"}
    assert found == {None, *cards}


def test_no_release_has_a_gfx_before_it_was_made_for_it() -> None:
    assert "rocm6.4.4-gfx950" not in KNOWN and "rocm7.0.2-gfx950" in KNOWN
    assert "rocm6.4.4-gfx1151" not in KNOWN and not KNOWN["rocm7.1.1-gfx1151"].official


def test_an_unsupported_pair_is_answered_with_the_pairs_there_are() -> None:
    with pytest.raises(UsageError, match=r"ROCm 6.4.4 has no code for gfx950; gfx950: 7.0.2, 7.1.1, 7.2.4, 7.14"):
        KNOWN.find("gfx950", "6.4.4")
    with pytest.raises(UsageError, match=r"no ROCm release '7\.1\.2'; did you mean '7\.1\.1'"):
        KNOWN.find("gfx1201", "7.1.2")
    with pytest.raises(UsageError, match=r"no platform for 'gfx1202'; there are cpu; gfx1100: 6.4.4, 7.0.2"):
        KNOWN.find("gfx1202")
    with pytest.raises(UsageError, match="cpu has no ROCm release"):
        KNOWN.find("cpu", "7.1.1")


def test_without_a_release_the_default_is_taken() -> None:
    assert KNOWN.find("gfx1201").name == "rocm7.1.1-gfx1201"


def test_no_digest_is_invented() -> None:
    assert {platform.digest for platform in KNOWN.values()} == {None}


def test_a_kind_of_image_starts_from_a_base_of_its_own_where_a_release_names_one() -> None:
    mine = KNOWN["rocm7.14-gfx1201"]
    verify = mine.of_kind("verify")
    assert verify.base.startswith("rocm/vllm:") and verify.brings == {"vllm": "0.23.0"}
    assert (verify.python, verify.torch, verify.home) == ("3.14", "2.11.0", "/opt/python")
    assert (verify.name, verify.rocm, verify.gfx) == (mine.name, mine.rocm, mine.gfx)
    assert mine.of_kind("train") == mine and mine.base.startswith("rocm/pytorch:")
    instinct = KNOWN["rocm7.14-gfx942"]
    assert instinct.of_kind("verify") == instinct, "AMD has another image for these, with other kernels"


def test_every_kind_that_has_a_base_of_its_own_is_one_there_is() -> None:
    assert {kind for platform in KNOWN.values() for kind in platform.kinds} <= load_kinds().keys()


def test_a_gfx_that_the_default_release_crashes_gets_another() -> None:
    assert KNOWN.find("gfx1201").rocm == KNOWN.default
    assert KNOWN.find("gfx1151").rocm == "7.2.4" and KNOWN.find("gfx1151", "7.1.1").rocm == "7.1.1"


def test_the_allocators_variable_has_the_name_that_this_torch_reads() -> None:
    assert KNOWN["rocm7.1.1-gfx1201"].allocator == "PYTORCH_HIP_ALLOC_CONF"  # torch 2.9.1
    assert KNOWN["rocm7.2.4-gfx1201"].allocator == "PYTORCH_ALLOC_CONF"  # torch 2.10.0
    assert KNOWN["cpu"].allocator == ""


def test_bitsandbytes_names_its_libraries_by_the_release_in_short() -> None:
    assert KNOWN["rocm7.14-gfx1201"].rocm_short == "714" and KNOWN["rocm7.1.1-gfx1201"].rocm_short == "71"


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("platforms.toml", 'python = "3.12"', 'pyhton = "3.12"', "did you mean 'python'"),
        ("platforms.toml", '"gfx1201"', '"gfx12o1"', "release.0.gfx.3"),
        (
            "platforms.toml",
            'default = "7.1.1"',
            'default = "7.1.2"',
            "default: no release '7.1.2'; did you mean '7.1.1'",
        ),
        ("platforms.toml", 'gfx1151 = "7.2.4"', 'gfx1151 = "7.2.5"', "default_for.gfx1151: no release '7.2.5'"),
        ("platforms.toml", "[cpu]", "[cpu", "cannot be read"),
        ("platforms.toml", 'brings = { vllm = "0.23.0" }', "brings = {}", "kinds.verify.brings"),
        ("platforms.toml", '"gfx1201"]\nbrings', '"gfx90a"]\nbrings', "kinds.verify.gfx to be of the release's own"),
        ("locks/sources.toml", "[digests]", '[digests]\n"a:b" = "sha256:12"', "digests.a:b"),
        ("kinds.toml", "summary =", "sumary =", "did you mean 'summary'"),
        ("wheels/flash-attn/wheel.toml", 'default.rdna = "triton"', 'default.rdna = "trition"', "default.rdna"),
        ("wheels/flash-attn/wheel.toml", 'index = "flash-attn"', 'index = "flash-attn; rm"', "variants.triton.index"),
    ],
)
def test_a_bad_file_is_told_by_file_and_key(tmp_path: Path, file: str, old: str, new: str, told: str) -> None:
    folder = changed(tmp_path, file, old, new)
    with pytest.raises(UsageError) as caught:
        load_platforms(folder)
        load_kinds(folder)
        load_wheels(folder)
    assert told in str(caught.value) and Path(file).name in str(caught.value)


def test_every_wheel_that_a_kind_names_has_its_folder() -> None:
    wheels = load_wheels()
    for kind in load_kinds().values():
        assert {*kind.wheels.cpu, *kind.wheels.rocm} <= wheels.keys()
    with pytest.raises(UsageError, match="no kind of image 'trian'; did you mean 'train'"):
        find_kind("trian")
