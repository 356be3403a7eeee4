"""Sampled responses to one question, before and after."""

from __future__ import annotations

from typing import Any

import torch

from radeon_stack.contracts.finetune import Samples
from radeon_stack.runs.events import Phase, Sample
from radeon_stack.workloads.finetune.encoding import render
from radeon_stack.workloads.job import Job


def sample(
    job: Job,
    model: Any,
    tokenizer: Any,
    settings: Samples,
    phase: Phase,
    prompt: str,
    expected: str | None,
    seed: int,
    *,
    together: bool = False,
) -> None:
    """Draw `settings.count` responses in one batch and tell each; it is correct when it contains `expected`.

    together: all processes do, for each has but a share of the model.
    """
    job.progress(f"ask {phase}", 0, settings.count, unit="answers")
    responses = generate(model, tokenizer, settings, prompt, seed, together=together)
    for index, response in enumerate(responses):
        correct = None if expected is None else expected.casefold() in response.casefold()
        job.emit(Sample(phase=phase, index=index, prompt=prompt, response=response, expected=expected, correct=correct))
        job.progress(f"ask {phase}", index + 1, settings.count, unit="answers")


def generate(
    model: Any, tokenizer: Any, settings: Samples, prompt: str, seed: int, *, together: bool = False
) -> list[str]:
    """`settings.count` responses; the same ones for the same weights and seed. The RNG is left as it was found."""
    inputs = _inputs(model, tokenizer, prompt)
    greedy = settings.temperature == 0
    training = model.training
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(
            **inputs,
            max_new_tokens=settings.max_new_tokens,
            do_sample=not greedy,
            temperature=None if greedy else settings.temperature,
            top_p=None if greedy else settings.top_p,
            top_k=None,
            num_return_sequences=1 if greedy else settings.count,
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=together,  # one that has come to its end goes on for the others
        )
    model.train(training)
    rows = [tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() for row in output]
    return rows * settings.count if greedy else rows


def _inputs(model: Any, tokenizer: Any, prompt: str) -> Any:
    text = render(tokenizer, [{"role": "user", "content": prompt}], ask=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
