"""bitsandbytes' optimizers take the same steps without waiting for the device after each parameter."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.work
STEPS = 4


def trained(kind: str, *, ours: bool) -> tuple[list[Any], Any]:
    """Parameters and optimizer after some steps; one is too small for 8 bit, one gets no gradient at first."""
    import bitsandbytes
    import torch

    from radeon_stack.workloads.finetune.optimizer import without_waiting

    torch.manual_seed(7)
    parameters = [torch.nn.Parameter(torch.randn(size, 64)) for size in (96, 3, 64)]
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimizer: Any = getattr(bitsandbytes.optim, kind)(groups, lr=1e-2)
    if ours:
        optimizer = without_waiting(optimizer)
    for step in range(STEPS):
        for parameter in parameters[: 2 if step < 2 else 3]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return parameters, optimizer


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW"])
def test_its_steps_and_states_are_those_of_bitsandbytes(kind: str) -> None:
    import torch

    (wanted, theirs), (found, ours) = (trained(kind, ours=one) for one in (False, True))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
        assert theirs.state[other].keys() == ours.state[one].keys()
    assert type(ours).__name__ == kind
    again = trained(kind, ours=True)[1]
    again.load_state_dict(ours.state_dict())


def test_it_waits_in_its_first_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.optim import optimizer

    waited: list[Any] = []
    monkeypatch.setattr(optimizer, "sync_gpu", waited.append)
    trained("AdamW8bit", ours=True)
    assert len(waited) == 2
    trained("AdamW8bit", ours=False)
    assert len(waited) == 2 + 2 * 2 + 3 * 2


def test_other_optimizers_are_left_alone() -> None:
    import torch

    from radeon_stack.workloads.finetune.optimizer import without_waiting

    plain = torch.optim.AdamW([torch.nn.Parameter(torch.randn(4))])
    assert type(without_waiting(plain)) is torch.optim.AdamW
