"""A real want of memory, on the CPU: the run is given less address space than its batch needs."""

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


def test_a_batch_that_does_not_fit_is_told_with_a_smaller_one_and_the_same_global_batch(
    cli: Cli, tiny_run: tuple[str, ...]
) -> None:
    sets = ["--set", "data.copies=3000", "--set", "train.steps=1", "--set", "export.merge=false"]
    run = [*tiny_run, "--engine", "local", *sets, "--set", "samples.count=0"]
    sizes = ["--set", "train.batch_size=3000", "--set", "train.gradient_accumulation=1"]
    result = cli(*run, *sizes, preexec_fn=limited(4 * GIB))
    told = result.error
    assert result.code == Exit.WORKLOAD, result.err
    size = r"[\d.]+ [GM]iB"
    # torch's allocator says how much it was asked for; oneDNN, where that comes first, does not.
    figures = rf"({size} short of [\d.]+ GiB|{size} of [\d.]+ GiB in use)"
    assert re.search(f"train.batch_size: out of memory while train: {figures}", told), told
    proposed = re.search(r"--set train.batch_size=(\d+) --set train.gradient_accumulation=(\d+)", told)
    assert proposed is not None, told
    smaller, accumulation = map(int, proposed.groups())
    assert smaller < 3000 and smaller * accumulation == 3000
