"""Which implementation does a run take? The fastest of those that the card's probe found right, with the reason.

What did not work is never chosen. Today's default stays where it works, unless another is clearly faster on a GPU;
on a CPU, which others use too, times decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from radeon_stack.contracts.capabilities import Answer
from radeon_stack.host.known_issues import Setup, met_by
from radeon_stack.host.probes import Found, Probe

ASK = "radeon-stack run probe"
CLEARLY = 0.9  # of the default's time: less is told apart from noise
# Implementations as transformers names them, the default first, with how the names of their questions begin.
ATTENTION = {"sdpa": "sdpa.", "flash_attention_2": "flash_attn.", "eager": "eager."}
# Not batched_mm: it copies every token's experts, which is for decoding, not for training.
EXPERTS = {"grouped_mm": "experts.grouped_mm", "eager": "experts.eager", "radeon_grouped": "experts.radeon_grouped"}
SDPA_KERNELS = {"flash": "sdpa_flash.", "memory-efficient": "sdpa_efficient.", "cuDNN": "sdpa_cudnn."}
NO_GROUPED_MM = "RS-KI-006"
GFX12 = ("gfx1200", "gfx1201")
OVER_READS = "a pass does not clear it of reading past small operands (RS-KI-001)"
LT_OFF = {"TORCH_BLAS_PREFER_HIPBLASLT": "0", "DISABLE_ADDMM_HIP_LT": "1"}
LT_NOWHERE = {**LT_OFF, "ROCBLAS_USE_HIPBLASLT": "0"}  # rocBLAS hands products on to it by itself
LT_ON = {"TORCH_BLAS_PREFER_HIPBLASLT": "1"}
SAID = 120  # characters of an answer's own words


@dataclass(frozen=True)
class Choice:
    """What is taken for `name`, and why; `env` are variables that it takes. `value` "": nothing of it works."""

    name: str
    value: str
    why: str
    env: Mapping[str, str] = field(default_factory=dict)


def choices(found: Found, setup: Setup) -> tuple[Choice, ...]:
    """Attention, experts, and on a GPU the BLAS."""
    made = [_attention(found, setup), _experts(found, setup)]
    return (*made, _blas(found, setup)) if setup.gfx else tuple(made)


def _attention(found: Found, setup: Setup) -> Choice:
    value, why = _fastest(found, ATTENTION, timed=bool(setup.gfx))
    if found.probe is not None and value == "sdpa" and setup.gfx:
        why += _kernels(found.probe)
    return Choice("attention", value, why)


def _experts(found: Found, setup: Setup) -> Choice:
    candidates, more = EXPERTS, ""
    if not _answers(found.probe, EXPERTS["grouped_mm"]) and any(issue.id == NO_GROUPED_MM for issue in met_by(setup)):
        candidates = {name: prefix for name, prefix in EXPERTS.items() if name != "grouped_mm"}
        more = f"; grouped_mm is known to crash here ({NO_GROUPED_MM})"
    value, why = _fastest(found, candidates, timed=bool(setup.gfx))
    return Choice("experts", value, why + more)


def _fastest(found: Found, candidates: Mapping[str, str], *, timed: bool) -> tuple[str, str]:
    """(implementation, why) among `candidates`, whose first is the default."""
    default = next(iter(candidates))
    asked = {name: _answers(found.probe, prefix) for name, prefix in candidates.items()}
    if found.probe is None or not asked[default]:
        return default, f"{found.why_not or 'its questions were not asked'}: {ASK}"
    working = {name: answers for name, answers in asked.items() if answers and not _failures(answers)}
    shared = set.intersection(*(set(answers) for answers in working.values())) if working else set()
    totals = {name: _total(answers, shared) for name, answers in working.items()}
    best = min(totals, key=lambda name: totals[name], default="")
    if default in working and not (timed and totals[best] < CLEARLY * totals[default]):
        best = default
    order = sorted((name for name in asked if asked[name]), key=lambda name: name != best)
    told = "; ".join(_told(name, candidates[name], asked[name], shared) for name in order)
    return best, f"probe of {found.probe.date()} on this card and {_with(found.probe)}: {told}"


def _blas(found: Found, setup: Setup) -> Choice:
    """hipBLASLt or rocBLAS, by LoRA's thin products. On gfx12 hipBLASLt is never asked for: `OVER_READS`."""
    lt, plain = _answers(found.probe, "lora_lt."), _answers(found.probe, "lora_blas.")
    if found.probe is None or not lt or not plain:
        return Choice("blas", "default", f"{found.why_not or 'its questions were not asked'}: {ASK}")
    shared = set(lt) & set(plain)
    told = f"{_told('hipBLASLt', 'lora_lt.', lt, shared)}; {_told('rocBLAS', 'lora_blas.', plain, shared)}"
    risky = bool(setup.gfx & set(GFX12))
    why = f"probe of {found.probe.date()} on this card and {_with(found.probe)}: {told}"
    why += f"; {OVER_READS}{_soaked(found.probe)}" * risky
    lt_works, plain_works = not _failures(lt), not _failures(plain)
    if all(answer.verdict == "missing" for answer in _failures(lt)) and not lt_works:
        return Choice("blas", "default", why)  # torch has fallen back by itself
    if plain_works and not lt_works:
        return Choice("blas", "rocblas", why, LT_NOWHERE)
    if lt_works and not plain_works:
        return Choice("blas", "default", why) if risky else Choice("blas", "hipblaslt", why, LT_ON)
    ratio = _total(lt, shared) / max(_total(plain, shared), 1e-9)
    if lt_works and ratio < CLEARLY and not risky:
        return Choice("blas", "hipblaslt", why, LT_ON)
    if lt_works and ratio > 1 / CLEARLY:
        return Choice("blas", "rocblas", why, LT_OFF)
    return Choice("blas", "default", why)


