"""An export from beginning to end, to be read top to bottom. This process imports no torch: each step has its own."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from radeon_stack.checksums import require_sums, sum_of, sums_of, write_sums
from radeon_stack.contracts.export import ExportConfig
from radeon_stack.errors import CheckError, MachineError, UsageError
from radeon_stack.runs import events as ev
from radeon_stack.workloads.export import apart, gguf_making, quality
from radeon_stack.workloads.export.asking import Export, asked, installed, request, tell
from radeon_stack.workloads.export.kept import Kept, made
from radeon_stack.workloads.export.origin import Origin, architecture, model_bytes, origin
from radeon_stack.workloads.job import Job

TENSORS = "radeon_stack.workloads.export.tensors"
HALF_MERGED = ("merged.partial", "merged.old.partial", "base-16-bit.partial", "base-16-bit")
ROOM = 1.05  # of the bytes that will be written, so much must be free


def export(job: Job, config: ExportConfig) -> dict[str, Any]:
    """Merge, convert, check, ask and compare; returns the result's figures. CheckError says what does not hold."""
    there = installed(config)
    began = origin(Path(job.arguments.source or config.source))
    kept = Kept(job.artifacts / "steps")
    expected = config.questions.expected or began.expected
    questions = request(config, began)
    job.fact("prompt", {"prompt": questions["prompts"][0] if questions["taught"] else "", "expected": expected})

    merged = merged_folder(job, kept, began)
    job.fact("export", {"model": architecture(merged), "bytes": model_bytes(merged)})
    whole = Export("transformers", merged, folder_digest(merged), model_bytes(merged))
    reference = asked(job, kept, whole, questions, None)  # before it is converted: is it a model at all?
    exports = [whole]
    if there["llama.cpp"]:
        exports += ggufs(job, config, kept, merged, whole.digest, questions["threads"])
    if there["vllm"]:
        exports.append(replace(whole, loader="vllm"))

    result: dict[str, Any] = {"loaders": len(exports), "samples": questions["count"]}
    wrong: list[str] = []
    for one in exports:
        reply = reference if one is whole else asked(job, kept, one, questions, reference)
        found = quality.values(reply, reference, expected)
        broken = list(problems(one, config, found, reply, reference))
        tell(job, one, questions, reply, reference, found, broken, expected)
        result |= {f"{one.loader} {name}": value for name, value in found.items()}
        wrong += [f"{one.loader}: {text}" for text in broken]
    for name in (name for name, here in there.items() if not here and config.loaders == "auto"):
        job.emit(ev.Loaded(loader=name, state="missing"))
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckError(wrong[0] + more, where="config.limits", remedy="see the report: radeon-stack runs report RUN")
    return result


def problems(
    one: Export, config: ExportConfig, found: dict[str, float], reply: dict[str, Any], reference: dict[str, Any]
) -> Iterator[str]:
    """What does not hold for a loader: other tokens than the tokenizer's, and the limits."""
    if reply is not reference and (other := quality.other_tokens(reply, reference)):
        yield other
    limits = quality.limits_for(one.loader, config.limits, config.limits_of)
    yield from quality.broken(found, limits, reply, reference)


def merged_folder(job: Job, kept: Kept, began: Origin) -> Path:
    """The merged model: the source's, or made here from its adapter. CheckError for one that has changed since."""
    if began.merged is not None:
        job.progress("check merged", 0, 1)
        require_sums(began.merged)
        job.progress("check merged", 1, 1)
        return began.merged
    adapter, folder = began.adapter, job.artifacts / "merged"
    assert adapter is not None  # noqa: S101 - of the two an origin has one
    require_sums(adapter)
    inputs = {"adapter": folder_digest(adapter), "model": job.arguments.model}
    if folder.is_dir() and kept.get("merge", inputs) is not None:  # of an earlier attempt
        require_sums(folder)
        return folder
    if not job.arguments.model:
        raise UsageError(
            "an adapter is merged into its base, and none is given", where="config.model", remedy="--model PATH"
        )
    arguments = job.arguments
    places = {"run": str(arguments.run), "cache": str(arguments.cache), "adapter": str(adapter)}
    try:
        apart.called("radeon_stack.workloads.export.merge", places | {"model": arguments.model})
    except BaseException:
        for name in HALF_MERGED:  # a child that is ended clears nothing up
            shutil.rmtree(job.artifacts / name, ignore_errors=True)
        raise
    kept.put("merge", inputs, {})
    return folder


