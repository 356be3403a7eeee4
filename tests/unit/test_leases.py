"""Two runs do not share a card; who dies gives it back; who lives on without a keeper keeps it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from radeon_stack.errors import MachineError
from radeon_stack.host.machine import probe
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.launch.leases import busy, lease_folder, lease_name, leased
from radeon_stack.launch.plan import LaunchPlan
from tests.stages import STAGES, build
from tests.unit.test_launch import demo_plan

CARD = "0000:05:00.0"
HOLD = """
import sys, time
from pathlib import Path
from unittest.mock import Mock
from radeon_stack.launch.leases import leased
plan = Mock(shared=False, gpus=(sys.argv[2],), run_id="other", run_dir=sys.argv[3])
with leased(plan, Path(sys.argv[1]), lambda folder: False):
    print("held", flush=True)
    time.sleep(600)
"""


def nobody(folder: Path) -> bool:
    return False


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    return replace(demo_plan(tmp_path), gpus=(CARD,))


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that has the card."""
    words = [sys.executable, "-c", HOLD, str(tmp_path), CARD, str(tmp_path / "other-run")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_card_that_another_process_has_is_refused_by_the_name_of_its_run(
    plan: LaunchPlan, other: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(MachineError, match=rf"GPU {CARD} is in use by other.*--share"), leased(plan, tmp_path, nobody):
        pass
    machine = probe(Sysroot(build(STAGES["three-r9700"], tmp_path / "tree")))
    assert busy(machine.gpus, tmp_path, nobody) == {0: "other"}
    with leased(replace(plan, shared=True), tmp_path, nobody):
        pass
    other.kill()
    other.wait()


def test_who_only_asks_for_the_owner_keeps_nobody_from_the_card(plan: LaunchPlan, tmp_path: Path) -> None:
    place = tmp_path / f"radeon-stack-{CARD}.lock"
    with place.open("w") as asking:
        fcntl.flock(asking, fcntl.LOCK_EX)
        threading.Timer(0.3, lambda: fcntl.flock(asking, fcntl.LOCK_UN)).start()
        with leased(plan, tmp_path, nobody):
            pass


def test_a_card_is_free_again_when_its_owner_was_killed(
    plan: LaunchPlan, other: subprocess.Popen[str], tmp_path: Path
) -> None:
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with leased(plan, tmp_path, nobody):
        pass


def test_a_workload_that_outlives_its_keeper_keeps_the_card(
    plan: LaunchPlan, other: subprocess.Popen[str], tmp_path: Path
) -> None:
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    asked: list[Path] = []

    def going_on(folder: Path) -> bool:
        asked.append(folder)
        return True

    with pytest.raises(MachineError, match="in use by other"), leased(plan, tmp_path, going_on):
        pass
    assert asked == [tmp_path / "other-run"]


def test_a_lock_file_of_nonsense_or_a_link_is_not_believed(plan: LaunchPlan, tmp_path: Path) -> None:
    place = tmp_path / f"radeon-stack-{CARD}.lock"
    place.write_text('{"run": 1')
    with leased(plan, tmp_path, lambda folder: True):
        assert plan.run_id in place.read_text()
    place.unlink()
    precious = tmp_path / "precious"
    precious.write_text("kept")
    place.symlink_to(precious)
    with pytest.raises(MachineError, match="cannot lock"), leased(plan, tmp_path, nobody):
        pass
    assert precious.read_text() == "kept"


def test_partitions_of_one_card_are_leased_one_by_one(tmp_path: Path) -> None:
    machine = probe(Sysroot(build(STAGES["mi300x-cpx"], tmp_path)))
    assert len({lease_name(gpu) for gpu in machine.gpus}) == 8


def test_the_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RADEON_STACK_LEASES", str(tmp_path))
    assert lease_folder(Path("/home")) == tmp_path
