"""What was aimed for with our kernels, and whether a record of kernel_speed.py reaches it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from radeon_stack.figures import case_label

# Both sides round alike, so their differences are as large but for chance.
CHANCE = 1.02
ENOUGH_TOKENS = 64  # of an MoE layer: below, chance is larger


@dataclass(frozen=True)
class Verdict:
    """A target of the issue: `ratio` must be at most, or at least, `bound`; `device` is the same of captured graphs."""

    target: str
    case: str
    ratio: float | None
    at_most: bool
    bound: float
    device: float | None = None

    @property
    def holds(self) -> bool:
        if self.ratio is None:
            return False
        return self.ratio <= self.bound if self.at_most else self.ratio >= self.bound


def judge(record: Mapping[str, Any], parts: Sequence[str]) -> list[Verdict]:
    """The targets of the parts that were asked for; what was not measured does not hold."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for figure in record["figures"]:
        if figure["case"].get("part") == "bare":
            continue  # what follows the linear layer, for its own figures: a router has both
        found.setdefault((figure["part"], case_label(figure["case"])), {})[figure["implementation"]] = figure["values"]
    verdicts = []
    for (part, case), values in found.items():
        verdicts += [verdict(*told, case, values) for told in TARGETS[part]]
        if part == "ffn":
            ratio = values.get("radeon_nf4", {}).get("weights_ratio")
            verdicts.append(Verdict("nf4 / 16-bit weight memory", case, ratio, True, 0.3))
    verdicts += [
        Verdict(" / ".join(told[:2]), f"{part}: nothing was measured", None, told[2], told[3])
        for part in parts
        for told in TARGETS.get(part, ())
        if not any(measured == part for measured, _ in found)
    ]
    decoded = [one["equal"] for one in record["decode"]]
    share = sum(decoded) / len(decoded) if decoded else None
    verdicts.append(Verdict("nf4 decode equal to bitsandbytes to the bit", f"{len(decoded)} matrices", share, False, 1))
    wrong = [one for one in record["proofs"] if one["state"] == "wrong" and one["implementation"].startswith("radeon")]
    verdicts.append(Verdict("ours found wrong", f"{len(record['proofs'])} comparisons", float(len(wrong)), True, 0))
    return verdicts + list(no_worse(record["proofs"]))


# Per part: time of one / time of the other, at most or at least, the bound.
TARGETS: Mapping[str, Sequence[tuple[str, str, bool, float]]] = {
    "ffn": (
        ("radeon_nf4", "grouped_mm", True, 1.0),
        ("dequantize_grouped_mm", "radeon_nf4", False, 2.0),
        ("radeon_grouped", "grouped_mm", True, 0.6),
    ),
    "seed": (("eager", "radeon_grouped", False, 20.0), ("eager", "radeon_nf4", False, 20.0)),
    "gating": (("radeon_router", "transformers", True, 0.5),),
    "linear": (("peft", "radeon_linear", False, 1.5), ("peft_16bit", "radeon_linear", False, 1.5)),
}


def verdict(
    one: str, other: str, at_most: bool, bound: float, case: str, values: Mapping[str, Mapping[str, Any]]
) -> Verdict:
    """The ratio of two implementations' times of a step."""

    def ratio(figure: str) -> float | None:
        a, b = (values.get(name, {}).get(figure) for name in (one, other))
        return a / b if a and b else None

    return Verdict(f"{one} / {other}", case, ratio("step_seconds"), at_most, bound, ratio("device_step_seconds"))


# Whose rounding ours is held to: torch's own way with the same weights.
PEERS = {
    "radeon_grouped": ("eager", "grouped_mm"),
    "radeon_nf4": ("dequantize_grouped_mm", "grouped_mm"),
    "radeon_router": ("transformers",),
    "radeon_linear": ("peft", "peft_16bit"),
}


def no_worse(proofs: Sequence[Mapping[str, Any]]) -> Iterator[Verdict]:
    """For each of ours and each dtype, the worst ratio of its difference to torch's own in the same case and result."""
    differences: dict[tuple[str, str], dict[str, Mapping[str, float]]] = {}
    for one in proofs:
        few = "seq" in one["case"] and one["case"]["batch"] * one["case"]["seq"] < ENOUGH_TOKENS
        if one["state"] == "ok" and not few:
            key = one["part"], case_label(one["case"])
            differences.setdefault(key, {})[one["implementation"]] = one["values"]
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    for (_, label), by_name in differences.items():
        for name, peers in PEERS.items():
            there = [by_name[peer] for peer in peers if peer in by_name]
            if name not in by_name or not there:
                continue
            for figure in there[0]:
                # Those of phases are the largest of their results'; the choice of experts has no rounding.
                if not figure.startswith("difference_") or figure[11:] in (
                    *("forward", "backward", "router", "again", "chosen"),
                ):
                    continue
                theirs = min(peer[figure] for peer in there)
                ratio = by_name[name][figure] / theirs if theirs else float(by_name[name][figure] > 0)
                key = name, label.split()[0]
                worst[key] = max(worst.get(key, (0.0, "")), (ratio, f"{figure[11:]} of {label}"))
    for (name, dtype), (ratio, where) in worst.items():
        told = " or ".join(PEERS[name])
        yield Verdict(f"{name}'s difference from float64 / {told}'s, {dtype}", where, ratio, True, CHANCE)