def ggufs(job: Job, config: ExportConfig, kept: Kept, merged: Path, digest: str, threads: int) -> list[Export]:
    """The GGUF files, each made once, whole, and with every tensor compared to the checkpoint's."""
    folder = job.artifacts / "gguf"
    kinds = config.gguf.quantizations
    first = kinds[0]
    if first not in gguf_making.CONVERTED:
        raise UsageError(
            f"{first} cannot be converted to at once; allowed first: {', '.join(gguf_making.CONVERTED)}",
            where="config.gguf.quantizations",
        )
    require_room(folder, model_bytes(merged), kinds)
    folder.mkdir(exist_ok=True)
    exports, sums = [], dict[str, str]()
    for kind in kinds:
        stage, inputs = f"gguf {kind}", {"merged": digest, "first": first, "kind": kind}
        file = folder / f"model-{kind}.gguf"
        value = kept.get(stage, inputs)
        if value is None:
            file.unlink(missing_ok=True)
            total = round(model_bytes(merged) * gguf_making.BITS[kind] / 16)

            def tick(done: int, stage: str = stage, total: int = total) -> None:
                job.progress(stage, min(done, total - 1) >> 20, (total >> 20) + 1, unit="MiB")

            with gguf_making.named_once_right(file) as new:
                if kind == first:
                    done = gguf_making.convert(merged, new, kind, tick)
                else:
                    done = gguf_making.quantize(folder / f"model-{first}.gguf", new, kind, threads, tick)
                job.progress(stage, 1, 1, note=f"{done.seconds:.0f} s")
                job.progress(f"compare {kind}", 0, 1, note="every tensor with the checkpoint's")
                about = apart.called(TENSORS, {"file": str(new), "folder": str(merged)}).value
            job.progress(f"compare {kind}", 1, 1, note=f"{about['compared']} tensors")
            value = made(file, job.artifacts) | {"seconds": done.seconds, "peak_memory": done.peak_memory, **about}
            kept.put(stage, inputs, value)
            job.artifact(f"gguf {kind}", file)
        sums[file.name] = value["sha256"]
        write_sums(folder, sums)  # also of a file whose attempt ended before it was summed
        job.fact(f"gguf_{kind}", value)
        exports.append(Export(f"llama.cpp {kind}", file, value["sha256"], value["bytes"]))
    return exports


def require_room(folder: Path, size: int, kinds: Sequence[str]) -> None:
    """MachineError before anything is written, where the disk cannot take what is missing."""
    missing = [kind for kind in kinds if not (folder / f"model-{kind}.gguf").is_file()]
    needed = round(sum(size * gguf_making.BITS[kind] / 16 for kind in missing) * ROOM)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise MachineError(
            f"{', '.join(missing)} will take {needed >> 20:,} MiB, and {free >> 20:,} MiB are free",
            where=str(folder),
            remedy="free some room, or make fewer: --set gguf.quantizations='[\"bf16\"]'",
        )


def folder_digest(folder: Path) -> str:
    """What stands for all files of a folder: it changes when any of them does."""
    known = sums_of(folder)  # they have just been held against it
    files = sorted(file for file in folder.iterdir() if file.is_file())
    told = "".join(f"{known.get(file.name) or sum_of(file)} {file.name}\n" for file in files)
    return hashlib.sha256(told.encode()).hexdigest()
