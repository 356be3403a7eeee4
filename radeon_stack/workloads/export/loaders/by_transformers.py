"""transformers in the weights' own 16 bit: what all others are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from radeon_stack.errors import CheckError
from radeon_stack.workloads.export.loaders.reply import LIKELIEST, Pace, Reply, resident, to_perplexity, up_to_end
from radeon_stack.workloads.finetune.encoding import render


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(request["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    # "auto" is the dtype that the files have.
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="auto", device_map={"": device})
    model.eval()
    model.set_output_embeddings(Head(model.get_output_embeddings()))
    require_room(len(tokenizer), model, request["model"])
    reply = Reply(f"transformers {version('transformers')}", name)
    ends = model.generation_config.eos_token_id
    reply.end_ids = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
    pace = Pace()
    with torch.inference_mode():
        for number, prompt in enumerate(request["prompts"]):
            text = render(tokenizer, [{"role": "user", "content": prompt}], ask=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            reply.prompt_texts.append(text)
            reply.prompt_ids.append(ids)
            if number == 0 and request["taught"]:
                reply.answers = sampled(model, tokenizer, ids, request)
            found = pace.timed(lambda ids=ids: greedy(model, tokenizer, ids, request["greedy_tokens"]))
            reply.greedy.append(up_to_end(found, reply.end_ids))
            reply.greedy_texts.append(tokenizer.decode(reply.greedy[-1]))
            first = model(torch.tensor([ids], device=device)).logits[0, -1].float().log_softmax(-1).topk(LIKELIEST)
            reply.first_ids.append(first.indices.tolist())
            reply.first_logprobs.append(first.values.tolist())
        reply.memory = 0 if device.type == "cuda" else resident()
        reply.text_ids = tokenizer(request["text"], add_special_tokens=False)["input_ids"]
        reply.perplexity = perplexity(model, reply.text_ids)
    reply.tokens_per_second = pace.tokens_per_second
    return reply.as_data()


class Head(torch.nn.Module):
    """The output head in float32. In bf16 a logit of 20 is rounded to eighths: likeliest tokens would be tied."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        bias = None if head.bias is None else head.bias.float()
        self.weight, self.bias = torch.nn.Parameter(head.weight.float(), requires_grad=False), bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[…, hidden] in any dtype → float32 [… , vocabulary]"""
        return torch.nn.functional.linear(hidden.float(), self.weight, self.bias)


def require_room(words: int, model: Any, folder: str) -> None:
    """CheckError where the tokenizer has more tokens than the model has rows for them."""
    rows = model.get_input_embeddings().weight.shape[0]
    if words > rows:
        raise CheckError(
            f"the tokenizer has {words:,} tokens, the model rows for {rows:,}: it is another model's",
            where=f"{folder}/tokenizer.json",
            remedy="take the tokenizer of the base, and merge again",
        )


def sampled(model: Any, tokenizer: Any, ids: list[int], request: Mapping[str, Any]) -> list[str]:
    """Answers drawn one by one, each with a seed of its own as the others' are."""
    found = []
    inputs = torch.tensor([ids], device=model.device)
    for number in range(request["count"]):
        torch.manual_seed(request["seed"] + number)
        drawn = {"do_sample": True, "temperature": request["temperature"], "top_p": request["top_p"], "top_k": 0}
        if not request["temperature"]:
            drawn = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=request["max_new_tokens"],
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **drawn,
        )
        found.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip())
    return found


def greedy(model: Any, tokenizer: Any, ids: list[int], most: int) -> list[int]:
    inputs = torch.tensor([ids], device=model.device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=most,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    return list(map(int, output[0, len(ids) :]))


def perplexity(model: Any, ids: list[int]) -> float:
    """exp of the mean negative log likelihood of all tokens but the first."""
    inputs = torch.tensor([ids], device=model.device)
    chosen = model(inputs).logits[0, :-1].float().log_softmax(-1).gather(-1, inputs[0, 1:, None])
    return to_perplexity(-chosen.mean().item())
