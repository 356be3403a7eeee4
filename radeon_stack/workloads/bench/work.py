"""What a child process does of a benchmark: look at the card, prove one implementation, time several together."""

from __future__ import annotations

import gc
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from radeon_stack.figures import Case, case_label
from radeon_stack.workloads.bench.card import look_at, state
from radeon_stack.workloads.bench.floor import Floor, measure_floor
from radeon_stack.workloads.bench.isolate import Task
from radeon_stack.workloads.bench.suite import Missing, Suite, Work, find_suite
from radeon_stack.workloads.bench.timing import Budget, Timing, first_line, measure

ADDRESS = f"{__name__}:do"
POISON_BYTES = 512 << 20  # larger ones are weights
# What libraries say when a thing is not there for this device or these sizes; anything else is a failure.
NOT_THERE = (Missing, ImportError, NotImplementedError)
NOT_THERE_TEXTS = ("No available kernel", "not compiled for", "only supports", "is not supported", "not implemented")


def do(task: Task) -> dict[str, Any]:
    """Carry out a task by its `do`."""
    device = torch.device(task["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":  # Triton's kernels run there only in its interpreter, and it is asked for once, at import
        os.environ.setdefault("TRITON_INTERPRET", "1")
    return {"card": card, "state": clocks, "prove": prove, "time": time_together}[task["do"]](task, device)


def card(task: Task, device: torch.device) -> dict[str, Any]:
    """The card's facts, and its floor for the dtypes asked for; {} where there is no such device."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return {}
    before = state(device)
    floor = measure_floor(device, task["dtypes"])
    clocks = {"before": before, "loaded": state(device)}  # right after the floor: while they are still up
    return {"card": {**look_at(device).facts(), "clocks": clocks}, "floor": floor.facts()}


def clocks(_: Task, device: torch.device) -> dict[str, Any]:
    return state(device)


def prove(task: Task, device: torch.device) -> dict[str, Any]:
    """Run an implementation twice on fresh inputs: how far is it from float64, and from itself?

    `state` is ok, wrong, missing or failed; `values` has `difference_RESULT`, the largest of each phase as
    `difference_PHASE`, and `difference_again`. Where it has weights of its own, `quantised_RESULT` is how far the truth
    over these is from the truth over the shared ones.
    """
    suite, case = find_suite(task["suite"]), task["case"]
    try:
        setting = suite.setting(case, device, seed_of(case, task["seed"]))
        built = suite.build(task["implementation"], setting)
        truth, part = suite.truth(built.exact or setting)
        first, again = (results_of(suite, setting, built.results, device) for _ in range(2))
        missing = truth.keys() - first.keys()
        off_by = {name: difference(first[name], true) for name, true in truth.items() if name in first}
        off_by["again"] = worst([difference(again[name], first[name]) for name in first])
        own = {}
        if built.exact is not None:
            own = {f"quantised_{name}": difference(truth[name], one) for name, one in suite.truth(setting)[0].items()}
        limit = suite.limit(case)
        off = {name: value for name, value in off_by.items() if not value <= limit}  # true for nan too
        values = {f"difference_{name}": value for name, value in off_by.items()} | phase_differences(suite, off_by)
        notes = [built.note, f"compared: {part}" if part else ""]
        if off:
            notes.insert(0, f"above {limit:.1e}: " + ", ".join(f"{name} {value:.1e}" for name, value in off.items()))
        if missing:
            notes.insert(0, f"gives no {', '.join(sorted(missing))}")
        return {
            "state": "wrong" if off or missing else "ok",
            "values": {**values, **own, **built.values},
            "note": "; ".join(note for note in notes if note),
        }
    except Exception as error:  # an implementation's own failure is what is asked about
        return {"state": "missing" if not_there(error) else "failed", "values": {}, "note": reason(error)}
    finally:
        free(device)


def time_together(task: Task, device: torch.device) -> dict[str, Any]:
    """Time implementations that have proved themselves, interleaved, phase by phase.

    The figures by implementation: `values`, or `failed` with the reason.
    """
    suite, case = find_suite(task["suite"]), task["case"]
    floor = Floor(**task["floor"])
    found: dict[str, Any] = {}
    try:
        setting = suite.setting(case, device, seed_of(case, task["seed"]))
        built = {}
        for name in task["implementations"]:
            found[name] = {"values": {}, "notes": [], "failed": ""}
            try:
                built[name] = suite.build(name, setting)
            except Exception as error:
                found[name]["failed"] = reason(error)
        for phase, work in suite.work(case).items():
            calls = {name: one.calls[phase] for name, one in built.items() if one.timed and phase in one.calls}
            timings = measure(
                calls,
                device=device,
                budget=Budget(**task["budget"]),
                flush=task["flush"],
                graph=task["graph"],
            )
            for name, timing in timings.times.items():
                found[name]["values"] |= phase_values(phase, timing, built[name].work.get(phase, work), floor)
                found[name]["notes"] += [f"{phase}: {timing.note}"] if timing.note else []
            for name, why in timings.failed.items():
                found[name]["failed"] = f"{phase}: {why}"
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # an error of the device would meet every later case: let it end us here
    finally:
        free(device)
    return found


def phase_values(phase: str, timing: Timing, work: Work, floor: Floor) -> dict[str, float]:
    """A phase's figures, in SI units, by their names in the events."""
    values: dict[str, float] = {
        "seconds": timing.median,
        "seconds_p20": timing.p20,
        "seconds_p80": timing.p80,
        "samples": timing.n,
        "stable": float(timing.stable),
    }
    if timing.graph:
        values["graph"] = 1.0
    if timing.peak_bytes is not None:
        values["peak_bytes"] = timing.peak_bytes
    if work.operations:
        values["operations_per_second"] = work.operations / timing.median
    if work.tokens:
        values["tokens_per_second"] = work.tokens / timing.median
    if work.dtype in floor.matrix:
        least = floor.seconds(work.bytes, work.operations, work.dtype)
        values["floor_seconds"] = least
        values["of_floor"] = timing.median / least
        values["memory_bound"] = float(floor.bound(work.bytes, work.operations, work.dtype) == "memory")
    return {f"{phase}_{name}": value for name, value in values.items()}


def phase_differences(suite: Suite, off_by: Mapping[str, float]) -> dict[str, float]:
    """The largest difference of each phase's results."""
    phases: dict[str, list[float]] = {}
    for name, phase in suite.results.items():
        if name in off_by:
            phases.setdefault(phase, []).append(off_by[name])
    return {f"difference_{phase}": worst(found) for phase, found in phases.items()}


def results_of(suite: Suite, setting: Any, run: Any, device: torch.device) -> Mapping[str, torch.Tensor]:
    """One run's results, its part that the truth is of, on memory that held NaN before: what is unwritten shows."""
    poison(setting)
    found = suite.part(setting, run())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found


def poison(setting: Any) -> None:
    """Fill free blocks of the allocator with NaN, of the sizes that results have: those of the setting's tensors."""
    found = [one for one in vars(setting).values() if isinstance(one, torch.Tensor) and one.is_floating_point()]
    tensors = [one for one in found if one.nbytes <= POISON_BYTES]
    held = [torch.full_like(one, float("nan"), requires_grad=False) for one in tensors for _ in range(2)]
    del held


def difference(found: torch.Tensor, true: torch.Tensor) -> float:
    """‖found − true‖ / ‖true‖ in float64; 0 for two zeros, nan where either has one, inf for other shapes."""
    if found.shape != true.shape:
        return float("inf")
    found, true = found.detach().double(), true.detach().double()
    size, off = true.norm().item(), (found - true).norm().item()
    return off / size if size else float(off)


def worst(values: Sequence[float]) -> float:
    """The largest; nan when one is."""
    return next((value for value in values if value != value), max(values, default=0.0))


def seed_of(case: Case, seed: int) -> int:
    """A seed of the case's own: other cases get other data, the same case the same data in every process."""
    return (zlib.crc32(case_label(case).encode()) ^ seed) & 0x7FFFFFFF


def not_there(error: Exception) -> bool:
    return isinstance(error, NOT_THERE) or any(text in str(error) for text in NOT_THERE_TEXTS)


def reason(error: Exception) -> str:
    return str(error) if isinstance(error, Missing) else first_line(error)


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more; compiled code too, since every case has shapes of its own."""
    if "torch._dynamo" in sys.modules:  # seconds to import, and only flex_attention did
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
