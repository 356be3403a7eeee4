"""Which gfx a binary has code for: bundles of every version, real libraries, and input that lies."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import struct
import subprocess
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radeon_stack.codeobjects.bundles import PLAIN_MAGIC, bundles
from radeon_stack.codeobjects.filenames import kernel_file
from radeon_stack.codeobjects.isa import GENERIC, covers, target_name
from radeon_stack.codeobjects.report import audit
from radeon_stack.codeobjects.sources import entries, tar
from radeon_stack.codeobjects.trim import removals
from radeon_stack.errors import UsageError
from tests.conftest import Cli

NAMES = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1200", "gfx1201", "gfx12-generic")
TARGETS = st.dictionaries(st.sampled_from(NAMES), st.binary(max_size=60), max_size=5)
FORMS = ("plain", "zlib-1", "zstd-1", "zlib-2", "zstd-2", "zlib-3", "zstd-3")
QUICK_SECONDS = 5


def plain(code: dict[str, bytes]) -> bytes:
    """A bundle as clang lays it out: host entry, one entry a target, then the code."""
    ids = ["host-x86_64-unknown-linux-gnu-", *(f"hipv4-amdgcn-amd-amdhsa--{name}" for name in code)]
    blobs = [b"", *code.values()]
    table = len(PLAIN_MAGIC) + 8 + sum(24 + len(identity) for identity in ids)
    head, body, place = PLAIN_MAGIC + struct.pack("<Q", len(ids)), b"", table
    for identity, blob in zip(ids, blobs, strict=True):
        head += struct.pack("<QQQ", place, len(blob), len(identity)) + identity.encode()
        body += blob
        place += len(blob)
    return head + body


def packed(code: dict[str, bytes], form: str) -> bytes:
    if form == "plain":
        return plain(code)
    method, version = form.split("-")
    raw = plain(code)
    inner = zlib.compress(raw) if method == "zlib" else zstandard.ZstdCompressor().compress(raw)
    number = 0 if method == "zlib" else 1
    head = b"CCOB" + struct.pack("<HH", int(version), number)
    if version == "1":
        return head + struct.pack("<IQ", len(raw), 7) + inner
    size = "I" if version == "2" else "Q"
    total = 24 if version == "2" else 32
    return head + struct.pack(f"<{size}{size}Q", total + len(inner), len(raw), 7) + inner


def elf(fatbin: bytes, *, machine: int = 62, flags: int = 0, section: bytes = b".hip_fatbin") -> bytes:
    """A small but whole ELF file with one section of ours."""
    names = b"\0" + section + b"\0.shstrtab\0"
    body = 64
    table = body + len(fatbin) + len(names)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 0, table, flags, 64, 56, 0, 64, 3, 2)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 2, 0, body, len(fatbin), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 2 + len(section), 3, 0, 0, body + len(fatbin), len(names), 0, 0, 1, 0)
    return header + fatbin + names + sections


def looked(path: Path, arch: str | None = None):  # type: ignore[no-untyped-def]
    return audit(entries(path), arch)


@given(TARGETS, st.sampled_from(FORMS))
def test_every_form_of_bundle_gives_back_what_was_put_in(code: dict[str, bytes], form: str) -> None:
    (found,) = bundles(memoryview(packed(code, form)))
    assert dict(found.targets) == {name: len(blob) for name, blob in code.items()}


@given(st.lists(st.tuples(TARGETS, st.sampled_from(FORMS)), min_size=1, max_size=4))
def test_bundles_one_after_another_are_all_found(parts: list[tuple[dict[str, bytes], str]]) -> None:
    """Linkers align each to a page."""
    section = b""
    for code, form in parts:
        section += packed(code, form)
        section += bytes(-len(section) % 4096)
    found = list(bundles(memoryview(section)))
    assert [dict(b.targets) for b in found] == [{n: len(c) for n, c in code.items()} for code, _ in parts]


@settings(max_examples=300)
@given(TARGETS, st.sampled_from(FORMS), st.data())
def test_a_damaged_bundle_gives_a_result_or_an_error_and_never_hangs(
    code: dict[str, bytes], form: str, data: st.DataObject
) -> None:
    whole = bytearray(packed(code, form))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    started = time.monotonic()
    with contextlib.suppress(UsageError):
        list(bundles(memoryview(cut)))
    assert time.monotonic() - started < QUICK_SECONDS


def test_a_library_whose_bundle_is_refused_is_let_go(tmp_path: Path) -> None:
    """A view of it that was left in the error kept the mapped file from being closed."""
    whole = bytearray(elf(packed({"gfx942": b"12"}, "zstd-2")))
    whole[whole.index(b"CCOB") + 6] = 9
    path = tmp_path / "lib.so"
    path.write_bytes(whole)
    with pytest.raises(UsageError, match="compressed by method 9"):
        looked(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TARGETS, st.data())
def test_a_damaged_library_gives_a_result_or_an_error(
    tmp_path: Path, code: dict[str, bytes], data: st.DataObject
) -> None:
    whole = bytearray(elf(packed(code, "zstd-2")))
    for _ in range(data.draw(st.integers(0, 6))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "lib.so"
    path.write_bytes(whole[: data.draw(st.integers(4, len(whole)))])
    started = time.monotonic()
    try:
        looked(path)
    except UsageError as error:
        assert "lib.so" in str(error)
    assert time.monotonic() - started < QUICK_SECONDS


def test_a_library_tells_its_targets_and_the_one_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(elf(packed({"gfx942": b"12", "gfx1200": b"123"}, "zstd-3")))
    found = looked(path, "gfx1201")
    assert found.files[0].targets == (("gfx1200", 3), ("gfx942", 2)) and found.missing == ("lib.so",)
    path.write_bytes(elf(packed({"gfx12-generic": b"1"}, "plain")))
    assert looked(path, "gfx1201").missing == ()


def test_a_bare_code_object_tells_its_target_by_its_flags(tmp_path: Path) -> None:
    path = tmp_path / "kernel.bin"
    path.write_bytes(elf(b"x", machine=224, flags=0x54E))
    assert looked(path).files[0].targets == (("gfx1201", path.stat().st_size),)


def test_a_library_that_registers_code_it_does_not_have_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(elf(b"x" * 24, section=b".hipFatBinSegment"))
    with pytest.raises(UsageError, match="registers code for GPUs"):
        looked(path)


def test_a_bundle_that_unpacks_to_gigabytes_costs_nothing(tmp_path: Path) -> None:
    """Its sizes are claims; only its table of entries is ever unpacked."""
    bomb = zstandard.ZstdCompressor(level=19).compress(plain({"gfx1201": bytes(1 << 28)}))
    data = b"CCOB" + struct.pack("<HHIIQ", 2, 1, 24 + len(bomb), (1 << 28) + 200, 0) + bomb
    started = time.monotonic()
    (found,) = bundles(memoryview(data))
    assert dict(found.targets) == {"gfx1201": 1 << 28} and time.monotonic() - started < 1
    zeros = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    data = b"CCOB" + struct.pack("<HHIIQ", 2, 1, 24 + len(zeros), 1 << 28, 0) + zeros
    with pytest.raises(UsageError, match="no offload bundle"):
        list(bundles(memoryview(data)))


@pytest.mark.parametrize(
    ("arch", "target", "runs"),
    [
        ("gfx1201", "gfx1201", True),
        ("gfx1201", "gfx1200", False),
        ("gfx1201", "gfx12-generic", True),
        ("gfx1100", "gfx12-generic", False),
        ("gfx90a", "gfx9-generic", False),
        ("gfx942", "gfx9-4-generic", True),
    ],
)
def test_code_runs_on_its_own_target_or_through_a_generic_one(arch: str, target: str, runs: bool) -> None:
    assert covers(target, arch) is runs


def test_target_ids_are_read_with_their_features_and_hosts_are_none() -> None:
    assert target_name("hipv4-amdgcn-amd-amdhsa--gfx90a:sramecc+:xnack-") == "gfx90a"
    assert target_name("hip-amdgcn-amd-amdhsa-unknown-gfx1201") == "gfx1201"
    assert target_name("hipv4-amdgcn-amd-amdhsa--gfx12-generic") == "gfx12-generic"
    assert target_name("host-x86_64-unknown-linux-gnu-") is None


@pytest.mark.parametrize(
    ("path", "library", "targets"),
    [
        (
            "rocblas/library/TensileLibrary_Type_HH_Contraction_l_Ailk_Bljk_Cijk_Dijk_gfx1101.dat",
            "rocblas",
            {"gfx1101"},
        ),
        ("rocblas/library/TensileLibrary_Type_ZZ_fallback_gfx90a-xnack+.hsaco", "rocblas", {"gfx90a"}),
        ("rocblas/library/Kernels.so-000-gfx1030.hsaco", "rocblas", {"gfx1030"}),
        ("lib/hipblaslt/library/TensileLibrary_lazy_gfx1201.dat", "hipblaslt", {"gfx1201"}),
        ("lib/hipblaslt/library/gfx942/extop_gfx942.co", "hipblaslt", {"gfx942"}),
        ("share/miopen/db/gfx90a6e.kdb", "miopen", {"gfx90a"}),
        ("share/miopen/db/gfx942130.HIP.fdb.txt", "miopen", {"gfx942"}),
        ("share/miopen/db/gfx906_60.db.txt", "miopen", {"gfx906"}),
        ("torch/lib/aotriton.images/amd-gfx942/flash/attn_fwd.aks2", "aotriton", {"gfx942"}),
        ("torch/lib/aotriton.images/amd-gfx120x/flash/attn_fwd.aks2", "aotriton", {"gfx1200", "gfx1201"}),
        ("x/kernel_gfx12-generic.co", "other", {"gfx12-generic"}),
    ],
)
def test_kernel_files_tell_by_their_names(path: str, library: str, targets: set[str]) -> None:
    found = kernel_file(path)
    assert found is not None and found.library == library and set(found.targets) == targets


@pytest.mark.parametrize(
    "path",
    ["rocblas/library/TensileManifest.txt", "include/gfx1201.h", "TensileLibrary_fallback.dat", "readme_gfx9.txt"],
)
def test_other_files_tell_nothing(path: str) -> None:
    assert kernel_file(path) is None


def test_a_family_of_aotriton_covers_its_cards() -> None:
    found = kernel_file("lib/aotriton.images/amd-gfx11xx/flash/bwd.aks2")
    assert found is not None and {"gfx1100", "gfx1101", "gfx1102", "gfx1151"} <= set(found.targets)
    assert not {"gfx1200", "gfx90a"} & set(found.targets)


TREE = [
    ("rocblas/library/TensileLibrary_A_gfx942.co", 100),
    ("rocblas/library/TensileLibrary_A_gfx1201.co", 40),
    ("rocblas/library/TensileLibrary_A_fallback.dat", 5),
    ("rocblas/library/Kernels_gfx12-generic.co", 7),
    ("rocblas/library/Kernels_gfx9-generic.co", 8),
    ("hipblaslt/library/gfx942/extop_gfx942.co", 300),
    ("hipblaslt/library/gfx1201/extop_gfx1201.co", 30),
    ("lib/aotriton.images/amd-gfx11xx/flash/bwd.aks2", 900),
    ("lib/aotriton.images/amd-gfx120x/flash/bwd.aks2", 90),
    ("share/miopen/db/gfx90a6e.kdb", 1000),
    ("site-packages/bitsandbytes/libbitsandbytes_rocm71.so", 50),
    ("site-packages/bitsandbytes/libbitsandbytes_rocm72.so", 51),
    ("site-packages/bitsandbytes/libbitsandbytes_cuda130.so", 52),
    ("site-packages/bitsandbytes/libbitsandbytes_cpu.so", 53),
    ("include/gfx942.h", 1),
]


def test_a_trim_takes_other_archs_and_leaves_generic_ones_and_libraries_it_would_empty() -> None:
    gone = {one.path for one in removals(TREE, "gfx1201", "71")}
    assert gone == {
        "rocblas/library/TensileLibrary_A_gfx942.co",
        "hipblaslt/library/gfx942/extop_gfx942.co",
        "lib/aotriton.images/amd-gfx11xx/flash/bwd.aks2",
        "site-packages/bitsandbytes/libbitsandbytes_rocm72.so",
        "site-packages/bitsandbytes/libbitsandbytes_cuda130.so",
    }


@given(st.lists(st.sampled_from(TREE), unique=True), st.sampled_from(["gfx1100", "gfx1201", "gfx942"]))
def test_a_trim_never_takes_what_the_gfx_or_a_generic_target_needs(tree: list[tuple[str, int]], gfx: str) -> None:
    for one in removals(tree, gfx, "71"):
        kernel = kernel_file(one.path)
        if kernel is not None:
            assert not any(covers(target, gfx) or target in GENERIC for target in kernel.targets)


def test_a_set_of_kernel_files_is_missing_an_arch_only_when_none_of_it_has_it(tmp_path: Path) -> None:
    for path, _ in TREE[:7]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"kernel")
    found = looked(tmp_path, "gfx1201")
    assert found.missing == ()
    verdicts = {file.path: found.verdict(file) for file in found.files}
    assert verdicts["rocblas/library/TensileLibrary_A_gfx942.co"] == "other"
    assert [name.split()[0] for name in looked(tmp_path, "gfx1100").missing] == ["hipblaslt", "rocblas"]


class TestHostileArchives:
    """Each is an error that names the member; nothing is written anywhere."""

    @pytest.fixture(autouse=True)
    def empty_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "empty"
        folder.mkdir()
        monkeypatch.chdir(folder)
        return folder

    def wheel(self, tmp_path: Path, name: str = "lib.so", data: bytes = b"x", mode: int = 0o644) -> Path:
        path = tmp_path / "bad.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
        return path

    @pytest.mark.parametrize("name", ["../../evil.so", "/etc/evil.so", "a/../../b.so", "C:/evil.so", "..\\evil.so"])
    def test_a_member_elsewhere(self, tmp_path: Path, empty_folder: Path, name: str) -> None:
        with pytest.raises(UsageError, match="written elsewhere"):
            looked(self.wheel(tmp_path, name))
        assert not list(empty_folder.iterdir()) and not (tmp_path.parent / "evil.so").exists()

    def test_a_link(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="a link"):
            looked(self.wheel(tmp_path, data=b"/etc/passwd", mode=0o120777))

    def test_a_bomb(self, tmp_path: Path) -> None:
        """200 MiB of zeros in 200 KiB, refused before it is unpacked."""
        started = time.monotonic()
        path = self.wheel(tmp_path, data=b"\x7fELF" + bytes(200 << 20))
        made = time.monotonic()
        with pytest.raises(UsageError, match="unpacks to far more"):
            looked(path)
        assert time.monotonic() - made < 1 and made > started

    def test_two_of_a_name(self, tmp_path: Path) -> None:
        path = self.wheel(tmp_path)
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning):
            archive.writestr("lib.so", b"y")
        with pytest.raises(UsageError, match="two members"):
            looked(path)

    def test_a_size_that_lies(self, tmp_path: Path) -> None:
        path = self.wheel(tmp_path, data=b"\x7fELF" + bytes(range(200)))
        raw = bytearray(path.read_bytes())
        place = raw.rfind(b"PK\x01\x02")
        raw[place + 24 : place + 28] = struct.pack("<I", 10**6)
        path.write_bytes(raw)
        with pytest.raises(UsageError, match=r"bad\.whl"):
            looked(path)

    @settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_damage(self, tmp_path: Path, data: st.DataObject) -> None:
        path = self.wheel(tmp_path, data=elf(packed({"gfx1201": b"123"}, "zlib-2")))
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 5))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw[: data.draw(st.integers(1, len(raw)))])
        with contextlib.suppress(UsageError):
            looked(path)

    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_a_damaged_file_system(self, data: st.DataObject) -> None:
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w") as archive:
            for name in ("opt/lib.so", "../x.so"):
                body = elf(packed({"gfx1201": b"123"}, "plain"))
                info = tarfile.TarInfo(name)
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
            link = tarfile.TarInfo("etc/link")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
        whole = raw.getvalue()
        assert [file.path for file in audit(tar(io.BytesIO(whole), "t")).files] == ["opt/lib.so", "../x.so"]
        with contextlib.suppress(UsageError):
            audit(tar(io.BytesIO(whole[: data.draw(st.integers(1, len(whole)))]), "t"))


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="this Python lacks bitsandbytes: make setup"
)
def test_the_libraries_of_bitsandbytes_hold_what_its_release_says() -> None:
    spec = importlib.util.find_spec("bitsandbytes")
    assert spec is not None and spec.origin is not None
    libraries = sorted(Path(spec.origin).parent.glob("libbitsandbytes_rocm*.so"))
    counted = {}
    for path in libraries:
        (file,) = looked(path).files
        assert file.has("gfx1200") and file.has("gfx1201"), path
        counted[path.stem.removeprefix("libbitsandbytes_rocm")] = len(file.targets)
    assert counted == {"64": 14, "70": 15, "71": 15, "72": 15, "714": 25, "715": 25}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to link a library with")
def test_a_library_that_a_linker_made(tmp_path: Path) -> None:
    (tmp_path / "fatbin").write_bytes(packed({"gfx1201": b"1234", "gfx942": b"12"}, "zstd-2"))
    (tmp_path / "a.s").write_text('.section .hip_fatbin,"a"\n.p2align 12\n.incbin "fatbin"\n')
    subprocess.run(["gcc", "-shared", "-o", "lib.so", "a.s"], cwd=tmp_path, check=True)
    assert looked(tmp_path / "lib.so", "gfx1201").totals == {"gfx1201": 4, "gfx942": 2}


def test_the_command_ends_with_7_when_the_target_is_missing_and_with_2_for_a_damaged_file(
    cli: Cli, tmp_path: Path
) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(elf(packed({"gfx942": b"12"}, "plain")))
    assert cli("image", "audit", path).code == 0
    result = cli("image", "audit", path, "--arch", "gfx1201", "--json")
    assert result.code == 7 and result.json["missing"] == ["lib.so"]
    assert f"{path}: no code for gfx1201: lib.so" in result.error
    path.write_bytes(path.read_bytes()[:100])
    assert cli("image", "audit", path).code == 2
    sizes = cli("image", "size", tmp_path, "--budget", "50B")
    assert sizes.code == 7 and "100B is above the budget of 50B" in sizes.error
    assert os.listdir(tmp_path) == ["lib.so"]
