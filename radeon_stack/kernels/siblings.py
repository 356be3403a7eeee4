"""Layers that read one tensor, and add up its gradient in their own products.

Autograd has each of them make a gradient, and adds these up: for each after the first two reads and a write of
[rows, columns], and a new tensor. Here a layer hands its rows on beside its result, and the next layer that is given
the same tensor reads them from there. On the way back the last layer's gradient so comes to the one before it, which
adds its products to it in place, and what the first hands back is the sum: rounded once less a layer, and added in the
layers' order, which is the same in every run. The layers are one graph then: to go back from one and later from
another takes `retain_graph`.

The rows hang on the tensor, and go with it. There is no circle: from them the graph leads back to what the tensor was
made of, and to the tensor itself only where that is a leaf, which gets none; or where torch's checkpoint keeps it to
compute from, until somebody goes back.
"""

from __future__ import annotations

from torch import Tensor

HANDED = "radeon_handed"  # a tensor's attribute: its version, and its rows as a layer handed them on


def rows_of(x: Tensor) -> Tensor:
    """x, […, columns], as [rows, columns]: those that were handed on, if x was not written over since."""
    handed = x.__dict__.get(HANDED)
    if handed is not None and handed[0] == x._version:
        rows: Tensor = handed[1]
        return rows
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def hand_on(x: Tensor, rows: Tensor) -> None:
    """For the next layer that is given x: its rows, [rows, columns], as a result of this one."""
    if not x.is_leaf:
        x.__dict__[HANDED] = x._version, rows
