"""Each card holds its share of the frozen base: torch's FSDP2 over packed weights.

A decoder layer's packed bytes are gathered before it computes, forward and on the way back, the next layer's meanwhile,
and are given back after: two all-gathers a layer and pass, of half a byte a value. Embeddings, head and adapters are
whole in each process; the adapters' gradients are averaged as in data parallelism, so checkpoints, clipping and the
saved adapter are that one's.

FSDP2 puts a parameter of its own in a packed weight's place, without what bitsandbytes keeps beside it; and torch until
lately took no uint8 into it (pytorch issue 177844; 2.13 does). So what it is handed are the same bytes, absmax's too,
as frozen float32 parameters beside the weights (`BYTES`), and the weights' own tensors are views of what it gathers:
bitsandbytes, PEFT and our kernels find everything where it was.

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
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from radeon_stack.errors import UsageError

WHERE = "config.train.parallel"
BYTES = ("packed_bytes", "absmax_bytes")  # the parameters that FSDP2 has of a packed weight
WORD = 4  # bytes of the float32 that they are handed over as


@dataclass(frozen=True)
class Packed:
    """A matrix in 4 bit: its parameter, bitsandbytes' `state` of it, and the module that gets its bytes' parameters."""

    weight: Any
    state: Any
    beside: nn.Module

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
        if not _is_shared(one):
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


def held(tensor: Tensor) -> int:
    """Bytes of a tensor that are in this process: its share, or nothing where what it is a view of is given back."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return int(min(own.nbytes, own.untyped_storage().nbytes()))


def packed_in(module: nn.Module) -> Iterator[Packed]:
    """The linear layers' weights and the experts' matrices that bitsandbytes has packed."""
    for one in module.modules():
        if isinstance(one, Linear4bit) and one.quant_state is not None:
            yield Packed(one.weight, one.quant_state, one)
        for matrix in getattr(one, "parametrizations", {}).values():
            if len(matrix) == 1 and hasattr(matrix[0], "quant_state"):
                yield Packed(matrix.original, matrix[0].quant_state, matrix[0])


def _share_layer(layer: nn.Module, mesh: Any) -> int:
    """Hand a layer to FSDP2; returns the bytes that it has when it is whole."""
    packed = tuple(packed_in(layer))
    for one in packed:
        _make_whole(one)
        for name, tensor in zip(BYTES, (one.weight.data, one.state.absmax), strict=True):
            one.beside.register_parameter(name, nn.Parameter(_as_words(tensor), requires_grad=False))
        _forget(one)
    whole = sum(map(held, layer.parameters()))
    fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params={one.weight for one in packed})
    # FSDP2's own hook comes before it: what it gathers is there by then.
    layer.register_forward_pre_hook(partial(_see, packed))
    return whole


def average_adapters(accelerator: Any) -> None:
    """Have accelerate give a shared-out model to DDP on GPUs too, for its adapters' gradients.

    On CPUs it does; on GPUs it refuses whatever has a DTensor (1.15). Those here are frozen, and DDP is told to leave
    them out (`ranks.leave_to_each_process`).
    """
    whole = accelerator.prepare_model

    def prepare_model(model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        if evaluation_mode or not accelerator.multi_device:
            return whole(model, device_placement, evaluation_mode)
        card, handler = accelerator.local_process_index, accelerator.ddp_handler
        inner = whole(model, device_placement, evaluation_mode=True)
        settings = handler.to_kwargs() if handler else {}
        outer = DistributedDataParallel(inner, device_ids=[card], output_device=card, **settings)
        outer._is_accelerate_prepared = True
        return outer

    accelerator.prepare_model = prepare_model


def put_away(model: nn.Module) -> None:
    """Before a model is moved (a trainer does, even to where it is): its views would be read, of what is given back."""
    for one in packed_in(model):
        if _is_shared(one):
            _forget(one)


def _forget(one: Packed) -> None:
    """Until the next forward pass looks at it."""
    one.weight.data, one.state.absmax = one.weight.data.new_empty(0), one.state.absmax.new_empty(0)


def _is_shared(one: Packed) -> bool:
    return hasattr(one.beside, BYTES[0])


def _make_whole(one: Packed) -> None:
    """A matrix of which each process has kept a part, from the parts of all of them."""
    part = one.weight.data.view(-1)
    if part.numel() == one.nbytes:
        return
    parts = part.new_empty(dist.get_world_size() * part.numel())
    dist.all_gather_into_tensor(parts, part)
    one.weight.data = parts[: one.nbytes].view(-1, 1)


def _as_words(tensor: Tensor) -> Tensor:
    """Its bytes as float32, [bytes / 4]: never computed with, zeros at the end where they do not come out even."""
    found = tensor.contiguous().view(-1).view(torch.uint8)
    return nn.functional.pad(found, (0, -found.numel() % WORD)).view(torch.float32)


def _see(packed: Sequence[Packed], *_: Any) -> None:
    """Have weights and absmax be views of what was gathered. Once: FSDP2 gathers into the same storage each time."""
    for one in packed:
        codes, scales = (getattr(one.beside, name).data for name in BYTES)
        if one.weight.data_ptr() == codes.data_ptr():
            continue
        one.weight.data = codes.view(torch.uint8)[: one.nbytes].view(-1, 1)
        one.state.absmax = scales.view(one.state.absmax.dtype)[: prod(one.state.shape) // one.state.blocksize]
