"""Rows → token ids and labels, through the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from radeon_stack.errors import UsageError
from radeon_stack.text import one_line
from radeon_stack.workloads.finetune.forms import Row
from radeon_stack.workloads.job import Job

IGNORED = -100  # what torch's cross-entropy leaves out
TELL_EVERY = 100


@dataclass(frozen=True)
class Encoded:
    """Token ids (int) and labels of the same length; IGNORED where nothing is learnt."""

    input_ids: list[int]
    labels: list[int]
    text: str


def encode_rows(
    job: Job, tokenizer: Any, rows: Sequence[Row], *, max_length: int, loss_on: Literal["all", "assistant"]
) -> list[Encoded]:
    """Encode each row; equal rows once. UsageError when no row leaves anything to learn."""
    known: dict[int, Encoded] = {}
    encoded = []
    for number, row in enumerate(rows):
        if id(row) not in known:
            try:
                known[id(row)] = encode(tokenizer, row, max_length=max_length, loss_on=loss_on)
            except TemplateError as error:
                raise UsageError(
                    f"the model's chat template does not take it: {one_line(str(error))}",
                    where=f"row {number + 1} of the data",
                    remedy="many models want user and assistant in turn, and some no system message",
                ) from error
        encoded.append(known[id(row)])
        if number % TELL_EVERY == 0:
            job.progress("tokenize", number, len(rows), unit="rows")
    job.progress("tokenize", len(rows), len(rows), unit="rows")
    taught = [one for one in encoded if any(label != IGNORED for label in one.labels)]
    if not taught:
        raise UsageError(
            f"no answer begins within {max_length} tokens: nothing would be learnt",
            where="config.data.max_length",
            remedy="raise it",
        )
    return taught


def encode(tokenizer: Any, row: Row, *, max_length: int, loss_on: Literal["all", "assistant"]) -> Encoded:
    """One row. Labels equal the ids, but for what `loss_on="assistant"` masks."""
    text = row.text or render(tokenizer, row.messages)
    # The template writes its own special tokens; plain text gets the tokenizer's.
    wanted = loss_on == "assistant" and bool(row.messages)
    tokens = tokenizer(text, add_special_tokens=bool(row.text), return_offsets_mapping=wanted)
    ids: list[int] = list(tokens["input_ids"])
    labels = list(ids)
    if wanted:
        spans = answer_spans(tokenizer, row, text)
        labels = [
            label if any(start < end_ and start_ < end for start_, end_ in spans) else IGNORED
            for label, (start, end) in zip(ids, tokens["offset_mapping"], strict=True)
        ]
    return Encoded(ids[:max_length], labels[:max_length], text)


def render(tokenizer: Any, messages: Sequence[dict[str, str]], *, ask: bool = False) -> str:
    """The chat as the model sees it; `ask` ends it where the assistant begins to answer."""
    if tokenizer.chat_template is None:
        raise UsageError(
            "the model's tokenizer has no chat template",
            where="config.model",
            remedy="use an instruct model, or data with 'text' rows",
        )
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))


def answer_spans(tokenizer: Any, row: Row, text: str) -> list[tuple[int, int]]:
    """Character spans of the assistant's answers in `text`, the end-of-turn marker included.

    UsageError for a template that rewrites earlier turns: then the spans cannot be known.
    """
    spans = []
    for index, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, row.messages[:index], ask=True)
        through = render(tokenizer, row.messages[: index + 1])
        if not (text.startswith(through) and through.startswith(before)):
            raise UsageError(
                "this model's chat template rewrites earlier turns, so answers cannot be told from prompts",
                where="config.data.loss_on",
                remedy="set data.loss_on=all",
            )
        spans.append((len(before), len(through)))
    return spans
