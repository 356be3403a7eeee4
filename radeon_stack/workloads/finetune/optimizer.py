"""bitsandbytes' optimizers, without their waiting for the device.

Its step (0.50.2, `Optimizer8bit.step`) calls `torch.cuda.synchronize()` after every parameter: with an adapter on each
of Llama-8B's layers 448 times, 57 of a step's 704 ms on an H200, in which the host can prepare nothing. Only paged
states, which move between memories by themselves, want it, and theirs is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit


class _Unwaiting(Optimizer8bit):  # type: ignore[misc, unused-ignore]
    """Its step, parameter by parameter, on the stream that everything is on."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self.is_paged or not self.initialized or closure is not None:
            return super().step(closure)
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, number, place)
                self.update_step(group, parameter, number, place)
        return None


def without_waiting(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer, with the same state; any but bitsandbytes' as it is."""
    own = type(optimizer)
    if isinstance(optimizer, Optimizer8bit) and not isinstance(optimizer, _Unwaiting):
        optimizer.__class__ = type(own.__name__, (_Unwaiting, own), {"__module__": own.__module__})
    return optimizer
