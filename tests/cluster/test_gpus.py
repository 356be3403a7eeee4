"""A cluster that counts GPUs: what a job is told of its own. No card is there: Slurm asks for device nodes alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from radeon_stack.errors import Exit
from radeon_stack.host.cluster import Gres, cluster, partition_named
from radeon_stack.host.nodes import node_of
from tests.cluster.conftest import running
from tests.conftest import Cli


@pytest.fixture(scope="module", autouse=True)
def with_gpus() -> Iterator[None]:
    with running("--gpus", "2"):
        yield


def test_a_job_is_told_its_gpus_and_a_question_without_them_is_another_one(home: Path) -> None:
    found = cluster()
    main = partition_named(found, None)
    assert main.gres == (Gres("gpu", "", 2),) and main.gpus == 2
    with_both = node_of(home, found, main, 2)
    assert with_both.record.environment["ROCR_VISIBLE_DEVICES"] == "0,1"
    assert node_of(home, found, main, 1) == with_both
    assert "ROCR_VISIBLE_DEVICES" not in node_of(home, found, main).record.environment


def test_gpus_that_are_counted_and_not_there_are_found(cli: Cli) -> None:
    told = cli("doctor", "--engine", "slurm", "--json")
    checks = {check["code"]: check for check in told.json["checks"]}
    assert told.code == Exit.MACHINE and checks["RS507"]["state"] == "fail"
    assert checks["RS507"]["remedy"][0].startswith("radeon-stack doctor --sysroot /")
    assert checks["RS511"]["state"] == "warn" and checks["RS519"]["evidence"] == "ROCR_VISIBLE_DEVICES=0"
