"""A LoRA run that goes on for minutes, for faults that a single product cannot show.

hipBLASLt has read past the end of small operands on gfx12 (RS-KI-001), which is harmless while the memory behind them
is mapped: isolated products passed by the million where training faulted (legacy-rocm-build 6647). What has
shown it is a short LoRA run of rank 16 with 1,024 tokens on the caching allocator (rocm-libraries 8909), with half or
more of the memory taken (legacy-rocm-build 6600: 50 % and 90 %). So layers of Llama-3.1-8B's shape fill the card here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from radeon_stack.workloads.capabilities.measure import device
from radeon_stack.workloads.capabilities.steps import Measured, Step, Steps

TOKENS, BATCH, ROWS = 1024, 1, 8
SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
CPU_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
VOCABULARY, CPU_LAYERS, CPU_TOKENS = 32000, 2, 32
LEARNING_RATE = 1e-3
LEAST_STEPS = 12  # the public reproducer's
REMAINDER = 3 << 30  # bytes for activations, gradients and the optimizer


def lora(seed: int, rank: int, minutes: int, share: int) -> Steps:
    """Steps `load` (layers until `share` percent of the memory is taken) and `train` (so long, and twelve steps)."""
    made: list[torch.nn.Module] = []

    def load() -> Measured:
        torch.manual_seed(seed)
        layers = _layers(share)
        config = LlamaConfig(
            **(SIZES if torch.cuda.is_available() else CPU_SIZES),
            num_hidden_layers=layers,
            vocab_size=VOCABULARY if torch.cuda.is_available() else 256,
            tie_word_embeddings=True,
        )
        with torch.device(device()):
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        made.append(get_peft_model(model, adapter).train())
        return Measured(remark=f"{layers} layers, {_taken()}")

    def train() -> Measured:
        losses, begun = [], time.monotonic()
        for loss in _losses(made[0], seed):
            losses.append(loss)
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss of step {len(losses)} is {loss}")
            if len(losses) >= LEAST_STEPS and time.monotonic() - begun >= 60 * minutes:
                break
        first, last = sum(losses[:ROWS]) / ROWS, sum(losses[-ROWS:]) / ROWS
        told = f"{len(losses)} steps of rank {rank}, loss {first:.3g} to {last:.3g}, {_taken()}"
        return Measured(last / first, 1.0, 1000 * (time.monotonic() - begun) / len(losses), told)

    yield Step("load", load)
    yield Step("train", train)


def _losses(model: torch.nn.Module, seed: int) -> Iterator[float]:
    """Step by step over the same few random rows: what is learnt is them."""
    sizes = model.get_base_model().config
    generator = torch.Generator().manual_seed(seed)
    tokens = TOKENS if torch.cuda.is_available() else CPU_TOKENS
    rows = torch.randint(sizes.vocab_size, (ROWS, BATCH, tokens), generator=generator).to(device())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    while True:
        for row in rows:
            optimizer.zero_grad(set_to_none=True)
            loss = model(input_ids=row, labels=row).loss
            loss.backward()
            optimizer.step()
            yield float(loss)  # waits for the device: a fault is met here


def _layers(share: int) -> int:
    """As many as take that share of the memory, less what training takes beside them."""
    if not torch.cuda.is_available():
        return CPU_LAYERS
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    kv = hidden // SIZES["num_attention_heads"] * SIZES["num_key_value_heads"]
    layer = 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    free, total = torch.cuda.mem_get_info()
    return max(1, int((min(free, total * share / 100) - REMAINDER) / layer))


def _taken() -> str:
    if not torch.cuda.is_available():
        return "on the CPU"
    return f"{torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory:.0%} of the memory"
