"""A measured figure in words: what was asked, and what came of it, on one line. Needs nothing but Python."""

from __future__ import annotations

from collections.abc import Mapping

Scalar = str | int | float | bool
Case = Mapping[str, Scalar]

DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
# Sizes that people write with a letter, in their order; what is not here is written out after them.
LETTERS = {"batch": "b", "seq": "s", "heads": "h", "head_dim": "d"}
# `step` is both, one after the other; a router's difference is told beside theirs.
PHASES = {"forward": "fwd", "backward": "bwd", "router": "router", "step": "both"}


def case_label(case: Case) -> str:
    """`bf16 b4 s2048 h32/8 d128 causal`."""
    rest: dict[str, Scalar] = dict(case)
    parts: list[str] = []
    if "dtype" in rest:
        dtype = str(rest.pop("dtype"))
        parts.append(DTYPES.get(dtype, dtype))
    kv_heads = rest.pop("kv_heads", None)
    for name, letter in LETTERS.items():
        if name in rest:
            value = f"{letter}{rest.pop(name)}"
            shared = name == "heads" and kv_heads not in (None, case["heads"])
            parts.append(f"{value}/{kv_heads}" if shared else value)
    for name, told in rest.items():
        if isinstance(told, bool):
            parts += [name] if told else []
        else:
            parts.append(told if isinstance(told, str) else f"{name} {told:g}")
    return " ".join(parts)


def phases_of(values: Mapping[str, float]) -> list[str]:
    """The phases that were timed."""
    return [name.removesuffix("_seconds") for name in values if name.endswith("_seconds") and "floor" not in name]


def is_stable(values: Mapping[str, float]) -> bool:
    """Is every time that was taken near its own repetitions?"""
    return all(values.get(f"{phase}_stable") for phase in phases_of(values))


def of_floor(values: Mapping[str, float], phase: str) -> str:
    """`1.7× floor, memory`, or "" where there is none."""
    if f"{phase}_of_floor" not in values:
        return ""
    bound = "memory" if values.get(f"{phase}_memory_bound") else "compute"
    return f"{values[f'{phase}_of_floor']:.1f}× floor, {bound}"


def figure_line(case: Case, implementation: str, state: str, values: Mapping[str, float], note: str = "") -> str:
    """`bf16 b4 s2048 h32 d128 | flash_attn | diff fwd 1.2e-03 bwd 3.4e-03 | 7.05 ms fwd 70.68 ms bwd | stable`."""
    parts = [case_label(case), implementation]
    differences = [
        f"{short} {values[f'difference_{phase}']:.1e}"
        for phase, short in PHASES.items()
        if f"difference_{phase}" in values
    ]
    if differences:
        parts.append("diff " + " ".join(differences))
    phases = phases_of(values)
    if phases:
        parts.append(" ".join(f"{milliseconds(values[f'{p}_seconds'])} {PHASES.get(p, p)}" for p in phases))
        parts.append("stable" if is_stable(values) else "unstable")
        floors = [f"{values[f'{p}_of_floor']:.1f}×" for p in phases if f"{p}_of_floor" in values]
        if floors:
            parts.append(f"{' '.join(floors)} of the floor")
    elif state == "ok" and note:
        parts.append(note)
    if state != "ok":
        parts.append(state + (f": {note}" if note else ""))
    return " | ".join(parts)


def milliseconds(seconds: float) -> str:
    """`7.05 ms`; three digits where it is short."""
    ms = seconds * 1e3
    return f"{ms:.2f} ms" if ms >= 1 else f"{ms:.3g} ms"
