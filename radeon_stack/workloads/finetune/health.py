"""Is the loss still sound? When it is not: a diagnosis of the step, what was before it, and what to change.

Needs no torch.

A loss that is nan or infinite ends training at once, and so does such a gradient norm: clipping by it makes every
weight nan. In fp16 the gradient scaler skips such a step and halves its scale, which begins at 2**16: there it takes
`SCALER_STEPS` in a row.

A loss diverges when `IN_A_ROW` steps one after another lie above the *bound*, the lower of two:

- the highest of the first `IN_A_ROW` losses, plus one nat. Where nothing changes, that the last ten of twenty draws
  all exceed the first ten has a chance of 1 in 184,756 (20 over 10), whatever the losses' distribution; one nat more,
  a perplexity e times as high, keeps rows of different kinds and an over-fitted start from looking like it.
- twice the higher of the first two losses, plus two nats: for runs whose first ten steps had diverged already. The
  first loss is the untrained model's, for LoRA's B begins at 0; two losses say less than ten, so the margin is wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from radeon_stack.contracts.finetune import FinetuneConfig

IN_A_ROW = 10
MARGIN, EARLY_MARGIN = 1.0, 2.0  # nats
SCALER_STEPS = 20
SHOWN = 3  # sound losses in a diagnosis
SLOWER = 5.0  # a proposed learning rate is that much lower


@dataclass(frozen=True)
class Figures:
    """An optimizer step: loss (nats a token), the gradients' norm before clipping, the learning rate."""

    step: int
    loss: float
    grad_norm: float | None = None
    learning_rate: float | None = None


@dataclass
class Watch:
    """Remembers the steps and tells the first that is not sound. `scaled`: fp16 with its gradient scaler."""

    scaled: bool = False
    divergence: bool = True
    steps: list[Figures] = field(default_factory=list)
    above: int = 0
    """Steps in a row above the bound, the last among them: a checkpoint of now may be of no use."""
    unscaled: int = 0

    def see(self, found: Figures) -> str:
        """Take note of a step; what is wrong with it, or "" """
        self.steps.append(found)
        if not math.isfinite(found.loss):
            return f"the loss is {found.loss}"
        finite = found.grad_norm is None or math.isfinite(found.grad_norm)
        self.unscaled = 0 if finite else self.unscaled + 1
        if self.unscaled and (not self.scaled or self.unscaled >= SCALER_STEPS):
            often = f", {self.unscaled} steps in a row" if self.scaled else ""
            return f"the gradient norm is {found.grad_norm}{often}"
        limit = bound([one.loss for one in self.steps[:IN_A_ROW]])
        self.above = self.above + 1 if self.divergence and found.loss > limit else 0
        if self.above >= IN_A_ROW and len(self.steps) > IN_A_ROW:
            return f"the loss diverges: {IN_A_ROW} steps in a row above {limit:.4g}, the last at {found.loss:.4g}"
        return ""

    @property
    def sound(self) -> list[Figures]:
        """The steps before the trouble."""
        end = len(self.steps) - max(self.above, self.unscaled, 1)
        return [one for one in self.steps[:end] if math.isfinite(one.loss)]


def bound(first: Sequence[float]) -> float:
    """Where divergence begins, in nats, from up to `IN_A_ROW` first losses; see above."""
    early = 2 * max(first[:2]) + EARLY_MARGIN
    return early if len(first) < IN_A_ROW else min(max(first) + MARGIN, early)


def figures_in(history: Sequence[Mapping[str, Any]]) -> list[Figures]:
    """The steps in a trainer's log history."""
    return [figures(int(entry["step"]), entry) for entry in history if "loss" in entry]


def figures(step: int, logs: Mapping[str, Any]) -> Figures:
    """A step from what the trainer logs of it."""
    norm, rate = logs.get("grad_norm"), logs.get("learning_rate")
    return Figures(
        step,
        float(logs["loss"]),
        None if norm is None else float(norm),
        None if rate is None else float(rate),
    )


def diagnosis(what: str, watch: Watch) -> str:
    """What was found, with the figures before it."""
    found, sound = watch.steps[-1], watch.sound
    parts = [f"{what} at step {found.step}"]
    if sound:
        last = sound[-SHOWN:]
        parts.append(f"before it {', '.join(f'{one.loss:.4g}' for one in last)} (to step {last[-1].step})")
    else:
        parts.append("before anything was learnt")
    if found.grad_norm is not None:
        before = [one.grad_norm for one in sound if one.grad_norm is not None and math.isfinite(one.grad_norm)]
        usual = f", {median(before):.4g} was usual" if before else ""
        parts.append(f"gradient norm {found.grad_norm:.4g}{usual}")
    if found.learning_rate is not None:
        parts.append(f"learning rate {found.learning_rate:.4g}")
    return "; ".join(parts)


def remedy(config: FinetuneConfig, watch: Watch, *, checkpoint: int | None, amd: bool) -> str:
    """What to change, the likeliest first; `checkpoint` is the step of the last one, `amd` whether this is a Radeon."""
    train = config.train
    advice = []
    if watch.sound:
        rate = float(f"{train.learning_rate / SLOWER:.0e}")
        where = f"--resume RUN (from step {checkpoint})" if checkpoint else "a new run"
        advice.append(f"lower the rate: {where} with --set train.learning_rate={rate:g}")
        if train.warmup * train.steps < IN_A_ROW:
            advice.append(f"warm up longer: --set train.warmup={max(0.1, min(0.5, IN_A_ROW / train.steps)):.2g}")
    else:
        advice.append(
            "it is not the learning rate, but a weight, a row or a kernel: ask the card with radeon-stack run probe"
        )
    if train.precision == "fp16":
        advice.append("fp16 ends at 65,504: --set train.precision=bf16")
    if amd and (issues := _issues(config)):
        advice.append(f"known of AMD GPUs: {', '.join(issues)} (radeon-stack doctor -v tells which are this machine's)")
    return "; ".join(advice)


def _issues(config: FinetuneConfig) -> list[str]:
    """Known faults of AMD GPUs that can give such numbers."""
    return [
        *(["RS-KI-001 (thin products at small LoRA ranks, gfx12)"] if config.lora.rank < 64 else []),
        *(["RS-KI-008 (large fp32 products, gfx1201)"] if config.train.precision == "fp32" else []),
        *(["RS-KI-016 (4 bit before bitsandbytes 0.50)"] if config.quantization.kind == "nf4" else []),
    ]
