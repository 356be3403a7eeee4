"""One card or several, and how a model is put on them: by the estimate, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from radeon_stack.catalog.load import Effective
from radeon_stack.catalog.sizes import format_size
from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.errors import MachineError, UsageError
from radeon_stack.host.gpus import Gpu
from radeon_stack.launch.estimate import TOLERANCE, Estimate, estimate, training_of
from radeon_stack.launch.inputs import model_folder
from radeon_stack.launch.model_shape import ModelShape, read_shape

Parallel = Literal["none", "data", "layers", "sharded"]
# Of a card's memory, what torch does not get: an R9700 of 31.86 GiB has 29.86 GiB for it.
RESERVED = 2 << 30
WHERE = "config.train.parallel"


@dataclass(frozen=True)
class Placement:
    """How many processes train, and how they share the work.

    "data": each has the whole model and a part of every batch; "layers": one process, a part of the layers a card;
    "sharded": as "data", but of the frozen base each has a share, and gathers a layer when it computes.
    """

    parallel: Parallel
    processes: int
    why: str


ONE = Placement("none", 1, "one process")


def placed(effective: Effective, gpus: tuple[Gpu, ...], nodes: int = 1) -> tuple[Effective, Placement]:
    """The recipe with `train.parallel` decided, and the decision; `gpus` are those of all `nodes`.

    MachineError, with the figures and what to change, for what fits neither one of these cards nor all together.
    """
    config = effective.config
    if not isinstance(config, FinetuneConfig):
        return effective, Placement("none", 1, "nothing is trained")
    if config.backend == "unsloth" and len(gpus) > 1:
        raise UsageError(
            f"it trains on one GPU, and there are {len(gpus)}",
            where=effective.origin.get("config.backend", str(effective.path)) + ": config.backend",
            remedy="take one: --gpus 0, or --set backend=trl",
        )
    placement = _on_cpu(config, nodes) if not gpus else _on_gpus(config, gpus, effective, nodes)
    if nodes > 1 and placement.parallel == "layers":
        placement = _over_nodes(config, gpus, placement)
    if placement.parallel == "none":
        return effective, placement
    train = config.train.model_copy(update={"parallel": placement.parallel})
    origin = dict(effective.origin)
    if config.train.parallel == "auto":
        origin[WHERE] = f"chosen: {placement.why}"
    return replace(effective, config=config.model_copy(update={"train": train}), origin=origin), placement


def needed(config: FinetuneConfig, placement: Placement, gpus: tuple[Gpu, ...]) -> int:
    """Bytes that the fullest of these cards will hold. UsageError where nothing can be estimated."""
    if placement.parallel == "layers":
        return spread(estimated(config), len(gpus))
    shares = placement.processes if placement.parallel == "sharded" else 1
    return estimated(config, placement.processes, shares).total


def estimated(config: FinetuneConfig, processes: int = 1, shares: int = 1, *, where: str = "config.model") -> Estimate:
    """The estimate of a recipe. UsageError where the model's sizes cannot be read on this side."""
    return estimate(_shape(config, where), training_of(config, processes, shares))


