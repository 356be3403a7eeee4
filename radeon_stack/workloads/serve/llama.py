"""`python -m radeon_stack.workloads.serve.llama JSON`: llama-cpp-python's own server, behind our guard."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from radeon_stack.contracts.serve import HEALTH
from radeon_stack.workloads.serve.guard import Guard

GRACE_SECONDS = 10  # that an answer under way has when we are asked to stop
CONFIG_FILE = "CONFIG_FILE"
ALL_LAYERS = -1


def main(told: dict[str, Any]) -> None:
    """Serve until SIGTERM or SIGINT."""
    import uvicorn

    app = guarded(told)
    # Nothing that is asked or answered is printed, nor who asked.
    uvicorn.run(
        app,
        host=told["listen"],
        port=told["port"],
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


def guarded(told: dict[str, Any]) -> Any:
    """The application, its model loaded."""
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings, Settings

    # These settings are read from the environment too, by names as common as MODEL, SEED or CACHE.
    for name in [name for name in os.environ if name == CONFIG_FILE or name.lower() in Settings.model_fields]:
        del os.environ[name]
    model = ModelSettings(
        model=told["model"],
        model_alias=told["name"],
        n_gpu_layers=ALL_LAYERS,
        n_ctx=told["context"],
        n_threads=told["threads"],
        n_threads_batch=told["threads"],
        logits_all=False,  # of every token of the context: gigabytes that nobody looks at
        verbose=False,
    )
    # Left as it is, a second client would end the answer that the first one waits for.
    server = ServerSettings(host=told["listen"], port=told["port"], interrupt_requests=False)
    app = create_app(server_settings=server, model_settings=[model])
    app.get(HEALTH)(_well)
    app.add_middleware(Guard)
    return app


def _well() -> dict[str, str]:
    return {"status": "ok"}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