def _soaked(probe: Probe) -> str:
    """What minutes of training at a small rank came to, if they were asked for."""
    told = {name: answer for name, answer in _answers(probe, "soak.lora.").items() if name != "quick"}
    if not told:
        return "; minutes of training are better evidence: radeon-stack run soak-lora"
    return "".join(f"; soak {name}: {a.verdict} ({a.remark()[:SAID]})" for name, a in told.items())


def _answers(probe: Probe | None, prefix: str) -> dict[str, Answer]:
    return probe.asked(prefix) if probe else {}


def _failures(answers: Mapping[str, Answer]) -> list[Answer]:
    return [answer for answer in answers.values() if answer.verdict != "works"]


def _total(answers: Mapping[str, Answer], shared: set[str]) -> float:
    """Milliseconds of the questions that all working candidates have."""
    return sum(sum(answers[name].milliseconds().values()) for name in shared)


def _told(name: str, prefix: str, answers: Mapping[str, Answer], shared: set[str]) -> str:
    """A candidate in a few words: its first failure, or the times of one question."""
    failures = _failures(answers)
    if failures:
        first = next((f for f in failures if f.verdict != "missing"), failures[0])
        more = f" ({first.detail[:SAID]})" if first.detail else ""
        return f"{name}: {first.question} {first.verdict}{more}"
    one = "bf16.d128" if "bf16.d128" in answers else min(shared or answers)
    times = ", ".join(f"{part} {ms:.3g} ms" for part, ms in answers[one].milliseconds().items())
    return f"{name} works" + (f", {times}" if times else "") + (f" ({prefix}{one})" if one and times else "")


def _kernels(probe: Probe) -> str:
    """Which of sdpa's own kernels work: without any, memory grows with the square of the length."""
    states = {name: _answers(probe, prefix) for name, prefix in SDPA_KERNELS.items()}
    states = {name: answers for name, answers in states.items() if answers}
    working = [name for name, answers in states.items() if not _failures(answers)]
    if working:
        return f"; its {' and '.join(working)} kernel{'s' * (len(working) > 1)} work{'s' * (len(working) == 1)}"
    some = [name for name, a in states.items() if any(answer.verdict == "works" for answer in a.values())]
    if some:
        return f"; its {' and '.join(some)} kernel works for some dtypes and head dimensions"
    return "; none of its fused kernels works: memory grows with the square of the length" if states else ""


def _with(probe: Probe) -> str:
    return "image" if "image" in probe.subject else "these packages"
