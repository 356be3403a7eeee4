"""A suite of small sums, for the tests of the room that real suites live in: right, wrong, missing, deadly."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from radeon_stack.figures import Case
from radeon_stack.workloads.bench.suite import Built, Missing, Work
from radeon_stack.workloads.bench.timing import Call


@dataclass(frozen=True)
class Setting:
    case: Case
    x: torch.Tensor


def crash() -> None:
    ctypes.string_at(0)


@dataclass(frozen=True)
class Doubling:
    """Doubles a vector, in ways that the names tell."""

    name: str = "doubling"
    address: str = f"{__name__}:SUITE"
    implementations: Sequence[str] = (
        *("add", "multiply", "thrice", "nan", "unwritten", "moving", "absent", "raises", "segfault", "exits", "hangs"),
        *("crashes_in_company", "crashes_when_timed"),
    )

    @property
    def results(self) -> Mapping[str, str]:
        return {"out": "forward"}

    def cases(self, config: Any) -> list[Case]:
        return [{"dtype": "float32", "size": size} for size in (64, 96)]

    def dtype(self, case: Case) -> str:
        return str(case["dtype"])

    def work(self, case: Case) -> Mapping[str, Work]:
        size = int(case["size"])
        return {"forward": Work(8 * size, size, "float32")}

    def setting(self, case: Case, device: torch.device, seed: int) -> Setting:
        generator = torch.Generator(device).manual_seed(seed)
        return Setting(case, torch.randn(int(case["size"]), generator=generator, device=device))

    def build(self, name: str, setting: Setting) -> Built:
        x = setting.x
        if name == "absent":
            raise Missing("nobody wrote it")
        calls: dict[str, Any] = {
            "add": lambda: x + x,
            "multiply": lambda: 2 * x,
            "thrice": lambda: 3 * x,
            "nan": lambda: 2 * x + float("nan"),
            "unwritten": lambda: torch.empty_like(x),
            "moving": lambda: 2 * x + torch.rand(()),
            "raises": lambda: x + torch.zeros(5),
            "segfault": crash,
            "exits": lambda: os._exit(3),
            "hangs": lambda: time.sleep(60),
        }
        run = calls.get(name, calls["multiply"])
        # Two that prove themselves and die when they are timed: one only beside others, whose processes say so.
        timed: dict[str, Any] = {
            "crashes_in_company": lambda: crash() if in_company() else 2 * x,
            "crashes_when_timed": crash,
        }
        return Built(lambda: {"out": run()}, {"forward": Call(timed.get(name, run))}, f"the {name} one")

    def truth(self, setting: Setting) -> tuple[Mapping[str, torch.Tensor], str]:
        return {"out": 2 * setting.x.double()}, ""

    def part(self, setting: Setting, results: Mapping[str, Any]) -> Mapping[str, Any]:
        return results

    def limit(self, case: Case) -> float:
        return 1e-3


def in_company() -> bool:
    """Was this process asked to time more than one implementation?"""
    command = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    return b'"multiply"' in Path(os.fsdecode(command[-3])).read_bytes()


def echo(task: Mapping[str, Any]) -> dict[str, Any]:
    """Of the tests of isolation: does what the task says, then says it again."""
    does = {"segfault": crash, "exit": lambda: os._exit(3), "hang": lambda: time.sleep(60), "abort": os.abort}
    print(f"doing {task['do']}", flush=True)
    if task["do"] == "raise":
        raise ValueError("no\nand why")
    if task["do"] == "gpu_fault":  # as ROCr says it, and aborts
        print("Memory access fault by GPU node-1 (Agent handle: 0x5581) on address 0x7f. Reason: Unknown.", flush=True)
        os.abort()
    if task["do"] == "illegal_access":
        raise RuntimeError("HIP error: an illegal memory access was encountered")
    does.get(task["do"], lambda: None)()
    return {"did": task["do"], "pid": os.getpid()}


SUITE = Doubling()
