"""The verify stage's checks: each fails on an environment that is wrong in its own way."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from radeon_stack.catalog.platforms import load_platforms
from radeon_stack.images.render import description
from radeon_stack.images.spec import image_spec
from radeon_stack.workloads.probe import checks, numerics
from radeon_stack.workloads.probe.base import constraints, facts, guarded
from radeon_stack.workloads.probe.record import build_record

pytestmark = pytest.mark.work


def described(name: str = "cpu", **changes: Any) -> dict[str, Any]:
    told = description(image_spec("train", load_platforms()[name]), "k")
    return {**told, "base": facts(), "on_gpu": False, **changes}


def outcome(name: str, told: dict[str, Any]) -> checks.Outcome:
    check = next(check for check in checks.CHECKS if check.name == name)
    (found,) = [one for one in checks.run_checks(told, on_gpu=False) if one.name == check.name]
    return found


def only(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(checks, "CHECKS", tuple(check for check in checks.CHECKS if check.name == name))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path where distributions can be laid down."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def lay_down(site: Path, name: str, version: str, requires: str = "") -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
    (folder / "RECORD").write_text("")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is x86-64's")
@pytest.mark.parametrize(
    ("told", "state"), [(b"CPU : SSE3 = 1 | AVX2 = 1 | OPENMP = 1", "ok"), (b"CPU : OPENMP = 1 |", "failed")]
)
def test_a_llama_cpp_without_vector_instructions_is_found(
    told: bytes, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(llama_print_system_info=lambda: told))
    only(monkeypatch, "llama.cpp")
    found = outcome("llama.cpp", described(imports=["llama_cpp"]))
    assert found.state == state and told.decode().strip() in found.detail


def test_this_environment_passes_as_an_image_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("base", "torch", "nvidia", "triton", "linked", "bitsandbytes", "nf4", "nf4 gradient", "adamw8bit"):
        with monkeypatch.context() as patch:
            only(patch, name)
            found = outcome(name, described())
            assert found.state == "ok", found


@pytest.fixture
def linked(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Makes a package with an extension module that needs libNAME.so.1, which it leaves in the site's folder."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to link a library with")
    only(monkeypatch, "linked")
    monkeypatch.chdir(site)
    (site / "a.c").touch()
    before = set(sys.modules)

    def make(name: str, module: str, runpath: str) -> Path:
        package = site / name
        for folder in (package, (package / module).parent):
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        library = f"lib{name}.so.1"
        subprocess.run(["gcc", "-shared", "-o", library, f"-Wl,-soname,{library}", "a.c"], check=True)
        link = ["-Wl,--no-as-needed", f"-Wl,-rpath,{runpath}", "-o", str(package / module), "a.c", f"./{library}"]
        subprocess.run(["gcc", "-shared", *link], check=True)
        return package

    yield make
    for name in [name for name in sys.modules if name not in before and (site / name.partition(".")[0]).exists()]:
        del sys.modules[name]


@pytest.mark.parametrize("origin", ["$ORIGIN", "${ORIGIN}"])
def test_a_module_that_lacks_a_library_is_told_though_its_package_imports(
    site: Path, linked: Callable[..., Path], origin: str
) -> None:
    package = linked("halved", "_C.abi3.so", origin)
    found = outcome("linked", described(imports=["halved"]))
    assert found.detail == "halved/_C.abi3.so needs libhalved.so.1: not found"
    (site / "libhalved.so.1").rename(package / "libhalved.so.1")
    assert outcome("linked", described(imports=["halved"])).detail == "1 extension modules in 1 packages"


def test_a_module_deep_in_a_package_is_looked_at_too(site: Path, linked: Callable[..., Path]) -> None:
    package = linked("deep", "flash/_C.abi3.so", "$ORIGIN/../lib")
    found = outcome("linked", described(imports=["deep"]))
    assert found.detail == "deep/flash/_C.abi3.so needs libdeep.so.1: not found"
    (package / "lib").mkdir()
    (site / "libdeep.so.1").rename(package / "lib/libdeep.so.1")
    assert outcome("linked", described(imports=["deep"])).state == "ok"


def test_a_library_in_the_working_directory_is_not_one_that_is_found(linked: Callable[..., Path]) -> None:
    """An empty place in a run path: it would be found where the image was made, and nowhere else."""
    linked("empty", "_C.abi3.so", "/nowhere:")
    assert outcome("linked", described(imports=["empty"])).state == "failed"


def test_a_library_of_a_library_is_looked_for_as_well(site: Path, linked: Callable[..., Path]) -> None:
    package = linked("chained", "_C.abi3.so", "$ORIGIN")
    between = ["gcc", "-shared", "-Wl,--no-as-needed", "a.c", "./libchained.so.1", "-o", str(package / "libbetween.so")]
    subprocess.run(between, check=True)
    module = str(package / "_C.abi3.so")
    link = ["gcc", "-shared", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", "-L.", "a.c", "-o", module]
    subprocess.run([*link, f"-L{package}", "-lbetween", "-Wl,--allow-shlib-undefined"], check=True)
    (site / "libchained.so.1").unlink()
    found = outcome("linked", described(imports=["chained"]))
    assert found.detail.startswith("chained/_C.abi3.so needs ") and "chained.so.1" in found.detail


def test_what_a_package_loads_by_itself_is_not_missed(site: Path, linked: Callable[..., Path]) -> None:
    package = linked("loading", "_C.abi3.so", "/nowhere")
    (package / "lib").mkdir()
    (site / "libloading.so.1").rename(package / "lib/libloading.so.1")
    (package / "__init__.py").write_text(
        "import ctypes, pathlib\nctypes.CDLL(str(pathlib.Path(__file__).parent / 'lib/libloading.so.1'))\n"
    )
    assert outcome("linked", described(imports=["loading"])).detail == "1 extension modules in 1 packages"


def test_a_part_that_nobody_imported_may_load_what_lies_in_its_package(site: Path, linked: Callable[..., Path]) -> None:
    package = linked("parted", "part/_C.abi3.so", "/nowhere")
    assert outcome("linked", described(imports=["parted"])).state == "failed"
    (site / "libparted.so.1").rename(package / "libparted.so.1")
    found = outcome("linked", described(imports=["parted"]))
    assert found.state == "failed" and "told of none of 1 extension modules" in found.detail
    linked("sound", "_C.abi3.so", str(site))
    found = outcome("linked", described(imports=["parted", "sound"]))
    assert found.detail == "2 extension modules in 2 packages, 1 of which cannot be told from here"
    (package / "__init__.py").write_text("from . import part\n")  # now it was, and loaded nothing
    sys.modules.pop("parted")
    assert outcome("linked", described(imports=["parted"])).state == "failed"


def test_a_module_that_is_cut_short_or_asks_for_a_newer_library_is_found(
    site: Path, linked: Callable[..., Path]
) -> None:
    package = linked("newer", "_C.abi3.so", "$ORIGIN")
    shutil.copy(site / "libnewer.so.1", package)  # has no versions
    (site / "versions").write_text("NEWER_2 { global: wanted; };")
    (site / "a.c").write_text("void wanted(void) {}")
    made = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libnewer.so.1", "-Wl,--version-script=versions"]
    subprocess.run([*made, "-o", "libnewer.so.1", "a.c"], check=True)
    (site / "a.c").write_text("void wanted(void); void here(void) { wanted(); }")
    module = package / "_C.abi3.so"
    link = ["gcc", "-shared", "-fPIC", "-Wl,-rpath,$ORIGIN", "-o", str(module), "a.c", "./libnewer.so.1"]
    subprocess.run(link, check=True)
    (site / "a.c").write_text("void wanted(void) {}")
    older = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libnewer.so.1", "-Wl,--version-script=versions"]
    (site / "versions").write_text("NEWER_1 { global: wanted; };")
    subprocess.run([*older, "-o", str(package / "libnewer.so.1"), "a.c"], check=True)
    found = outcome("linked", described(imports=["newer"]))
    assert found.state == "failed" and "needs NEWER_2" in found.detail, found
    module.write_bytes(module.read_bytes()[:300])
    found = outcome("linked", described(imports=["newer"]))
    assert found.state == "failed" and "to be whole" in found.detail, found


def test_what_is_no_extension_module_or_lies_outside_is_not_looked_at(site: Path, linked: Callable[..., Path]) -> None:
    """bitsandbytes has a library for each release of ROCm and CUDA, and loads one."""
    package = linked("variants", "libvariants_rocm99.so", "/nowhere")
    outside = linked("outside", "_C.abi3.so", "/nowhere")
    (package / "folder").symlink_to(outside)
    (package / "_D.abi3.so").symlink_to(outside / "_C.abi3.so")
    assert outcome("linked", described(imports=["variants"])).detail == "0 extension modules in 1 packages"


def test_a_cpu_build_of_torch_is_no_hip_build(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "torch")
    found = outcome("torch", described("rocm7.1.1-gfx1201"))
    assert found.state == "failed" and "is no HIP build; ROCm 7.1.1 was asked for" in found.detail


def test_a_hip_build_for_another_release_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    only(monkeypatch, "torch")
    monkeypatch.setattr(torch.version, "hip", "7.2.26015")
    told = described("rocm7.1.1-gfx1201", torch="2.13.0")
    assert "built for HIP 7.2.26015, not for ROCm 7.1.1" in outcome("torch", told).detail
    monkeypatch.setattr(torch.version, "hip", "7.1.52802-26aae437f6")
    assert outcome("torch", told).state == "ok"


def test_a_torch_that_is_not_the_bases_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "base")
    base = facts()
    base["guarded"][0]["record"] = "another"
    assert "replaced after the base: torch" in outcome("base", described(base=base)).detail


def test_a_library_of_cuda_is_told(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "nvidia")
    lay_down(site, "nvidia-cublas", "1")
    assert outcome("nvidia", described()).detail == "CUDA packages: nvidia-cublas"


def test_no_triton_or_two_or_one_without_amd_are_told(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "triton")
    # An environment that has what is laid down and nothing else: a developer's has a triton of its own.
    monkeypatch.setattr(checks, "guarded", lambda: guarded(list(distributions(path=[str(site)]))))
    monkeypatch.setattr(checks, "find_spec", lambda name: (site / name.replace(".", "/")).is_dir() or None)
    told = described("rocm7.1.1-gfx1201")
    assert "0 distributions of triton" in outcome("triton", told).detail
    lay_down(site, "triton", "3.5.1")
    assert "has no backend for AMD" in outcome("triton", told).detail
    (site / "triton" / "backends" / "amd").mkdir(parents=True)
    assert outcome("triton", told).state == "ok"
    lay_down(site, "pytorch-triton-rocm", "3.5.1")
    assert "2 distributions of triton: pytorch-triton-rocm, triton" in outcome("triton", told).detail


def test_a_requirement_that_is_not_met_is_told_unless_the_base_did_not_meet_it_either(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "requirements")
    without = ["llm", "llama-cpp-python"]
    base = facts()
    lay_down(site, "ours", "1", "numpy<1")
    found = outcome("requirements", described(base=base, without=without))
    assert found.state == "failed" and "ours needs numpy<1, here is" in found.detail
    base["installed"]["ours"] = "1"  # the base brought it so: the numpy there was no better
    assert outcome("requirements", described(base=base, without=without)).state == "ok"
    base["installed"]["numpy"] = "0.9"  # … it was, and somebody replaced it
    assert outcome("requirements", described(base=base, without=without)).state == "failed"


def test_an_old_bitsandbytes_or_one_without_the_releases_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "bitsandbytes")
    assert outcome("bitsandbytes", described("rocm7.1.1-gfx1201")).detail.endswith("libbitsandbytes_rocm71.so")
    missing = outcome("bitsandbytes", described("rocm7.1.1-gfx1201", rocm_short="79"))
    assert "has no libbitsandbytes_rocm79.so; it has" in missing.detail
    monkeypatch.setattr(checks, "version", lambda name: "0.49.2")
    assert "older than 0.50" in outcome("bitsandbytes", described()).detail


def test_code_for_another_gfx_is_told_by_file(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "code objects")
    assert outcome("code objects", described("rocm7.1.1-gfx1201")).state == "ok"
    found = outcome("code objects", described("rocm7.1.1-gfx1201", gfx="gfx906"))
    assert "no code for gfx906 in bitsandbytes/libbitsandbytes_rocm71.so" in found.detail


def test_what_needs_a_gpu_is_recorded_as_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa")
    found = outcome("sdpa", described())
    assert found.state == "not run" and "image verify --on-gpu" in found.detail


def test_broken_4_bit_kernels_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that were wrong on warps of 32 were off by 0.73 sigma; ours must not pass for right."""
    import bitsandbytes.functional as functional
    import torch

    right = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *a, **k: torch.roll(right(*a, **k), 1, 0))
    with pytest.raises(Exception, match="is off by"):
        numerics.nf4_round_trip("cpu")


def test_the_base_is_written_down_by_a_file_that_needs_no_package(tmp_path: Path) -> None:
    from radeon_stack.workloads.probe import base

    subprocess.run(
        [sys.executable, "-S", "-E", str(base.__file__), str(tmp_path)], check=True, env={"PATH": os.environ["PATH"]}
    )
    assert json.loads((tmp_path / "base.json").read_text()).keys() == {"python", "guarded", "installed"}
    told = constraints(guarded())
    assert told.startswith("torch==2.13.0+cpu")


def test_the_record_holds_inputs_versions_and_digests_of_wheels(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("a==1\n")
    (tmp_path / "wheels.sha256").write_text(f"{'0' * 64}  /mnt/wheels/x/x-1-py3-none-any.whl\n")
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    gone = "Package: gone\nStatus: deinstall ok config-files\n"
    status.write_text(f"Package: libc6\nStatus: install ok installed\nVersion: 2.36\n\n{gone}")
    record = build_record(described(), tmp_path, tmp_path)
    assert record["image"]["key"] == "k" and record["wheels"] == {"x-1-py3-none-any.whl": "0" * 64}
    assert record["packages"]["debian"] == {"libc6": "2.36"} and record["packages"]["python"]["torch"] == "2.13.0+cpu"
