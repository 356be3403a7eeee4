"""`radeon-stack doctor --engine slurm` against a real Slurm."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from radeon_stack.errors import Exit
from tests.cluster.conftest import Tool
from tests.conftest import Cli, wait_for


def states(told: str) -> dict[str, str]:
    return {check["code"]: check["state"] for check in json.loads(told)["checks"]}


def test_doctor_looks_at_the_cluster_and_at_a_node(cli: Cli, home: Path) -> None:
    told = cli("doctor", "--engine", "slurm", "--json")
    assert told.code == Exit.OK, told.err
    found = states(told.out)
    for code in ("RS501", "RS502", "RS503", "RS504", "RS505", "RS506", "RS507", "RS508", "RS512", "RS513", "RS515"):
        assert found[code] == "ok", code
    assert found["RS509"] == found["RS510"] == "warn" and found["RS511"] == found["RS519"] == "skipped"
    again = cli("doctor", "--sysroot", home / "cluster/stand-in/main.machine.tar.gz", "--json")
    assert again.code in (Exit.OK, Exit.MACHINE) and states(again.out)["RS101"]


def test_a_partition_that_is_not_there_is_a_bad_value(cli: Cli) -> None:
    told = cli("doctor", "--engine", "slurm", "--partition", "urgnt")
    assert told.code == Exit.USAGE and "did you mean 'urgent'" in told.error


def test_a_node_that_is_drained_and_a_partition_that_is_down_are_found(cli: Cli) -> None:
    drain = ["scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=its fan"]
    subprocess.run(drain, check=True)
    try:
        told = cli("doctor", "--engine", "slurm")
        assert told.code == Exit.OK and "n2 drain: its fan" in told.out
        subprocess.run(["scontrol", "update", "PartitionName=urgent", "State=DOWN"], check=True)
        told = cli("doctor", "--engine", "slurm", "--partition", "urgent", "--json")
        assert told.code == Exit.MACHINE and states(told.out)["RS504"] == "fail"
        assert states(told.out)["RS512"] == "skipped"
    finally:
        subprocess.run(["scontrol", "update", "NodeName=n2", "State=RESUME"], check=True)
        subprocess.run(["scontrol", "update", "PartitionName=urgent", "State=UP"], check=True)


def test_a_node_that_is_lost_is_found(cli: Cli, cluster_tool: Tool) -> None:
    def down() -> bool:
        said = subprocess.run(
            ["sinfo", "-h", "-n", "n2", "-o", "%t"], capture_output=True, text=True, check=True
        ).stdout
        return "down" in said

    assert cluster_tool("kill", "--daemon", "n2").returncode == 0
    try:
        wait_for(down, what="the controller to miss the node")
        told = cli("doctor", "--engine", "slurm", "--json")
        assert told.code == Exit.OK and states(told.out)["RS505"] == "warn"
    finally:
        assert cluster_tool("up", "--daemon", "n2").returncode == 0
        wait_for(lambda: not down(), what="the node to be back")
