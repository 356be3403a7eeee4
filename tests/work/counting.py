"""Counts every byte that tensors take on this machine, as an allocator would."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counting(TorchDispatchMode):
    """`peak`: the most bytes that storages made inside took at once; those of `known` tensors are not counted."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or key in self._known:
            return
        self._live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def peak_of_a_step(model: Any, batch: int, length: int, rows: int = 1) -> int:
    """Bytes of activations, and of what is made on the way, of one forward and backward pass with TRL's loss.

    `rows`: so many share each sequence.
    """
    words = torch.randint(0, model.config.vocab_size, (batch, length))
    positions = torch.arange(length // rows).repeat(batch, rows)
    mask = torch.ones_like(words)
    apart = {"attention_mask": mask} if rows == 1 else {"position_ids": positions, "use_cache": False}
    counting = Counting([*model.parameters(), *model.buffers(), words, mask, positions])
    with counting:
        with torch.autocast("cpu", torch.bfloat16):
            told = model(input_ids=words, labels=words, fused_lm_head=True, **apart)
            loss = -told.log_probs.sum() / length
        loss.backward()
    return counting.peak
