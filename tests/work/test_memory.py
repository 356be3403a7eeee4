"""A real want of memory, on the CPU: the run is given less than its batch needs, then takes the proposed one."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable

import pytest

from radeon_stack.errors import Exit
from tests.conftest import Cli

pytestmark = pytest.mark.work
GIB = 1 << 30


def limited(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size))


def test_a_batch_that_does_not_fit_is_told_with_one_that_does(cli: Cli, tiny_run: list[str]) -> None:
    sets = ["--set", "data.copies=6000", "--set", "train.steps=1", "--set", "export.merge=false"]
    run = [*tiny_run, "--engine", "local", *sets, "--set", "samples.count=0"]
    batch = ["--set", "train.batch_size=6000", "--set", "train.gradient_accumulation=1"]
    failed = cli(*run, *batch, preexec_fn=limited(6 * GIB))
    assert failed.code == Exit.WORKLOAD, failed.err
    assert re.search(
        r"config.train.batch_size: out of memory while train: [\d.]+ [GM]iB short of [\d.]+ GiB", failed.error
    )
    proposed = re.search(r"--set train.batch_size=(\d+) --set train.gradient_accumulation=(\d+)", failed.error)
    assert proposed is not None, failed.error
    smaller, accumulation = map(int, proposed.groups())
    assert smaller < 6000 and smaller * accumulation == 6000
    again = cli(*run, *proposed[0].split(), preexec_fn=limited(6 * GIB))
    assert again.code == Exit.OK, again.err
