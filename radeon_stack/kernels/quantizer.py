"""NF4 while a checkpoint is loaded, experts included: a quantizer of transformers' own kind.

`from_pretrained(folder, quantization_config=Nf4Config())`, after `register()`. Linear layers become bitsandbytes'
Linear4bit, by transformers' own quantizer. Experts, which that one leaves in 16 bit, are packed one by one as they are
read: no more than one layer's matrix is there in 16 bit. What results are bitsandbytes' parametrised parameters, which
`interface.py` reads; `save_pretrained` writes them packed, and `from_pretrained` reads them back.

Needs transformers 5.17 or newer and bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from radeon_stack.errors import UsageError
from radeon_stack.kernels.interface import expert_matrices
from radeon_stack.kernels.nf4 import BLOCK, NESTED_BLOCK

METHOD = "radeon_nf4"
# What bitsandbytes saves of a packed tensor beside its bytes (QuantState.as_dict).
STATE = ("nested_absmax", "nested_quant_map", "quant_map", "absmax", "quant_state.bitsandbytes__nf4")


def register() -> None:
    """Make the method known to transformers, as often as one likes."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, Nf4Config)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, Nf4Quantizer)


class Nf4Config(BitsAndBytesConfig):
    """NF4 in blocks of 64 for linear layers and experts.

    double: scales are quantised too (0.516 bytes a value instead of 0.5625; the experts' kernels are quicker without).
    compute: what linear layers compute in; experts compute in what they were saved in. experts: whether they are
    packed. skip: modules left in 16 bit. share: (number, count): of each matrix that is packed while it is read, only
    that part of its bytes stays (`part`), and whoever asked for it puts the parts together again; None: all of it.
    """

    def __init__(
        self,
        double: bool = False,
        compute: torch.dtype | str = torch.bfloat16,
        experts: bool = True,
        skip: Sequence[str] | None = None,
        share: tuple[int, int] | None = None,
        **_: Any,
    ) -> None:
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=None if skip is None else list(skip),
        )
        self.experts = experts
        self.share = share
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        """What config.json has: `load_in_4bit` would have transformers take it for bitsandbytes' own."""
        return {
            "quant_method": METHOD,
            "double": self.bnb_4bit_use_double_quant,
            "compute": str(self.bnb_4bit_compute_dtype).removeprefix("torch."),
            "experts": self.experts,
            "skip": self.llm_int8_skip_modules,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class Nf4Quantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer for bitsandbytes, which knows experts as well."""

    def __init__(self, quantization_config: Nf4Config, **more: Any) -> None:
        super().__init__(quantization_config, **more)
        self.states: dict[str, QuantState] = {}
        self._experts: dict[str, nn.Module] = {}

    def __deepcopy__(self, _: Any) -> Nf4Quantizer:
        # transformers copies a converter for each tensor it makes, and with it the quantizer that its operation knows.
        return self

    def _process_model_before_weight_loading(self, model: nn.Module, device_map: Any = None, **more: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map=device_map, **more)
        if not self.quantization_config.experts:
            return
        kept = self.modules_to_not_convert or []
        for path, module in model.named_modules():
            if any(path == name or path.endswith(f".{name}") for name in kept):
                continue
            for name in expert_matrices(module):
                width = getattr(module, name).shape[-1]
                if width % BLOCK:
                    raise UsageError(
                        f"{path}.{name}: rows of {width} values are no whole blocks of {BLOCK}",
                        remedy="keep these experts in 16 bit: --set quantization.experts=none",
                    )
                self._experts[f"{path}.{name}"] = module

    def param_needs_quantization(self, model: nn.Module, param_name: str, **more: Any) -> bool:
        """Linear layers' weights, and experts' matrices."""
        return param_name in self._experts or bool(super().param_needs_quantization(model, param_name, **more))

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes of a value as it stays here: transformers takes the memory for all of them before it reads."""
        size = float(super().param_element_size(model, param_name, param))
        share = self.quantization_config.share
        return size / share[1] if share and self.param_needs_quantization(model, param_name) else size

    def get_quantize_ops(self) -> ConversionOps:
        """What is done with a tensor that needs it."""
        return _Quantize(self, super().get_quantize_ops())

    def update_weight_conversions(self, weight_conversions: list[Any], *more: Any) -> list[Any]:
        """Experts that a checkpoint has one by one are packed one by one, instead of merged and then packed."""
        updated = super().update_weight_conversions(weight_conversions, *more)
        return updated if self.pre_quantized else [self._one_by_one(one) for one in updated]

    def get_weight_conversions(self) -> list[Any]:
        """For what was saved packed: a tensor with its state, of experts and of linear layers."""
        linear = super().get_weight_conversions()
        if not self.pre_quantized:
            return list(linear)
        names = sorted({path.rpartition(".")[2] for path in self._experts})
        return [*(_reads(f".{name}", self) for name in names), *linear]

    def _one_by_one(self, converter: Any) -> Any:
        """A converter that stacks experts along the first dimension packs them instead; others are left alone."""
        if not isinstance(converter, WeightConverter):
            return converter
        kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
        merged = kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
        target = converter.target_patterns[0].rpartition(".")[2]
        if not merged or not any(path.endswith(f".{target}") for path in self._experts):
            return converter
        packing = deepcopy(converter)
        packing.operations = [_Pack(self)]
        return packing

    def _process_model_after_weight_loading(self, model: nn.Module, **more: Any) -> nn.Module:
        for path, state in self.states.items():
            module, name = self._experts[path], path.rpartition(".")[2]
            packed = getattr(module, name)
            replace_parameter_4bit_prequantized(module, name, state.as_dict(packed=True), packed.device)
        missed = sorted(set(self._experts) - set(self.states))
        self.states.clear()
        if missed:
            raise UsageError(f"{missed[0]} was not found in the checkpoint, or not whole ({len(missed)} such)")
        # Saved as they are: there are no experts in 16 bit to take apart again.
        model._weight_conversions = []
        return super()._process_model_after_weight_loading(model, **more)


def pack(parts: Sequence[Sequence[Tensor]], *, double: bool) -> tuple[Tensor, QuantState]:
    """Experts as bitsandbytes' quantize_4bit has them when they are stacked, to the bit; packed one at a time.

    parts: for each matrix that is concatenated by rows (gate, up), its [rows, columns] of every expert. Consumed: lists
    are emptied as they are packed. Returns uint8 [values / 2, 1] and the state of [experts, rows of all, columns].
    """
    experts, first = len(parts[0]), parts[0][0]
    if any(len(part) != experts for part in parts):
        raise UsageError(f"there are {', '.join(str(len(part)) for part in parts)} experts' parts: as many are needed")
    rows, columns, dtype = sum(part[0].shape[0] for part in parts), first.shape[-1], first.dtype
    values = rows * columns
    packed = torch.empty(experts * values // 2, 1, dtype=torch.uint8, device=first.device)
    absmax = torch.empty(experts * values // BLOCK, dtype=torch.float32, device=first.device)
    place, code = 0, None
    for matrix in _in_order(parts):
        few, state = quantize_4bit(matrix, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
        packed[place // 2 : (place + matrix.numel()) // 2] = few
        absmax[place // BLOCK : (place + matrix.numel()) // BLOCK] = state.absmax
        place, code = place + matrix.numel(), state.code
    shape = torch.Size((experts, rows, columns))
    whole: dict[str, Any] = {"shape": shape, "dtype": dtype, "blocksize": BLOCK, "code": code, "quant_type": "nf4"}
    if not double:
        return packed, QuantState(absmax=absmax, **whole)
    offset = absmax.mean()
    small, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    return packed, QuantState(absmax=small, offset=offset, state2=nested, **whole)


def part(packed: Tensor, number: int, count: int) -> Tensor:
    """One of `count` parts of a tensor's values in their order, as a copy: all as long, the last ones end in zeros."""
    flat = packed.reshape(-1)
    each = -(-flat.numel() // count)
    mine = flat.new_zeros(each)
    own = flat[number * each : (number + 1) * each]
    mine[: own.numel()] = own
    return mine


def _in_order(parts: Sequence[Any]) -> Iterator[Tensor]:
    """Expert by expert, each with its parts; a list's tensor is let go of when the next one is asked for."""
    for expert in range(len(parts[0])):
        for part in parts:
            matrix = part[expert]
            if isinstance(part, list):
                part[expert] = None
            yield matrix


class _Pack(ConversionOps):
    """A layer's experts, as the checkpoint has them, into one packed tensor."""

    def __init__(self, quantizer: Nf4Quantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Sequence[str], full_layer_name: str, **_: Any
    ) -> dict[str, Any]:
        parts = [input_dict.pop(pattern) for pattern in source_patterns if pattern in input_dict]
        return {full_layer_name: self.packed(full_layer_name, parts)}

    def packed(self, name: str, parts: Sequence[Any]) -> nn.Parameter:
        double = self.hf_quantizer.quantization_config.bnb_4bit_use_double_quant
        packed, self.hf_quantizer.states[name] = pack(parts, double=double)
        return nn.Parameter(packed, requires_grad=False)


class _Quantize(ConversionOps):
    """A tensor that is whole: experts are packed, unless that has been done, and linear layers left to the other."""

    def __init__(self, quantizer: Nf4Quantizer, linear: ConversionOps) -> None:
        self.hf_quantizer, self.linear = quantizer, linear

    def convert(self, input_dict: dict[str, Any], **more: Any) -> dict[str, Any]:
        done: dict[str, Any] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if name not in self.hf_quantizer._experts:
                done |= self.linear.convert({name: value}, **more)
            elif name in self.hf_quantizer.states:
                done[name] = tensor
            else:
                done[name] = _Pack(self.hf_quantizer).packed(name, [tensor])
        if share := self.hf_quantizer.quantization_config.share:
            for parameter in done.values():
                parameter.data = part(parameter.data, *share).view(-1, 1)
        return done


class _Unpack(ConversionOps):
    """A packed tensor of a saved model, with its state."""

    def __init__(self, quantizer: Nf4Quantizer, name: str) -> None:
        # By this attribute transformers knows that tensors are to be left in the dtype they were saved in.
        self.hf_quantizer, self.name = quantizer, name

    def convert(self, input_dict: dict[str, Any], full_layer_name: str, **_: Any) -> dict[str, Any]:
        tensors = {
            key.removesuffix("$"): value[0] if isinstance(value, list) else value for key, value in input_dict.items()
        }
        packed = tensors.pop(self.name, None)
        if packed is None or packed.dtype != torch.uint8 or full_layer_name not in self.hf_quantizer._experts:
            raise ValueError(f"{full_layer_name} is not packed")  # transformers tells of it, and of the tensor
        state = {key.removeprefix(f"{self.name}."): value for key, value in tensors.items()}
        self.hf_quantizer.states[full_layer_name] = QuantState.from_dict(state, device=packed.device)
        return {full_layer_name: nn.Parameter(packed, requires_grad=False)}


def _reads(name: str, quantizer: Nf4Quantizer) -> WeightConverter:
    # The first pattern that fits is taken, wherever in a key it does: a bias's name begins with its matrix's.
    return WeightConverter([*(f"{name}.{part}" for part in STATE), f"{name}$"], name, [_Unpack(quantizer, name)])
