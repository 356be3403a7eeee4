"""The base model: loaded in 4 bit to train, its experts too, or in 8; in 16 bit to merge."""

from __future__ import annotations

import resource
from math import prod
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, AutoTokenizer

from radeon_stack.contracts.finetune import Quantization
from radeon_stack.contracts.options import AUTO
from radeon_stack.errors import CheckError
from radeon_stack.kernels import interface, quantizer
from radeon_stack.kernels.gating import use_gate
from radeon_stack.kernels.nf4 import NF4
from radeon_stack.workloads.finetune import fp8, kept, sharded
from radeon_stack.workloads.finetune.architectures import attention_for
from radeon_stack.workloads.finetune.bars import bars
from radeon_stack.workloads.finetune.sources import told_as
from radeon_stack.workloads.job import Job
from radeon_stack.workloads.ranks import rank

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def device() -> torch.device:
    """The accelerator this process sees (HIP answers to torch's name `cuda`), else the CPU."""
    return torch.device("cuda", rank().local) if torch.cuda.is_available() else torch.device("cpu")


def peak_memory() -> int:
    """Bytes: the most that tensors took on one accelerator, or this process's largest resident set on a CPU."""
    if torch.cuda.is_available():
        return max(torch.cuda.max_memory_allocated(card) for card in range(torch.cuda.device_count()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer, with something to pad with. UsageError when it has no chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_for_training(
    job: Job,
    folder: Path,
    quantization: Quantization,
    dtype: torch.dtype,
    attention: str = AUTO,
    *,
    parallel: str = "none",
) -> Any:
    """The frozen base on the device, linear layers and experts in NF4, or in FP8. Attention nobody chose is sdpa.

    parallel: `train.parallel`. "layers": its layers over all GPUs that this process sees, which are the chosen ones;
    "sharded": this process's share of each layer, with all processes at once.
    """
    # What is kept is written whole, and what was kept is read whole.
    share = (job.rank.number, job.rank.count) if parallel == "sharded" and not quantization.keep else None
    config = quantization_config(quantization, dtype, share)
    packed = kept.folder_of(job, folder, quantization, str(dtype)) if config and quantization.keep else None
    again = packed is not None and packed.is_dir()
    # A packed one has its own configuration; None would be taken for there being none.
    asked = {} if again or config is None else {"quantization_config": config}
    asked |= fp8.arguments(folder, quantization)
    with bars(job, "load"):
        model = AutoModelForCausalLM.from_pretrained(
            packed if again else folder,
            dtype=dtype,
            **asked,
            device_map="balanced" if parallel == "layers" else {"": device()},
            attn_implementation=attention_for(folder, attention),
        )
    if packed is not None and not again and job.rank.first:
        kept.keep(job, model, packed)
    model = ready(model, quantization)
    if parallel == "sharded":
        job.fact("shares", sharded.share_out(model))
    return model


def quantization_config(
    quantization: Quantization, dtype: torch.dtype, share: tuple[int, int] | None = None
) -> quantizer.Nf4Config | None:
    """What `from_pretrained` is to do with the weights; None: nothing. `share`: the part of them that stays."""
    if quantization.kind != "nf4":
        return None
    quantizer.register()
    experts = quantization.experts == "nf4"
    return quantizer.Nf4Config(double=quantization.double, compute=dtype, experts=experts, share=share)


def ready(model: Any, quantization: Quantization) -> Any:
    """A model as it was loaded, with our experts and fit for training. CheckError when not all was quantised."""
    if any(interface.is_experts(module) for module in model.modules()):
        interface.register()
        packed = quantization.kind == "nf4" and quantization.experts == "nf4"
        model.set_experts_implementation(interface.PACKED if packed else interface.GROUPED)
        use_gate(model)
    keep_trainable_layout(model)
    check_quantized(model, quantization)
    return model


def load_16bit(job: Job, folder: Path, dtype: torch.dtype, stage: str, *, on: torch.device) -> Any:
    """The model of a folder in 16 bit."""
    with bars(job, stage):
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": on}, attn_implementation=attention_for(folder, AUTO)
        )


def keep_trainable_layout(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    A forward pass in eval mode without gradients (such as sampling before training) repacks each layer for good, and
    the repacked product has no backward: gradients to everything below it are dropped, with no more than a warning
    (bitsandbytes 0.50.2, `Linear4bit.forward` and `matmul_4bit`). tests/work/test_training.py shows it.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantized(model: torch.nn.Module) -> dict[str, int]:
    """Values in 4 bit: each linear layer's weight and each experts' matrix, by its name."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit):
            found[f"{path}.weight"] = module.in_features * module.out_features
            continue
        for name in interface.matrix_names(module) if interface.is_experts(module) else ():
            if isinstance(weight := interface.experts_weight(module, name), NF4):
                found[f"{path}.{name}"] = prod(weight.shape)
        for name, own in module.named_parameters(recurse=False):
            if isinstance(own, Params4bit) and own.quant_state is not None:  # unsloth's experts
                found[f"{path}.{name}"] = prod(own.quant_state.shape)
    return found


def check_quantized(model: torch.nn.Module, quantization: Quantization) -> None:
    """CheckError when 4-bit loading passed over what it was to quantise: large models would run out of memory later."""
    if quantization.kind != "nf4":
        return
    found = quantized(model)
    for path, module in model.named_modules():
        names = interface.matrix_names(module) if interface.is_experts(module) else ()
        left = [f"{path}.{name}" for name in names if f"{path}.{name}" not in found]
        if quantization.experts == "nf4" and left:
            raise CheckError(f"{left[0]} is still in 16 bit", where="config.quantization.experts")
    if not found:
        raise CheckError("4-bit loading quantised nothing", where="config.quantization.kind")


def describe(model: Any, folder: Path, source: str) -> dict[str, Any]:
    """The facts of a loaded model: class, parameters (of the unpacked model) by kind, and what they take in memory."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    small = quantized(inner)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    eight = fp8.facts(inner)
    floats = {name: p.numel() for name, p in model.named_parameters() if p.is_floating_point()}
    half = sum(count for name, count in floats.items() if name.rpartition(".")[2] not in sharded.BYTES) - trainable
    half -= eight.get("parameters_8bit", 0) + eight.get("scales_8bit", 0)
    total = sum(small.values()) + eight.get("parameters_8bit", 0) + half + trainable
    experts = [module for module in inner.modules() if interface.is_experts(module)]
    return {
        "class": type(inner).__name__,
        "attention": inner.config._attn_implementation,
        "experts": inner.config._experts_implementation if experts else None,
        "source": told_as(source, folder),
        "parameters": total,
        "trainable": trainable,
        "trainable_percent": round(100 * trainable / total, 3),
        "quantized_parameters": sum(small.values()),
        "quantized_experts": sum(count for name, count in small.items() if ".experts." in name),
        "quantized_tensors": len(small),
        "half_parameters": half,
        "dtype": str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch."),
        "memory_bytes": memory(model),
        **eight,
    }


def memory(model: torch.nn.Module) -> int:
    """Bytes of all parameters in this process, the scales of 4-bit ones included."""
    total = sum(map(sharded.held, model.parameters()))
    return total + sum(_bytes(state) for module in model.modules() for state in _states(module))


def _states(module: torch.nn.Module) -> list[Any]:
    """bitsandbytes' QuantStates of a module's own parameters, wherever it keeps them."""
    if isinstance(module, Linear4bit):
        found = [module.quant_state]
    else:  # unsloth's experts
        found = [getattr(weight, "quant_state", None) for weight in module.parameters(recurse=False)]
    for steps in getattr(module, "parametrizations", {}).values():
        found += [getattr(step, "quant_state", None) for step in steps]
    return [state for state in found if state is not None]


def _bytes(state: Any) -> int:
    """Of a bitsandbytes QuantState: scales, and the scales' own."""
    nested = _bytes(state.state2) if state.nested else 0
    return int(sharded.held(state.absmax) + state.code.nbytes) + nested
