"""In real containers: a port is there at this machine's own address and no other, and the key for who calls alone."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from radeon_stack.catalog.load import read, resolve
from radeon_stack.contracts.serve import KEY_FILE
from radeon_stack.host.engines import client, probe_engine
from radeon_stack.host.machine import User, probe
from radeon_stack.host.selection import Selection
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.images.resolve import Image
from radeon_stack.launch.choose import Choice
from radeon_stack.launch.circumstances import Circumstances
from radeon_stack.launch.docker import DockerEngine, container_name, run_command
from radeon_stack.launch.endpoint import with_port
from radeon_stack.launch.launcher import Draft, write_records
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.planner import ANY_ADDRESS, plan
from radeon_stack.runs.store import Run, RunStore
from tests.conftest import wait_for
from tests.engine.conftest import missing
from tests.engine.test_access import CALLER, tiny

pytestmark = [pytest.mark.engine]
# In the server's place: what it can read of the key, and a page for whoever reaches it.
SERVE = """
/bin/busybox cat /radeon-stack/run/api-key
echo; echo listen $0
echo hello >/tmp/index.html
exec /bin/busybox httpd -f -p "$0" -h /tmp
"""


@pytest.fixture
def planned(home: Path, tmp_path: Path) -> LaunchPlan:
    """The plan of a run of serve, its records written, called by somebody who is not root."""
    busybox = shutil.which("busybox")
    if busybox is None or subprocess.run(["ldd", busybox], capture_output=True, check=False).returncode == 0:
        missing("a static busybox (Debian: busybox-static)")
    if os.geteuid() != 0:
        missing("to give files to somebody else needs root")
    (tmp_path / "source").mkdir()
    for folder in (tmp_path, home, *tmp_path.parents, *home.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    assert busybox
    sets = ["port=0", "resources.memory=1GiB", f'source="{tmp_path / "source"}"']
    effective = with_port(resolve(read("serve"), "demo", sets), live=True)
    machine = replace(probe(Sysroot()), user=User(CALLER, CALLER, frozenset({CALLER})))
    choice = Choice("docker", Image(tiny(busybox), "tiny", "it is there"), "asked for", probe_engine())
    here = Circumstances(machine, Selection((), "the recipe takes no GPU"), choice)
    run = RunStore(home).new("serve")
    made = plan(effective, here, run_id=run.id, run_dir=run.path, cache=tmp_path)
    listen = f"{made.command[-1]}:{made.ports[0].container}"
    made = replace(made, command=("/bin/sh", "-c", SERVE, listen))
    write_records(Draft(effective, made, run), RunStore(home))
    for path in (run.path, *run.path.rglob("*")):
        os.chown(path, CALLER, CALLER)
    return made


def reached(address: str, port: int) -> bool:
    connection = http.client.HTTPConnection(address, port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read() == b"hello\n"
    except OSError:
        return False
    finally:
        connection.close()


def others() -> list[str]:
    """This machine's other addresses."""
    told = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
    return [address for address in told if ":" not in address and not address.startswith("127.")]


def held_to(planned: LaunchPlan) -> None:
    port = planned.ports[0].host
    wait_for(lambda: reached("127.0.0.1", port), seconds=30, what="the server in the container")
    assert not [address for address in others() if reached(address, port)]
    with socket.socket() as free, pytest.raises(OSError, match="in use"):
        free.bind(("127.0.0.1", port))


def test_a_port_is_published_at_one_address_and_the_caller_alone_reads_the_key(planned: LaunchPlan) -> None:
    engine, run = DockerEngine(), Run(Path(planned.run_dir))
    handle = engine.start(planned)
    try:
        held_to(planned)
        told = client().api.inspect_container(container_name(planned))
        assert (run.path / KEY_FILE).read_text() not in str(told)
    finally:
        engine.stop(handle, force=True)
        engine.logs(handle)
        engine.wait(handle)
    lines = run.log.read_text().splitlines()
    assert lines == [(run.path / KEY_FILE).read_text(), f"listen {ANY_ADDRESS}:{planned.ports[0].container}"]
    assert not reached("127.0.0.1", planned.ports[0].host)


def test_the_printed_command_publishes_the_same(planned: LaunchPlan) -> None:
    with subprocess.Popen(run_command(planned), stdout=subprocess.DEVNULL) as running:
        try:
            held_to(planned)
        finally:
            client().containers.get(container_name(planned)).kill()
            running.wait(30)
