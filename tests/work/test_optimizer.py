"""bitsandbytes' optimizers take the same steps without waiting for the device after each parameter."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.work
STEPS = 4


def trained(kind: str, *, ours: bool) -> tuple[list[Any], Any]:
    """Parameters and optimizer after some steps."""
    import bitsandbytes
    import torch

    from radeon_stack.workloads.finetune.optimizer import without_waiting

    torch.manual_seed(7)
    # Many together, one that is too small for 8 bit, one whose last block of 256 is not full, one that comes later.
    sizes = (96, 128, 70, 3, 65, 64)
    parameters = [torch.nn.Parameter(torch.randn(size, 64)) for size in sizes]
    groups = [{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:], "weight_decay": 0.0}]
    optimizer: Any = getattr(bitsandbytes.optim, kind)(groups, lr=1e-2)
    if ours:
        optimizer = without_waiting(optimizer)
    for step in range(STEPS):
        for parameter in parameters[: 5 if step < 2 else 6]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return parameters, optimizer


@pytest.mark.parametrize("at_once", [1 << 24, 96 * 64 + 1])
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW"])
def test_its_steps_and_states_are_those_of_bitsandbytes(
    kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from radeon_stack.workloads.finetune import optimizer

    monkeypatch.setattr(optimizer, "AT_ONCE", at_once)
    (wanted, theirs), (found, ours) = (trained(kind, ours=one) for one in (False, True))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
        assert theirs.state[other].keys() == ours.state[one].keys()
        for name, value in theirs.state[other].items():
            assert torch.equal(torch.as_tensor(ours.state[one][name]), torch.as_tensor(value)), name
    assert type(ours).__name__ == kind


def test_resumed_from_its_state_it_goes_on_as_bitsandbytes_does() -> None:
    import torch

    (wanted, theirs), (found, ours) = (trained("AdamW8bit", ours=one) for one in (False, True))
    again, resumed = trained("AdamW8bit", ours=True)
    resumed.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for one, other in zip(again, found, strict=True):
            one.copy_(other)
    for _ in range(2):
        for one, other in zip(again, wanted, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        resumed.step()
        theirs.step()
    assert all(torch.equal(one, other) for one, other in zip(again, wanted, strict=True))


def test_many_parameters_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from radeon_stack.workloads.finetune import optimizer

    sizes: list[int] = []
    update = vars(optimizer)["optimizer_update_8bit_blockwise"]

    def counted(name: str, gradients: Any, *rest: Any, **named: Any) -> None:
        sizes.append(gradients.numel())
        update(name, gradients, *rest, **named)

    monkeypatch.setattr(optimizer, "optimizer_update_8bit_blockwise", counted)
    trained("AdamW8bit", ours=True)
    # After the first step, which is bitsandbytes' own: the two of the first group; the last comes later, by itself.
    assert sizes == [(96 + 128) * 64] + [(96 + 128) * 64, 64 * 64] * 2


def test_it_waits_in_its_first_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.optim import optimizer

    waited: list[Any] = []
    monkeypatch.setattr(optimizer, "sync_gpu", waited.append)
    trained("AdamW8bit", ours=True)
    assert len(waited) == 5
    trained("AdamW8bit", ours=False)
    assert len(waited) == 5 + 2 * 5 + 2 * 6


def test_other_optimizers_are_left_alone() -> None:
    import torch

    from radeon_stack.workloads.finetune.optimizer import without_waiting

    plain = torch.optim.AdamW([torch.nn.Parameter(torch.randn(4))])
    assert type(without_waiting(plain)) is torch.optim.AdamW
