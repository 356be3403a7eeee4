"""The child: imports, waits for its turn, runs one question's steps and says how each went."""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

from radeon_stack.workloads.capabilities.steps import MissingError, Step, shortened

Say = Callable[[dict[str, Any]], None]
OVERTIME = 30  # seconds beyond the question's own: a child whose parent is gone ends by itself


def main(argv: list[str]) -> int:
    """`FD SECONDS JSON`: the pipe to report to, the time limit, and the question with its seed."""
    pipe, seconds, question = int(argv[0]), int(argv[1]), json.loads(argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def say(told: dict[str, Any]) -> None:
        os.write(pipe, json.dumps(told).encode() + b"\n")

    try:
        for name in question["imports"]:
            importlib.import_module(name)
        module, _, function = question["run"].partition(":")
        ask = getattr(importlib.import_module(module), function)
    except Exception as error:
        say({"end": "failed", "detail": shortened(f"import: {type(error).__name__}: {error}")})
        return 0
    say({"ready": True})
    if not sys.stdin.readline():
        return 0  # nobody asks any more
    signal.alarm(seconds + OVERTIME)
    try:
        for step in ask(question["seed"], **question["arguments"]):
            say({"begin": step.name})
            told = carried_out(step)
            say({"done": told})
            if told["verdict"] in ("failed", "missing"):
                break
    except MissingError as error:
        say({"end": "missing", "detail": shortened(str(error))})
    except Exception as error:
        say({"end": "failed", "detail": _message(error)})
    say({"end": ""})
    return 0


def carried_out(step: Step) -> dict[str, Any]:
    """The step's part of the answer."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = step.run()
        except MissingError as error:
            return {"name": step.name, "verdict": "missing", "detail": shortened(str(error))}
        except Exception as error:
            # What torch has no kernel for it explains in warnings.
            reasons = "; ".join(dict.fromkeys(str(one.message).partition(" (Triggered")[0] for one in warned))
            return {"name": step.name, "verdict": "failed", "detail": _message(error, reasons)}
    told: dict[str, Any] = {"name": step.name, "verdict": "works", "detail": shortened(found.remark)}
    if found.milliseconds is not None:
        told["milliseconds"] = found.milliseconds
    if found.tolerance is not None and found.error is not None:
        told["tolerance"] = found.tolerance
        if math.isfinite(found.error):
            told["error"] = min(found.error, 1e9)
        if not found.error <= found.tolerance:
            told["verdict"] = "wrong"
            finite = f"off by {found.error:.3g}, {found.tolerance:.3g} is right"
            told["detail"] = finite if math.isfinite(found.error) else "not finite where it should be"
    return told


def _message(error: Exception, reasons: str = "") -> str:
    first = str(error).strip().partition("\n")[0]
    return shortened(f"{type(error).__name__}: {first}" + (f" ({reasons})" if reasons else ""))
