"""In real containers of docker and podman: exactly the chosen nodes, the caller's number and groups, and no right.

By the socket, by the command that is printed, and by each of the files that a run is exported as.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from radeon_stack.catalog.load import read, resolve
from radeon_stack.errors import MachineError
from radeon_stack.host.clients import building_client
from radeon_stack.host.engines import client, probe_engine
from radeon_stack.host.machine import User, probe
from radeon_stack.host.selection import select
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.images.resolve import Image
from radeon_stack.launch.choose import Choice
from radeon_stack.launch.circumstances import Circumstances
from radeon_stack.launch.docker import DockerEngine, run_command
from radeon_stack.launch.exports import compose, quadlet, shell
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.planner import plan
from tests.engine.conftest import missing
from tests.engine.debian import HERE, program
from tests.engine.podman import UID, Podman, service
from tests.engine.podman import missing as missing_for_podman
from tests.shapes import folder_of
from tests.stages import RENDER, STAGES, build, specification

pytestmark = [pytest.mark.engine]
CARDS = tuple((f"card{n + 1}", f"renderD{n + 128}") for n in range(3))
NODES = ("/dev/kfd", *(f"/dev/dri/{name}" for names in CARDS for name in names))
CDI = specification(*CARDS, numbers=False)
CALLER = 12345
LOOK = """
echo nodes $(ls -d /dev/kfd /dev/dri/* 2>/dev/null)
for node in /dev/kfd /dev/dri/*; do : <>$node && echo open $node; done
echo uid $(id -u) gid $(id -g)
echo groups $(id -G)
grep -E '^(Cap|NoNewPrivs)' /proc/self/status
touch /radeon-stack/models/model/new 2>/dev/null && echo model written
touch /new 2>/dev/null && echo root written
touch /radeon-stack/run/artifacts/made && echo artifact written
ls /sys/class/net
"""
ERASE = "\x1b[2K"  # compose writes it before each line, whatever it is told of ANSI
APPLETS = ("sh", "ls", "id", "grep", "touch", "echo")


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    """Device nodes of the right names, which are /dev/null's twins."""
    if os.getuid() or os.path.exists("/dev/kfd"):
        pytest.skip("needs root to make device nodes, and a machine that has none of these")
    made = Path("/dev/dri")
    there = made.is_dir()
    made.mkdir(exist_ok=True)
    for name in NODES:
        os.mknod(name, stat.S_IFCHR | 0o660, os.makedev(1, 3))
        os.chown(name, 0, RENDER)
        os.chmod(name, 0o660)
    yield
    for name in NODES:
        os.unlink(name)
    if not there:
        made.rmdir()


@dataclass(frozen=True)
class Place:
    """An engine's tiny image, the number of who calls it, what that is inside, and how commands are run there."""

    image: str
    caller: int
    inside: int
    podman: Podman | None = None

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        if self.podman:
            return self.podman.run(command)
        return subprocess.run(command, capture_output=True, text=True, check=False)


# Debian 12's podman, whose containers.conf has to ask for the caller's groups, and Debian 13's, whose has not.
PLACES = ("docker", "podman", "rootless podman", "podman 5", "rootless podman 5")


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, nodes: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    busybox = shutil.which("busybox")
    if busybox is None or subprocess.run(["ldd", busybox], capture_output=True, check=False).returncode == 0:
        missing("a static busybox (Debian: busybox-static)")
    assert busybox
    if request.param == "docker":
        yield Place(tiny(busybox), CALLER, CALLER)
        return
    newer, rootless = request.param.endswith("5"), request.param.startswith("rootless")
    root = request.getfixturevalue("trixie") if newer else HERE
    if lacking := missing_for_podman(root):
        missing(f"podman needs {', '.join(lacking)}")
    with ExitStack() as held:
        try:
            specified = CDI if newer else ""
            podman = held.enter_context(service(rootless=rootless, root=root, keep_groups=not newer, cdi=specified))
        except RuntimeError as error:
            missing(f"podman's service does not start here: {error}")
        monkeypatch.setenv("DOCKER_HOST", podman.host)
        found = probe_engine()
        assert found.product == "podman" and found.rootless is rootless and found.version.startswith("5") is newer
        yield Place(tiny(busybox), UID if rootless else CALLER, 0 if rootless else CALLER, podman)


def tiny(busybox: str) -> str:
    """An image of a busybox and nothing else; its id."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.add(os.path.realpath(busybox), "bin/busybox")
        for name in APPLETS:
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
    told = client().api.import_image_from_data(data.getvalue(), repository="localhost/tiny", tag="1")
    found = re.search(r"sha256:[0-9a-f]{64}", told)
    assert found, told
    return found[0]


@pytest.fixture
def planned(place: Place, tmp_path: Path) -> LaunchPlan:
    """The plan of a training run on the second of three cards, whose command looks around instead."""
    return plan_on(Sysroot(build(STAGES["three-r9700"], tmp_path / "tree")), place, tmp_path)


def plan_on(tree: Sysroot, place: Place, tmp_path: Path) -> LaunchPlan:
    model = tmp_path / "model"
    for folder in (model, tmp_path / "run" / "artifacts", tmp_path / "cache"):
        folder.mkdir(parents=True)
        os.chown(folder, place.caller, place.caller)
    folder_of(model, {}, {})
    for name in ("config.json", "events.jsonl"):
        (tmp_path / "run" / name).touch()
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    machine = replace(probe(tree), user=User(place.caller, place.caller, frozenset({place.caller, RENDER})))
    effective = resolve(
        read("train-llama"), None, ["resources.memory=1GiB"], {"--model": {"config": {"model": str(model)}}}
    )
    chosen = select(machine.gpus, "1", least=1, most=1)
    choice = Choice("docker", Image(place.image, "tiny", "it is there"), "asked for", probe_engine())
    here = Circumstances(machine, chosen, choice, sysroot=tree)
    made = plan(
        effective, here, run_id=f"look-{os.getpid()}-{place.caller}", run_dir=tmp_path / "run", cache=tmp_path / "cache"
    )
    return replace(made, command=("/bin/sh", "-c", LOOK))


def test_a_container_has_the_chosen_nodes_the_callers_number_and_no_right(planned: LaunchPlan, place: Place) -> None:
    engine = DockerEngine()
    handle = engine.start(planned)
    engine.logs(handle)
    assert engine.wait(handle) is not None
    held_to(Path(planned.run_dir, "log.txt").read_text(), place)
    assert Path(planned.run_dir, "artifacts", "made").stat().st_uid == place.caller


def test_the_printed_command_gives_the_same(planned: LaunchPlan, place: Place) -> None:
    held_to(said_by(place.run(run_command(planned))), place)


def test_an_exported_script_gives_the_same(planned: LaunchPlan, place: Place, tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(shell(planned))
    held_to(said_by(place.run(["bash", str(script)])), place)


@pytest.mark.parametrize("place", ["podman 5", "rootless podman 5"], indirect=True)
def test_a_card_by_its_cdi_name_comes_with_its_own_nodes_and_no_other(place: Place, tmp_path: Path) -> None:
    specified = replace(STAGES["three-r9700"], files={"/etc/cdi/amd.json": CDI})
    made = plan_on(Sysroot(build(specified, tmp_path / "tree")), place, tmp_path)
    assert made.devices == ("amd.com/gpu=1",)
    engine = DockerEngine()
    handle = engine.start(made)
    engine.logs(handle)
    engine.wait(handle)
    held_to(Path(made.run_dir, "log.txt").read_text(), place, "/dev/dri/card2", "/dev/dri/renderD129", "/dev/kfd")


@pytest.mark.parametrize("place", ["docker"], indirect=True)
def test_compose_itself_gives_the_same(planned: LaunchPlan, place: Place, trixie: Path, tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text(compose(planned))
    command = [
        *program(trixie, "usr/libexec/docker/cli-plugins/docker-compose"),
        "--ansi=never",
        "-f",
        str(tmp_path / "compose.yaml"),
    ]
    told = place.run([*command, "config", "--format", "json"])
    service_ = json.loads(told.stdout)["services"]["run"]
    assert service_["network_mode"] == "none" and service_["cap_drop"] == ["ALL"], told.stderr
    up = place.run([*command, "up", "--no-log-prefix", "--abort-on-container-exit"])
    place.run([*command, "down"])
    held_to(said_by(up).replace(ERASE, ""), place)


@pytest.mark.parametrize("place", ["podman 5", "rootless podman 5"], indirect=True)
def test_podmans_generator_makes_a_unit_of_a_quadlet_that_gives_the_same(
    planned: LaunchPlan, place: Place, trixie: Path, tmp_path: Path
) -> None:
    (tmp_path / "look.container").write_text(quadlet(planned))
    made = subprocess.run(
        [*program(trixie, "usr/libexec/podman/quadlet"), "-dryrun", "-user"],
        capture_output=True,
        text=True,
        check=False,
        env={"QUADLET_UNIT_DIRS": str(tmp_path), "PATH": "/usr/bin"},
    )
    assert made.returncode == 0, made.stderr
    start = next(line for line in made.stdout.splitlines() if line.startswith("ExecStart="))
    held_to(said_by(place.run(as_systemd_would(start.removeprefix("ExecStart=")))), place)


@pytest.mark.parametrize("place", ["podman 5"], indirect=True)
def test_podmans_socket_builds_no_image_and_it_is_said_what_does(place: Place) -> None:
    with pytest.raises(MachineError, match=r"no BuildKit; .*podman build"):
        building_client()


def as_systemd_would(start: str) -> list[str]:
    """The words of an ExecStart line, less what only a unit of systemd's can do (its cgroup, its readiness)."""
    quoted = re.findall(r'"(?:[^"\\]|\\.)*"|\S+', start.replace("%%", "%").replace("$$", "$"))
    words = [json.loads(word) if word.startswith('"') else word for word in quoted]
    return [word for word in words if not word.startswith(("--cgroups=", "--sdnotify=", "--cidfile=")) and word != "-d"]


def said_by(done: subprocess.CompletedProcess[str]) -> str:
    """What it printed; on stderr too when it failed, to be seen in the assertion."""
    return done.stdout + (done.stderr if done.returncode else "")


def held_to(said: str, place: Place, *nodes: str) -> None:
    nodes = nodes or ("/dev/dri/renderD129", "/dev/kfd")
    lines = said.splitlines()
    assert f"nodes {' '.join(nodes)}" in lines, said
    assert {line for line in lines if line.startswith("open")} == {f"open {node}" for node in nodes}, said
    assert f"uid {place.inside} gid {place.inside}" in lines
    groups = next(line for line in lines if line.startswith("groups")).split()[1:]
    # Rootless podman keeps groups that have no number inside: they show as the overflow number.
    assert set(groups) in ({str(place.inside), str(RENDER)}, {str(place.inside), "65534"}), said
    rights = dict(line.split(":\t") for line in lines if line.startswith(("Cap", "NoNewPrivs")))
    assert rights.pop("NoNewPrivs") == "1"
    assert set(rights.values()) == {"0000000000000000"}, said
    assert "model written" not in lines and "root written" not in lines and "artifact written" in lines
    assert "lo" in lines and "eth0" not in lines
