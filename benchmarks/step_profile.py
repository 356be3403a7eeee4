"""Where the device's time of one training step goes: a table by kind of work, and the kernels it is made of.

Of use to train_speed.py (`--profile`). Kinds are told by the kernels' names, those of PyTorch, cuBLAS, CUTLASS,
bitsandbytes, Triton, ours and unsloth's; what none of the patterns knows is `other`, and the kernels are listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

TOP = 25
NAME_LENGTH = 200
# The first that matches says the kind. torch.compile names its kernels after the operations that it fused.
PATTERNS: Mapping[str, Sequence[str]] = {
    "transfers, fills": ("^memcpy", "^memset"),
    "optimizer": ("optimizer", "adam"),
    "gradient clipping": ("lpnorm", "foreach", "multi_tensor_apply"),
    "attention": ("flash", "fmha", "attention", "attn", "sdpa", r"\b_lh_(fwd|bwd)"),
    "cross-entropy": (
        "cross_entropy", "nll_loss", "logsumexp", "log_softmax", "cunn_softmax", r"\b_fl_\w+_kernel", "score_rows",
    ),
    "routing, indexing": (
        "_rout(e|ed|er)_", "router_(forward|backward)", "count_experts", "place_slots", r"\bcombine\b", "_combine_",
        "softmax", "topk", "sort", "radix", "histogram", "bincount", "cumsum", "scan", "scatter", "gather", "index",
    ),
    "4-bit products": (
        "nf4_(grouped|dot)", "gemv_nf4", "gem[mv]_?4bit", "^(linear|grouped_matmul|gated_forward|gated_backward)$",
    ),
    "4-bit decoding": ("dequant", "nf4_decode", "decode_blocks", "decode_and_low_rank", "nf4_select"),
    "matrix products": (
        "gemm", "gemv", "nvjet", "cutlass", "cublas", "xmma", "matmul", "splitk", "wgrad",
        "(^|_)(add|b|grouped_)?mm(_|$)", "grouped_outer", "low_rank", "adapter_gradients",
    ),
    "norms, rope, activations": ("norm", "rope", "rotary", "silu", "glu", "gate_backward", "_fg_kernel", "_dwf_dw_dfg"),
    "copies, casts": ("copy", "cat_?array", "transpose", "contiguous"),
    "other elementwise": ("elementwise", "reduce", "triton_(poi|per|red)", "fill", "embedding"),
}  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """One kernel or copy on the device; begin and end in microseconds."""

    name: str
    begin: float
    end: float


def kind_of(name: str) -> str:
    """The kind of work of a kernel, by its name."""
    lowered = name.lower()
    return next((kind for kind, of in PATTERNS.items() if any(re.search(one, lowered) for one in of)), "other")


def summary(ran: Iterable[Ran], wall: float) -> dict[str, Any]:
    """The table of one step: seconds and counts by kind and by kernel, and the time in which nothing ran.

    wall: seconds of the step by the host's clock. `idle` is the wall time in which no kernel ran: the host was late.
    """
    every = sorted(ran, key=lambda one: one.begin)
    names = _sums((one.name, one) for one in every)
    kinds = _sums((kind_of(one.name), one) for one in every)
    busy = busy_seconds(every)
    top = sorted(names.items(), key=lambda entry: -entry[1]["seconds"])[:TOP]
    return {
        "wall_seconds": wall,
        "busy_seconds": busy,
        "idle_seconds": max(0.0, wall - busy),
        "launches": len(every),
        "kinds": dict(sorted(kinds.items(), key=lambda entry: -entry[1]["seconds"])),
        "kernels": [{"name": name[:NAME_LENGTH], "kind": kind_of(name), **told} for name, told in top],
        "gaps": gaps(every),
    }


def gaps(ran: Sequence[Ran]) -> list[dict[str, Any]]:
    """The longest times in which nothing ran, in order of time: seconds since the first began, and between what.

    ran: in the order of their beginning.
    """
    found, last = [], None
    for one in ran:
        if last and one.begin > last.end:
            found.append((one.begin - last.end, last, one))
        last = one if last is None or one.end > last.end else last
    longest = sorted(found, key=lambda gap: -gap[0])[:TOP]
    return [
        {
            "at": (before.end - ran[0].begin) / 1e6,
            "seconds": width / 1e6,
            "after": before.name[:NAME_LENGTH],
            "before": after.name[:NAME_LENGTH],
        }
        for width, before, after in sorted(longest, key=lambda gap: gap[1].end)
    ]


def _sums(named: Iterable[tuple[str, Ran]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, one in named:
        entry = found.setdefault(name, {"seconds": 0.0, "count": 0})
        entry["seconds"] += (one.end - one.begin) / 1e6
        entry["count"] += 1
    return found


def busy_seconds(ran: Iterable[Ran]) -> float:
    """The time in which at least one of them ran, in seconds: streams run side by side."""
    total, until = 0.0, float("-inf")
    for one in sorted(ran, key=lambda one: one.begin):
        total += max(0.0, one.end - max(one.begin, until))
        until = max(until, one.end)
    return total / 1e6


def beside(profiles: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a table, kinds down and implementations across, in milliseconds (launches)."""
    kinds = sorted(
        {kind for told in profiles.values() for kind in told["kinds"]},
        key=lambda kind: -max(told["kinds"].get(kind, {"seconds": 0})["seconds"] for told in profiles.values()),
    )
    lines = [f"{'ms of a step (launches)':<26}" + "".join(f"{name:>18}" for name in profiles)]
    for kind in kinds:
        cells = [told["kinds"].get(kind, {"seconds": 0.0, "count": 0}) for told in profiles.values()]
        lines.append(f"{kind:<26}" + "".join(f"{1e3 * c['seconds']:>10.1f} ({c['count']:>5})" for c in cells))
    for row in ("idle_seconds", "wall_seconds"):
        cells = [told[row] for told in profiles.values()]
        lines.append(f"{row.removesuffix('_seconds'):<26}" + "".join(f"{1e3 * c:>10.1f}        " for c in cells))
    return lines


class StepProfiler:
    """torch's profiler over one step, after one more that it warms up on."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        gpu = torch.cuda.is_available()
        self._profile = profile(
            activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU],
            schedule=schedule(wait=0, warmup=1, active=1),
        )

    def start(self) -> None:
        self._profile.start()

    def step(self) -> None:
        self._profile.step()

    def stop(self) -> None:
        self._profile.stop()

    def ran(self) -> list[Ran]:
        """What ran in the step; without a GPU, the outermost operations of the host in their place."""
        device = torch.autograd.DeviceType.CUDA if torch.cuda.is_available() else torch.autograd.DeviceType.CPU
        found = [e for e in self._profile.events() or [] if e.device_type == device and not _annotation(e)]
        if device == torch.autograd.DeviceType.CPU:
            found = [event for event in found if event.cpu_parent is None or _annotation(event.cpu_parent)]
        return [Ran(event.name, event.time_range.start, event.time_range.end) for event in found]


def _annotation(event: Any) -> bool:
    """Whether it is a span that someone named, over what ran in it."""
    named = ("ProfilerStep", "Optimizer.", "## ", "Torch-Compiled Region", "enumerate(")
    return getattr(event, "is_user_annotation", False) or event.name.startswith(named)
