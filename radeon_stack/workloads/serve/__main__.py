"""`python -m radeon_stack.workloads.serve`: choose a file and a server, start it, see it answer, wait."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from radeon_stack.contracts.serve import KEY_FILE, ServeConfig
from radeon_stack.dialogue import Endpoint
from radeon_stack.errors import UsageError
from radeon_stack.workloads import job
from radeon_stack.workloads.serve.child import Child
from radeon_stack.workloads.serve.choosing import MODULES, Served, choose
from radeon_stack.workloads.serve.ready import wait_until_it_answers
from radeon_stack.workloads.serve.servers import LOOPBACK, command, environment

SIZES = job.Sizes(
    where="config.context",
    remedy="take a shorter context (--set context=2048) or a smaller file (--set quantization=q4_k_m)",
)


def serve(told: job.Job) -> dict[str, Any]:
    """Serve until somebody asks to stop. It returns no result: a server that ends by itself has failed."""
    config = ServeConfig.model_validate(job.read_config(told.arguments.run))
    if told.arguments.source is None:
        raise UsageError("what is to be served?", where="--source")
    installed = tuple(server for server, module in MODULES.items() if find_spec(module))
    chosen = choose(config, told.arguments.source, installed)
    chosen.require_whole()
    key = told.arguments.run / KEY_FILE
    told.progress("load", 0, 1, note=f"{chosen.path.name} by {chosen.server}")
    with Child(command(chosen, config, told.arguments.listen), environment(key)) as child:
        here = Endpoint(LOOPBACK, config.port, key.read_text(encoding="ascii").strip(), chosen.name)
        wait_until_it_answers(here, child, config.ready_seconds)
        told.progress("load", 1, 1)
        told.fact("endpoint", {"url": here.url, **about(chosen)})
        told.stage = "serving"
        child.wait()
        raise child.failure()


def about(chosen: Served) -> dict[str, str]:
    """What clients call it, and what it is."""
    return {"model": chosen.name, "server": chosen.server, "file": chosen.path.name}


if __name__ == "__main__":
    sys.exit(job.carry_out(sys.argv[1:], serve, SIZES))