def spread(whole: Estimate, cards: int) -> int:
    """Bytes a card when the layers are spread: an even share of what stays, and the activations of its own layers."""
    activations = whole.parts["activations"]
    return -(-(whole.tensors - activations) // cards) + activations + whole.total - whole.tensors


def room(gpu: Gpu) -> int:
    """Bytes that torch can have of it."""
    return max(gpu.memory - RESERVED, 0)


def fit(needed: int, has: int) -> str:
    """In a word, by an estimate that may be off by `TOLERANCE`."""
    return "fits" if surely(needed, has) else "does not fit" if _never(needed, has) else "tight"


def _over_nodes(config: FinetuneConfig, gpus: tuple[Gpu, ...], spread: Placement) -> Placement:
    """One process does not reach over nodes: where a card is too small for the model, its base is shared out."""
    if config.train.parallel == "layers":
        remedy = "--set train.parallel=sharded"
        raise UsageError("layers are spread over the GPUs of one node", where=WHERE, remedy=remedy)
    why = spread.why.partition("; with its layers")[0]
    return Placement("sharded", len(gpus), f"{why}; {_shared(len(gpus))}; {_batch(config, len(gpus))}")


def _on_cpu(config: FinetuneConfig, nodes: int) -> Placement:
    if config.train.parallel == "layers":
        raise UsageError("layers are spread over GPUs, and this run takes none", where=WHERE, remedy="leave it out")
    count = (config.train.processes or 1) * nodes
    if config.train.parallel == "sharded":
        _require_several(count, "--set train.processes=2")
        return Placement("sharded", count, f"asked for, on the CPU; {_shared(count)}; {_batch(config, count)}")
    if count == 1:
        return Placement("none", 1, "one process, on the CPU")
    asked = "train.processes" if nodes == 1 else f"{nodes} nodes"
    return Placement("data", count, f"asked for: {asked}, on the CPU; {_batch(config, count)}")


def _on_gpus(config: FinetuneConfig, gpus: tuple[Gpu, ...], effective: Effective, nodes: int) -> Placement:
    count, asked = len(gpus), config.train.parallel
    least = min(room(gpu) for gpu in gpus)
    each = count // nodes
    if config.train.processes not in (None, each) and asked != "layers":
        raise UsageError(
            f"it is one process a GPU, and there are {each}", where="config.train.processes", remedy="leave it out"
        )
    if asked == "sharded":
        _require_several(count, "--gpus 0,1")
    if not least:
        return _unknown(config, count, "this GPU does not tell its memory")
    try:
        whole = estimated(config, count, where=effective.origin.get("config.model", "") + ": config.model")
    except UsageError as error:
        return _unknown(config, count, error.what)
    said = f"about {format_size(whole.total)}, and a card has {format_size(least)} for it"
    merge = _merge(whole, least)
    share = estimated(config, count, count)
    if asked == "sharded":
        told = f"{_shared(count)}: about {format_size(share.total)}, and a card has {format_size(least)} for it"
        told += f"; it fetches 2 × {format_size(_fetched(whole, share))} a pass from the others"
        return Placement("sharded", count, f"asked for; {told}; {_batch(config, count)}")
    if count == 1:
        if asked == "auto" and _never(whole.total, least):
            raise _too_large(config, f"training takes {said}", least)
        tight = "" if surely(whole.total, least) else ": tight"
        return Placement("none", 1, f"one card: training takes {said}{tight}{merge}")
    if asked == "data" or (asked == "auto" and surely(whole.total, least)):
        why = "asked for" if asked == "data" else "the whole model fits each card"
        return Placement("data", count, f"{why}: training takes {said}; {_batch(config, count)}{merge}")
    each = spread(estimated(config), count)
    if asked == "auto" and _never(each, least):
        raise _too_large(config, f"training takes {said}; with its layers spread {format_size(each)} a card", least)
    why = "asked for" if asked == "layers" else f"training takes {said}"
    other = f" ({WHERE[7:]}=sharded: all do, {format_size(share.total)} each)" if surely(share.total, least) else ""
    told = f"with its layers spread {format_size(each)} a card; one works at a time{other}"
    return Placement("layers", 1, f"{why}; {told}")


def _unknown(config: FinetuneConfig, count: int, why: str) -> Placement:
    if count == 1:
        return Placement("none", 1, f"one card; nothing is estimated: {why}")
    if config.train.parallel == "layers":
        return Placement("layers", 1, f"asked for; nothing is estimated: {why}")
    if config.train.parallel == "sharded":
        told = f"asked for; {_shared(count)}; nothing is estimated: {why}"
        return Placement("sharded", count, f"{told}; {_batch(config, count)}")
    return Placement("data", count, f"one process a card; nothing is estimated: {why}; {_batch(config, count)}")


def _require_several(count: int, remedy: str) -> None:
    if count == 1:
        raise UsageError(
            "the base is shared out among processes, and there is one", where=WHERE, remedy=f"{remedy}, or leave it out"
        )


def _shared(count: int) -> str:
    return f"each of {count} processes holds a share of the frozen base and gathers it layer by layer"


def _fetched(whole: Estimate, share: Estimate) -> int:
    """Bytes that one pass over all layers brings: what of the weights is in the other processes."""
    return sum(size - share.parts[name] for name, size in whole.parts.items() if name.startswith("weights"))


def _too_large(config: FinetuneConfig, what: str, has: int) -> MachineError:
    fitting = [f"{change} ({format_size(total)})" for change, total in _changes(config) if surely(total, has)]
    remedy = f"it would fit with {' or '.join(fitting[:2])}" if fitting else "take more cards (--gpus 0,1,…), NF4"
    remedy += "" if fitting else " (quantization.kind) or a smaller model"
    return MachineError(what, where="config.train", remedy=f"{remedy}; to try all the same: --set {WHERE[7:]}=data")


def _changes(config: FinetuneConfig) -> Iterator[tuple[str, int]]:
    """Changes that take less memory, and what one card then takes."""
    shorter = max(config.data.max_length // 4, 8)
    changes: list[tuple[str, str, Any]] = [
        ("train", "gradient_checkpointing", True),
        ("train", "offload_activations", True),
        ("train", "batch_size", 1),
        ("data", "max_length", shorter),
        ("quantization", "kind", "nf4"),
    ]
    for section, key, value in changes:
        table = getattr(config, section)
        if getattr(table, key) not in (value, "auto"):
            changed = config.model_copy(update={section: table.model_copy(update={key: value})})
            yield f"--set {section}.{key}={str(value).lower()}", estimated(changed).total


def _batch(config: FinetuneConfig, count: int) -> str:
    each, passes = config.train.batch_size, config.train.gradient_accumulation
    return f"{count} × {each} × {passes} = {count * each * passes} rows an optimizer step"


def _merge(whole: Estimate, has: int) -> str:
    if whole.merged <= has:
        return ""
    return (
        f"; the merged model of {format_size(whole.merged)} will not fit when it is read back: --set export.merge=false"
    )


def surely(needed: int, has: int) -> bool:
    return needed * (1 + TOLERANCE) <= has


def _never(needed: int, has: int) -> bool:
    return needed * (1 - TOLERANCE) > has


def _shape(config: FinetuneConfig, where: str) -> ModelShape:
    folder = model_folder(config.model, where=where)
    if folder is None:
        raise UsageError(
            f"the sizes of {config.model} are known where it is read",
            where=where,
            remedy="give a folder: --model PATH",
        )
    return read_shape(folder)


def as_data(found: Estimate) -> dict[str, Any]:
    """For `--json`: bytes throughout."""
    return {
        "parts": dict(found.parts),
        "reasons": dict(found.reasons),
        "tensors": found.tensors,
        "total": found.total,
        "merged": found.merged,
        "trained_parameters": found.trained,
    }
