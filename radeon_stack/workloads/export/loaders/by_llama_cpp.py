"""llama.cpp, through its Python binding: a GGUF file and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np

from radeon_stack.workloads.export.loaders.reply import Pace, Reply, resident, to_perplexity, up_to_end

ALL_LAYERS = -1


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    reference = request["reference"]
    on_gpu = llama_cpp.llama_supports_gpu_offload()
    reply = Reply(f"llama.cpp, by llama-cpp-python {version('llama-cpp-python')}", "GPU" if on_gpu else "CPU")
    longest = max(map(len, reference["prompt_ids"]), default=0)
    model = _load(request, longest + max(request["greedy_tokens"], request["max_new_tokens"]) + 8)
    reply.end_ids = reference["end_ids"]
    if request["taught"]:
        reply.answers = [sampled(model, request, request["seed"] + number) for number in range(request["count"])]
    pace = Pace()
    for text, ids, first in zip(
        reference["prompt_texts"], reference["prompt_ids"], reference["first_ids"], strict=True
    ):
        reply.prompt_ids.append(model.tokenize(text.encode(), add_bos=False, special=True))
        found = pace.timed(lambda ids=ids: greedy(model, ids, request["greedy_tokens"], reply.end_ids))
        reply.greedy.append(up_to_end(found, reply.end_ids))
        reply.greedy_texts.append(model.detokenize(reply.greedy[-1], special=True).decode(errors="replace"))
        model.reset()
        model.eval(ids)
        likely = log_softmax(logits(model))
        reply.first_ids.append(first)
        reply.first_logprobs.append([float(likely[one]) for one in first])
    reply.memory = 0 if on_gpu else resident()
    reply.tokens_per_second = pace.tokens_per_second
    reply.text_ids = model.tokenize(request["text"].encode(), add_bos=False, special=False)
    model.close()
    reply.perplexity = perplexity(_load(request, len(reference["text_ids"]) + 8, every=True), reference["text_ids"])
    return reply.as_data()


def _load(request: Mapping[str, Any], context: int, *, every: bool = False) -> Any:
    """The model; every: logits of all positions are kept, as perplexity needs them."""
    return llama_cpp.Llama(
        request["model"],
        n_ctx=context,
        n_batch=context if every else 512,
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        n_gpu_layers=ALL_LAYERS,
        logits_all=every,
        seed=request["seed"],
        verbose=False,
    )


def sampled(model: Any, request: Mapping[str, Any], seed: int) -> str:
    """An answer by the file's own chat template."""
    found = model.create_chat_completion(
        [{"role": "user", "content": request["prompts"][0]}],
        max_tokens=request["max_new_tokens"],
        temperature=request["temperature"],
        top_p=request["top_p"],
        top_k=0,
        min_p=0.0,
        repeat_penalty=1.0,
        seed=seed,
    )
    return str(found["choices"][0]["message"]["content"] or "").strip()


def greedy(model: Any, ids: Sequence[int], most: int, ends: Sequence[int]) -> list[int]:
    """Token by token, each the likeliest: no sampler's rules are between."""
    model.reset()
    model.eval(ids)
    found: list[int] = []
    while len(found) < most:
        found.append(int(logits(model).argmax()))
        if found[-1] in ends:
            break
        model.eval(found[-1:])
    return found


def logits(model: Any) -> Any:
    """Of the last token that was evaluated: float32 [vocabulary]."""
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),))


def log_softmax(values: Any) -> Any:
    shifted = values.astype(np.float64) - values.max()
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def perplexity(model: Any, ids: list[int]) -> float:
    """exp of the mean negative log likelihood of all tokens but the first."""
    model.eval(ids)
    total = 0.0
    for row, following in zip(model.scores[: len(ids) - 1], ids[1:], strict=True):
        total -= float(log_softmax(row)[following])
    return to_perplexity(total / (len(ids) - 1))
