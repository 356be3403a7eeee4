"""`python -m radeon_stack.workloads.export --run DIR --source DIR …`"""

from __future__ import annotations

import sys

from radeon_stack.contracts.export import ExportConfig
from radeon_stack.workloads.export.story import export
from radeon_stack.workloads.job import Job, Sizes, carry_out, read_config

SIZES = Sizes("resources.memory", "raise it, or leave vLLM out: --set loaders='[\"llama.cpp\"]'")


def work(job: Job) -> dict[str, object]:
    return export(job, ExportConfig.model_validate(read_config(job.arguments.run)))


if __name__ == "__main__":
    sys.exit(carry_out(sys.argv[1:], work, SIZES))
