"""`python -m radeon_stack.workloads.capabilities --run DIR …`, as `radeon-stack run probe` starts it.

By hand, on any machine with torch: `… --print [--questions 'sdpa*'] [--out FILE]` prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radeon_stack.contracts.capabilities import Answer, CapabilitiesConfig, counts
from radeon_stack.errors import Exit, StackError
from radeon_stack.runs.events import Answered
from radeon_stack.text import printable
from radeon_stack.workloads.capabilities import answering
from radeon_stack.workloads.capabilities.about import about, look, unanswerable
from radeon_stack.workloads.capabilities.asking import answers
from radeon_stack.workloads.capabilities.questions import chosen
from radeon_stack.workloads.capabilities.steps import Question
from radeon_stack.workloads.job import Job, carry_out, read_config


def work(job: Job) -> dict[str, Any]:
    """Ask what the recipe asks; each answer is an event as soon as it is there."""
    config = CapabilitiesConfig.model_validate(read_config(job.arguments.run))
    questions = chosen(config.questions)
    job.progress("import", 0, 1, note="torch")
    found = about()
    job.progress("import", 1, 1)
    job.fact("environment", found)
    told: list[Answer] = []
    for one in asked(questions, found, config):
        told.append(one)
        job.emit(Answered(answer=one))
        job.progress("questions", len(told), len(questions), unit="questions", note=one.question)
    return {
        "asked": len(told),
        "works": 0,
        **{verdict.replace(" ", "_"): count for verdict, count in counts(told).items()},
    }


def asked(questions: tuple[Question, ...], found: dict[str, Any], config: CapabilitiesConfig) -> Iterator[Answer]:
    """The answers: those first that need no process."""
    named = () if config.questions == "all" else config.questions
    without = {q.name: unanswerable(q, found, q.name in named) for q in questions}
    yield from filter(None, without.values())
    left = [question for question in questions if without[question.name] is None]
    yield from answers(left, seconds=config.timeout, seed=config.seed)


def by_hand(argv: list[str]) -> int:
    """Print a table as the answers come, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", required=True)
    parser.add_argument("--questions", default="all", help="names or patterns with commas between")
    parser.add_argument("--timeout", type=int, default=60, help="seconds for each question")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write JSON there")
    given = parser.parse_args(argv)
    begun = time.monotonic()
    wanted = given.questions if given.questions == "all" else tuple(given.questions.split(","))
    try:
        config = CapabilitiesConfig(questions=wanted, timeout=given.timeout, seed=given.seed)
        questions, found = chosen(config.questions), about()
        told = []
        for one in asked(questions, found, config):
            print(printable(one.words())[:160], flush=True)
            told.append(one)
    except StackError as error:
        print(f"capabilities: {error}", file=sys.stderr)
        return error.exit_code
    took = time.monotonic() - begun
    print(f"{', '.join(f'{count} {verdict}' for verdict, count in counts(told).items())} in {took:.0f} s")
    if given.out:
        record = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "seconds": round(took, 1), "environment": found}
        record["answers"] = [one.model_dump(mode="json", exclude_defaults=True) for one in told]
        given.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return Exit.OK


def main(argv: list[str]) -> int:
    if argv[:1] == ["--answer"]:
        return answering.main(argv[1:])
    if argv == ["--about"]:
        print(json.dumps(look()))
        return Exit.OK
    return by_hand(argv) if "--print" in argv else carry_out(argv, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
