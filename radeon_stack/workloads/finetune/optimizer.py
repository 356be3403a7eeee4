"""bitsandbytes' 8-bit optimizers, many parameters at a time, and without their waiting for the device.

Its step (0.50.2, `Optimizer8bit.step`) launches a kernel a parameter, and calls `torch.cuda.synchronize()` after each:
with an adapter on each of Llama-8B's layers 448 times, in which the host can prepare nothing. Only paged states, which
move between memories by themselves, want it, and theirs is kept. Here parameters and gradients are copied one behind
the other first, and 11 launches do. Blocks of values that share a scale stay what they were, so states and steps are
bitsandbytes' to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from bitsandbytes.functional import optimizer_update_8bit_blockwise
from bitsandbytes.optim.optimizer import Optimizer2State, Optimizer8bit
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten
from torch._utils import _unflatten_dense_tensors as unflatten

BLOCK = 256  # values that share a scale of a state: bitsandbytes' own
AT_ONCE = 1 << 24  # values: of so many a copy is made
STATES = ("state1", "state2", "absmax1", "absmax2")

Members = tuple[Tensor, ...]


class _Unwaiting(Optimizer8bit):  # type: ignore[misc, unused-ignore]
    """Its step, on the stream that everything is on."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self.is_paged or not self.initialized or closure is not None:
            return super().step(closure)
        for number, group in enumerate(self.param_groups):
            together: dict[Any, list[Tensor]] = {}
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, number, place)
                if self._goes_with_others(parameter):
                    kind = (parameter.device, parameter.dtype, parameter.grad.dtype, self.state[parameter]["step"])
                    together.setdefault(kind, []).append(parameter)
                else:
                    self.update_step(group, parameter, number, place)
            for parameters in together.values():
                for members in _portions(parameters):
                    self._update_together(self.get_config(number, 0, group), members)
        return None

    def _goes_with_others(self, parameter: Tensor) -> bool:
        state, own = self.state[parameter], type(self)
        return (
            issubclass(own, Optimizer2State)
            and (own.init_state, own.update_step) == (Optimizer2State.init_state, Optimizer2State.update_step)
            and state["state1"].dtype == torch.uint8
            and parameter.numel() % BLOCK == 0
            and parameter.is_contiguous()
            and "unorm_vec" not in state
            and not (self.mng.pid2config or self.mng.index2config)  # settings of a parameter's own
        )

    def _update_together(self, config: dict[str, Any], members: Members) -> None:
        states = [self.state[one] for one in members]
        flat = self._flat_states(members, states)
        values, gradients = flatten(members), flatten([one.grad for one in members])
        for state in states:
            state["step"] += 1
        first, second, *third = config["betas"]
        optimizer_update_8bit_blockwise(
            self.optimizer_name, gradients, values, flat["state1"], flat["state2"],
            first, second, third[0] if third else 0.0, config["alpha"], config["eps"], states[0]["step"], config["lr"],
            states[0]["qmap1"], states[0]["qmap2"], flat["absmax1"], flat["absmax2"], config["weight_decay"],
            gnorm_scale=1.0, skip_zeros=config["skip_zeros"],
        )  # fmt: skip
        torch._foreach_copy_(list(members), list(unflatten(values, members)))

    def _flat_states(self, members: Members, states: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One behind the other, of which each parameter's own are views; as long as nobody replaces those."""
        kept: dict[Members, tuple[dict[str, Tensor], tuple[Tensor, ...]]]
        kept = self.__dict__.setdefault("_together", {})
        flat, views = kept.get(members, ({}, ()))
        if views and all(state["state1"] is view for state, view in zip(states, views, strict=True)):
            return flat
        flat = {name: flatten([state[name] for state in states]) for name in STATES}
        for name, whole in flat.items():
            for state, view in zip(states, unflatten(whole, [one[name] for one in states]), strict=True):
                state[name] = view
        kept[members] = flat, tuple(state["state1"] for state in states)
        return flat


def _portions(parameters: list[Tensor]) -> Iterator[Members]:
    """As many at a time as come to AT_ONCE values, or one that has more."""
    portion: list[Tensor] = []
    for parameter in parameters:
        if portion and sum(one.numel() for one in portion) + parameter.numel() > AT_ONCE:
            yield tuple(portion)
            portion = []
        portion.append(parameter)
    if portion:
        yield tuple(portion)


def without_waiting(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer, with the same state; any but bitsandbytes' as it is."""
    own = type(optimizer)
    if isinstance(optimizer, Optimizer8bit) and not isinstance(optimizer, _Unwaiting):
        optimizer.__class__ = type(own.__name__, (_Unwaiting, own), {"__module__": own.__module__})
    return optimizer
