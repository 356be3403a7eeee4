"""The command lines of the two servers. The key is in neither: it is read from its file by the guard of both."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from radeon_stack.contracts.serve import LLAMA_CPP, ServeConfig
from radeon_stack.workloads.imports import NOT_COMPILED
from radeon_stack.workloads.serve.choosing import Served
from radeon_stack.workloads.serve.guard import KEY_FILE_VARIABLE

LOOPBACK = "127.0.0.1"
GUARD = "radeon_stack.workloads.serve.guard.Guard"
LLAMA = "radeon_stack.workloads.serve.llama"


def command(chosen: Served, config: ServeConfig, listen: str) -> list[str]:
    """What starts the server that was chosen."""
    return (_llama if chosen.server == LLAMA_CPP else _vllm)(chosen, config, listen)


def environment(key: Path) -> dict[str, str]:
    """Ours, and where the key lies."""
    return {**os.environ, KEY_FILE_VARIABLE: str(key), **({} if _compiles() else {NOT_COMPILED: "1"})}


def _compiles() -> bool:
    """Can a model be compiled here, as vLLM does unless told? What torch generates wants Python's headers, and its
    compilers of C++ (for a CPU) and of C (Triton's launchers).
    """
    asked = (os.environ.get("CXX") or "g++", os.environ.get("CC") or "gcc")
    compilers = all(shutil.which(shlex.split(command)[0]) for command in asked)
    return compilers and Path(sysconfig.get_path("include"), "Python.h").is_file()


def _llama(chosen: Served, config: ServeConfig, listen: str) -> list[str]:
    told = {
        "model": str(chosen.path),
        "name": chosen.name,
        "listen": listen,
        "port": config.port,
        "context": config.context,
        "threads": config.threads or _cores(),
    }
    return [sys.executable, "-m", LLAMA, json.dumps(told)]


def _vllm(chosen: Served, config: ServeConfig, listen: str) -> list[str]:
    context = ["--max-model-len", str(config.context)] if config.context else []
    return [
        # Not `vllm serve`, which asks for metadata by the name of vllm, and the package for CPUs has another.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(chosen.path)),
        *("--served-model-name", chosen.name, "--host", listen, "--port", str(config.port), *context),
        *(() if _compiles() else ("--enforce-eager",)),
        # Its own key is asked for below /v1 alone: others of its paths answer anybody.
        *("--middleware", GUARD, "--disable-uvicorn-access-log", "--disable-fastapi-docs"),
    ]


def _cores() -> int:
    return len(os.sched_getaffinity(0))
