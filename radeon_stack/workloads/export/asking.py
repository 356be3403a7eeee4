"""The same questions to every program that loads the export; what each came to, told as it ends."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from radeon_stack.contracts.export import ExportConfig
from radeon_stack.errors import MachineError, StackError
from radeon_stack.runs import events as ev
from radeon_stack.workloads.export import apart, quality
from radeon_stack.workloads.export.held import TEXT
from radeon_stack.workloads.export.kept import Kept
from radeon_stack.workloads.export.origin import Origin
from radeon_stack.workloads.job import Job

LOADERS = "radeon_stack.workloads.export.loaders"
MODULES = {"transformers": "by_transformers", "llama.cpp": "by_llama_cpp", "vllm": "by_vllm"}
PACKAGES = {"llama.cpp": "llama_cpp", "vllm": "vllm"}
TAKES = {"vllm": "starting takes a minute or two", "transformers": "what the others are compared with"}


@dataclass(frozen=True)
class Export:
    """One thing that is loaded: by whom, what, its sha256 or that of all its files, and its bytes."""

    loader: str
    place: Path
    digest: str
    size: int

    @property
    def program(self) -> str:
        return self.loader.partition(" ")[0]


def request(config: ExportConfig, taught: Origin) -> dict[str, Any]:
    """What all are asked. The taught question comes first, where there is one."""
    asked = config.questions
    prompt = asked.prompt or taught.prompt
    return {
        "prompts": [*((prompt,) if prompt else ()), *asked.greedy],
        "taught": bool(prompt and asked.count),
        "count": asked.count,
        "max_new_tokens": asked.max_new_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "seed": asked.seed,
        "greedy_tokens": asked.greedy_tokens,
        "text": asked.text or TEXT,
        "threads": config.threads or len(os.sched_getaffinity(0)),
    }


def installed(config: ExportConfig) -> dict[str, bool]:
    """Which programs are here. MachineError for one that the recipe names and is not."""
    found = {name: find_spec(package) is not None for name, package in PACKAGES.items()}
    if config.loaders != "auto":
        for name in config.loaders:
            if not found.get(name, True):
                raise MachineError(
                    f"{name} is not installed where this runs",
                    where="config.loaders",
                    remedy="take an image that has it, or leave it to what is there: --set loaders=auto",
                )
        found = {name: name in config.loaders for name in found}
    return found


def asked(
    job: Job, kept: Kept, export: Export, questions: Mapping[str, Any], reference: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A loader's reply, from an earlier attempt if it has one: `loaders.reply.Reply` and the `seconds` it took."""
    stage = f"ask {export.loader}"
    inputs = {"questions": dict(questions), "digest": export.digest, "loader": export.loader}
    if reply := kept.get(stage, inputs):
        return reply
    job.progress(stage, 0, 1, note=TAKES.get(export.loader, "loading"))
    told = {**questions, "model": str(export.place), "reference": reference}
    try:
        done = apart.called(f"{LOADERS}.{MODULES[export.program]}", told)
    except StackError as error:  # the run ends with it; the report has it beside those that did load
        job.emit(ev.Loaded(loader=export.loader, state="broken", broken=(f"gave no answer: {error.what}",)))
        raise
    reply = done.value | {"seconds": done.seconds}
    kept.put(stage, inputs, reply)
    job.progress(stage, 1, 1, note=f"{done.seconds:.0f} s")
    return reply


def tell(
    job: Job,
    export: Export,
    questions: Mapping[str, Any],
    reply: Mapping[str, Any],
    reference: Mapping[str, Any],
    found: Mapping[str, float],
    broken: list[str],
    expected: str,
) -> None:
    """Tell how a loader did: its answers, figures, and what does not hold."""
    for index, text in enumerate(reply["answers"]):
        job.emit(
            ev.Sample(
                phase=export.loader,
                index=index,
                prompt=questions["prompts"][0],
                response=text,
                expected=expected or None,
                correct=quality.is_right(text, expected) if expected else None,
            )
        )
    turns = tuple(
        ev.Turn(prompt=prompt, response=text, tokens=len(ids), agrees=quality.parted_at(ids, theirs))
        for prompt, text, ids, theirs in zip(
            questions["prompts"], reply["greedy_texts"], reply["greedy"], reference["greedy"], strict=True
        )
    )
    job.emit(
        ev.Loaded(
            loader=export.loader,
            state="broken" if broken else "ok",
            program=f"{reply['program']} on {reply['device']}"[:64],
            values={**found, "seconds": reply["seconds"], "file_bytes": export.size},
            turns=turns,
            broken=tuple(broken),
        )
    )
