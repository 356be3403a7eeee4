"""Layers that are computed again on the way back: those that were asked for, and to the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.work.test_evaluation import adapter_of, config, trainer
from tests.work.test_training import job_in

pytestmark = pytest.mark.work


def two_steps(tiny_model: Path, folder: Path, **train: Any) -> tuple[list[int], dict[str, Any]]:
    """How often each layer's input norm is computed in two steps, and the adapter afterwards."""
    from radeon_stack.workloads.finetune import training

    job, _ = job_in(folder)
    trained = trainer(job, tiny_model, config(steps=2, eval_every=100, **train))
    trained.args.eval_strategy, trained.eval_dataset = "no", None
    layers = trained.model.get_base_model().model.layers
    counts = [0] * len(layers)

    def counter(index: int) -> Any:
        def count(*_: Any) -> None:
            counts[index] += 1

        return count

    for index, layer in enumerate(layers):
        layer.input_layernorm.register_forward_hook(counter(index))
    training.train(job, trained, None)
    return counts, adapter_of(trained.model)


def test_only_the_layers_asked_for_are_computed_again_and_nothing_else_changes(
    tiny_model: Path, tmp_path: Path
) -> None:
    import torch

    kept, expected = two_steps(tiny_model, tmp_path / "kept", gradient_checkpointing=False)
    assert set(kept) == {kept[0]} and len(kept) > 1
    once = kept[0]
    for name, checkpointing, every in (("all", True, 1), ("undecided", "auto", 1), ("second", True, 2)):
        settings = {"gradient_checkpointing": checkpointing, "every_n_layers": every}
        counts, found = two_steps(tiny_model, tmp_path / name, **settings)
        assert counts == [once + 2 * (index % every == 0) for index in range(len(kept))], name
        assert all(torch.equal(weight, expected[key]) for key, weight in found.items()), name
