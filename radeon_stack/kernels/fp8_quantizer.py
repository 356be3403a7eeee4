"""Linear layers in FP8 while a checkpoint is loaded, to be trained through: a quantizer of transformers' own kind.

`from_pretrained(folder, quantization_config=Fp8Config())`, after `register()`, rounds a 16-bit checkpoint tensor by
tensor as it is read. A checkpoint that is in FP8 already is given as a model's config whose `quantization_config` is
`Fp8Config(layers=…).to_dict()`. transformers' own quantizers for those decompress the model to 16 bit, or need an
NVIDIA card, kernels from a hub or a package of the format's.

Needs transformers 5.17 or newer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightRenaming
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from radeon_stack.errors import UsageError
from radeon_stack.kernels.fp8 import E4M3, Fp8Linear, Way, quantize

METHOD = "radeon_fp8"


def register() -> None:
    """Make the method known to transformers, as often as one likes."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, Fp8Config)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, Fp8Quantizer)


class Fp8Config(QuantizationConfigMixin):
    """layers: of a checkpoint in FP8, its linear layers, each with the shape of its scales; None: it is in 16 bit.

    way: how products are made (`radeon_stack.kernels.fp8.Way`).
    """

    def __init__(self, layers: Mapping[str, Sequence[int]] | None = None, way: Way = "auto", **_: Any) -> None:
        self.quant_method = METHOD
        self.layers = None if layers is None else {name: list(shape) for name, shape in layers.items()}
        self.way = way


class Fp8Quantizer(HfQuantizer):
    """Puts `Fp8Linear` in the place of linear layers; lm_head and what a checkpoint has in 16 bit stay as they are."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        layers = self.quantization_config.layers
        if layers is None:
            kept = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
            chosen = [name for name in linear if not any(name == one or name.endswith(f".{one}") for one in kept)]
        else:
            chosen = list(layers)
        for name in chosen:
            if name not in linear:
                raise UsageError(
                    f"{name} is in FP8 and no linear layer of {type(model).__name__}",
                    remedy="a checkpoint in 16 bit, which is rounded while it is read",
                )
            model.set_submodule(name, self._layer(linear[name], layers and layers[name]))

    def _layer(self, linear: nn.Linear, scale_shape: Sequence[int] | None) -> Fp8Linear:
        layer = Fp8Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            scale_shape=(scale_shape[0], scale_shape[1]) if scale_shape else None,
            way=self.quantization_config.way,
        )
        if not scale_shape:
            # transformers 5.17 casts to what the layer has before the tensor is quantised: that must not be 8 bit yet.
            layer.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        return layer

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        path, name = param_name.rpartition(".")[::2]
        return not self.pre_quantized and name == "weight" and isinstance(model.get_submodule(path), Fp8Linear)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        return 1 if self.param_needs_quantization(model, param_name) else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        """What is done with a tensor that needs it."""
        return _Quantize()

    def get_weight_conversions(self) -> list[Any]:
        """Block-wise checkpoints call their scales inverse; weights are multiplied with them all the same."""
        return [WeightRenaming(r"\.weight_scale_inv$", ".weight_scale")] if self.pre_quantized else []

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        layers = ((name, module) for name, module in model.named_modules() if isinstance(module, Fp8Linear))
        for name, layer in layers:
            layer.requires_grad_(False)
            layer.weight_scale.data = layer.weight_scale.data.float()  # some have them in bf16
            if layer.weight.dtype != E4M3:
                raise UsageError(f"{name}.weight was not found in the checkpoint")
            if not layer.weight_scale.isfinite().all():
                raise UsageError(
                    f"{name}.weight holds NaN or infinity: the checkpoint is damaged, or was never right",
                    remedy="fetch it again",
                )
        return model

    def is_serializable(self, **_: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """A 16-bit weight into its codes and scales; the 16-bit one is let go of before the next is read."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        done: dict[str, Any] = {}
        for name, value in input_dict.items():
            weight = quantize(value[0] if isinstance(value, list) else value)
            done |= {name: weight.codes, f"{name}_scale": weight.scale}
        return done
