"""Each card holds its share of the frozen base: torch's FSDP2 over packed weights.

A decoder layer's packed bytes are gathered before it computes, forward and on the way back, the next layer's meanwhile,
and are given back after: two all-gathers a layer and pass, of half a byte a value. Embeddings, head and adapters are
whole in each process; the adapters' gradients are averaged as in data parallelism, so checkpoints, clipping and the
saved adapter are that one's.

FSDP2 takes uint8 parameters as they are (torch 2.13; older ones do not: pytorch issue 177844). What bitsandbytes keeps
as attributes beside them it does not know: it puts parameters of its own in their place. So these attributes are copied
over, and absmax, an eighth of the packed bytes in float32, is made a parameter, that it is shared out too.

transformers' own loading into FSDP2 (`DistributedConfig(fsdp_size=2)`, 5.23) would have each process pack its rows of
a matrix as if they were all; the first forward pass ends with "start (0) + length (1024) exceeds dimension size (32)".
Here each process packs whole matrices and keeps its part of each (`Nf4Config.share`); then layer by layer they are
gathered once and handed to FSDP2. So no card ever holds the whole of an NF4 base. One that is not packed while it is
read (FP8, 16 bit, what `quantization.keep` kept) is whole on each card until it has been loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from radeon_stack.errors import MachineError, UsageError

WHERE = "config.train.parallel"
SCALES = "absmax"  # the name of the parameter that a packed weight's absmax becomes


@dataclass(frozen=True)
class Packed:
    """A matrix in 4 bit: the parameter `holder.name`, bitsandbytes' `state` of it, and whose parameter absmax becomes.

    `attributes`: what bitsandbytes keeps on the parameter itself.
    """

    holder: nn.Module
    name: str
    state: Any
    beside: nn.Module
    attributes: dict[str, Any]

    @property
    def weight(self) -> Any:
        return getattr(self.holder, self.name)

    @property
    def nbytes(self) -> int:
        """Of the packed values, whether they are here or not."""
        return prod(self.state.shape) // 2


def share_out(model: Any) -> dict[str, int]:
    """Leave each process its share of the decoder layers' frozen weights; all processes call it together, once.

    Returns {"processes", "layers", "layers_bytes" (of all of them, whole), "share_bytes" (what stays here of them)}.
    UsageError where there is but one process, and for a model without decoder layers of transformers' kind.
    """
    if not dist.is_initialized():
        raise UsageError(
            "the base is shared out among processes, and there is one",
            where=WHERE,
            remedy="several cards (--gpus 0,1) or, on the CPU, train.processes=2; or leave it out",
        )
    inner = model.base_model
    layers = [module for module in inner.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no decoder layers that can be told", where=WHERE, remedy="leave it out"
        )
    model.requires_grad_(False)
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    whole = sum(_share_layer(layer, mesh) for layer in layers)
    for one in packed_in(model):  # outside the layers
        if not isinstance(one.weight, DTensor):
            _make_whole(one)
    # Of the root itself nothing is shared out; by it, the layers know of each other and gather ahead.
    fully_shard(inner, mesh=mesh, ignored_params={one for one in inner.parameters() if not isinstance(one, DTensor)})
    share = sum(held(parameter) for layer in layers for parameter in layer.parameters())
    return {
        "processes": dist.get_world_size(),
        "layers": len(layers),
        "layers_bytes": whole,
        "share_bytes": share,
    }


def held(parameter: Tensor) -> int:
    """Bytes of a parameter that are in this process."""
    return parameter.to_local().nbytes if isinstance(parameter, DTensor) else parameter.nbytes


def packed_in(module: nn.Module) -> Iterator[Packed]:
    """The linear layers' weights and the experts' matrices that bitsandbytes has packed."""
    for one in module.modules():
        if isinstance(one, Linear4bit) and one.quant_state is not None:
            yield Packed(one, "weight", one.quant_state, one, dict(vars(one.weight)))
        for matrix in getattr(one, "parametrizations", {}).values():
            if len(matrix) == 1 and hasattr(matrix[0], "quant_state"):
                yield Packed(matrix, "original", matrix[0].quant_state, matrix[0], {})


def _share_layer(layer: nn.Module, mesh: Any) -> int:
    """Hand a layer to FSDP2; returns the bytes that it has when it is whole. MachineError where torch is too old."""
    packed = tuple(packed_in(layer))
    for one in packed:
        _make_whole(one)
        one.beside.register_parameter(SCALES, nn.Parameter(one.state.absmax, requires_grad=False))
    whole = sum(parameter.nbytes for parameter in layer.parameters())
    try:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    except RuntimeError as error:
        if "can require gradients" not in str(error):
            raise
        raise MachineError(
            f"torch {torch.__version__} does not share out weights in 4 bit (pytorch issue 177844)",
            where=WHERE,
            remedy="an image with a newer torch (it was tried with 2.13), train.parallel=data or layers",
        ) from error
    _complete(packed)
    # FSDP2's own hook comes before it: a layer is whole by then.
    layer.register_forward_pre_hook(partial(_completed, packed))
    return whole


def _make_whole(one: Packed) -> None:
    """A matrix of which each process has kept a part, in the first place of all of them."""
    part = one.weight.data.view(-1)
    if part.numel() == one.nbytes:
        return
    parts = part.new_empty(dist.get_world_size() * part.numel())
    dist.all_gather_into_tensor(parts, part)
    one.weight.data = parts[: one.nbytes].view(-1, 1)


def _completed(packed: Sequence[Packed], *_: Any) -> None:
    """As a hook: nothing about a layer's arguments changes."""
    _complete(packed)


def _complete(packed: Sequence[Packed]) -> None:
    """Give the parameters that are now in the place of bitsandbytes' what those have, and its states their absmax."""
    for one in packed:
        one.state.absmax = getattr(one.beside, SCALES)
        weight = one.weight
        if one.attributes and "quant_state" not in vars(weight):
            vars(weight).update(one.attributes)
