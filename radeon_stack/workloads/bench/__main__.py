"""`python -m radeon_stack.workloads.bench --run DIR …`"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from radeon_stack.contracts.bench import BenchConfig
from radeon_stack.figures import case_label, figure_line
from radeon_stack.runs.events import Measurement
from radeon_stack.workloads.bench.race import Figure, Settings, chosen, look, race, with_clocks_after
from radeon_stack.workloads.bench.suite import SUITES, find_suite
from radeon_stack.workloads.job import Job, Sizes, carry_out, read_config

STATES = ("ok", "missing", "wrong", "crashed", "failed")
SIZES = Sizes("config", "take smaller sizes (--set attention.seq=[2048], ffn.seq=[128], linear.tokens=[128])")


def work(job: Job) -> dict[str, Any]:
    """Run the suites that the configuration asks for; the result counts how often each state was found."""
    config = BenchConfig.model_validate(read_config(job.arguments.run))
    settings = settings_of(config)
    suites = [find_suite(SUITES[name]) for name in dict.fromkeys(config.suites)]
    cases = {suite.name: suite.cases(config) for suite in suites}
    wanted = None if config.implementations == "all" else config.implementations
    names = chosen(suites, wanted)

    dtypes = list(dict.fromkeys(suite.dtype(case) for suite in suites for case in cases[suite.name]))
    job.progress("floor", 0, 1, note="bandwidth, matrix rates")
    ground = look(settings, dtypes)
    job.progress("floor", 1, 1)
    job.fact("card", dict(ground.card))
    job.fact("floor", dict(ground.floor))
    job.fact("timing", config.timing.model_dump())

    def tell(figure: Figure) -> None:
        job.emit(measurement(figure))
        print(figure_line(figure.case, figure.implementation, figure.state, figure.values, figure.note), flush=True)

    def progress(stage: str, done: int, total: int, note: str) -> None:
        job.progress(stage, done, total, note=note)

    found: list[Figure] = []
    for suite in suites:
        found += race(suite, cases[suite.name], names[suite.name], settings, ground, tell=tell, progress=progress)
    job.fact("card", dict(with_clocks_after(ground, settings).card))
    states = Counter(figure.state for figure in found)
    return {
        "cases": len({(figure.suite, case_label(figure.case)) for figure in found}),
        **{state: states[state] for state in STATES},
    }


def settings_of(config: BenchConfig) -> Settings:
    timing = config.timing.model_dump()
    return Settings(
        device="" if config.device == "auto" else config.device,
        seed=config.seed,
        flush=timing.pop("flush"),
        graph=timing.pop("graph"),
        budget=timing,
        seconds=config.timeout,
    )


def measurement(figure: Figure) -> Measurement:
    return Measurement.model_validate(
        {
            "suite": figure.suite,
            "case": dict(figure.case),
            "implementation": figure.implementation,
            "state": figure.state,
            "values": dict(figure.values),
            "note": figure.note,
        }
    )


if __name__ == "__main__":
    sys.exit(carry_out(sys.argv[1:], work, SIZES))
