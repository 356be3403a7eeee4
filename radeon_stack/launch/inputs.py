"""Model folders and data files are looked at before anything is launched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from radeon_stack.contracts.sections import (
    BIRTHDAY,
    HUB_ID,
    HUB_PREFIX,
    MayMerge,
    TakesData,
    TakesModel,
    TakesSource,
    is_made,
)
from radeon_stack.errors import UsageError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet")


def model_folder(model: str, *, where: str) -> Path | None:
    """The absolute folder of a model, or None for one that is made where the workload runs.

    UsageError when it is missing or lacks its configuration, tokenizer or weights.
    """
    if is_made(model):
        return None
    folder = Path(os.path.abspath(Path(model).expanduser()))
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise UsageError(
            f"no model folder {folder} ({found})",
            where=where,
            remedy=_perhaps_of_the_hub(model) or "give one: --model PATH, or try the demo: --preset demo",
        )
    _require(folder, ("config.json",), "config.json", where)
    _require(folder, TOKENIZER_FILES, "a tokenizer (tokenizer.json or tokenizer.model)", where)
    _require(folder, ("*.safetensors",), "weights (*.safetensors)", where)
    return folder


def source_folder(source: str, *, where: str) -> Path:
    """The absolute folder of what was made before. UsageError when it is not there."""
    folder = Path(os.path.abspath(Path(source).expanduser()))
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise UsageError(f"no folder {folder} ({found})", where=where, remedy="see: radeon-stack runs list")
    return folder


def require_network(model: str, network: str, *, where: str) -> None:
    """UsageError for a model of the hub in a recipe that allows no network."""
    if model.startswith(HUB_PREFIX) and network == "none":
        raise UsageError(
            f"{model} is read from the hub, and the recipe allows no network",
            where=where,
            remedy="allow it: --set resources.network=bridge (for a gated model also --set secrets='[\"HF_TOKEN\"]'); "
            "or give a folder: --model PATH",
        )


def _perhaps_of_the_hub(model: str) -> str:
    if not HUB_ID.fullmatch(model):
        return ""
    return f"give a folder; from the hub it would be: --model {HUB_PREFIX}{model} --set resources.network=bridge"


def data_file(dataset: str, *, where: str) -> Path | None:
    """The absolute path of a data file, or None for the data set that travels with us."""
    if dataset == BIRTHDAY:
        return None
    path = Path(os.path.abspath(Path(dataset).expanduser()))
    if path.suffix not in DATA_SUFFIXES:
        suffixes = f"{', '.join(DATA_SUFFIXES[:-1])} or {DATA_SUFFIXES[-1]}"
        raise UsageError(f"found '{dataset}'; allowed: '{BIRTHDAY}', or a file ending in {suffixes}", where=where)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no regular file" if path.exists() else "nothing there"
        raise UsageError(f"no data file {path} ({found})", where=where, remedy="give one: --data FILE")
    return path


def _require(folder: Path, patterns: tuple[str, ...], what: str, where: str) -> None:
    if not any(next(folder.glob(pattern), None) for pattern in patterns):
        raise UsageError(
            f"the model folder {folder} lacks {what}", where=where, remedy="download the whole model, every file of it"
        )


def absolute_inputs(config: BaseModel, tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values with the model and data that its `config` takes as absolute paths.

    So a run is resumed from any folder.
    """
    values = dict(tree["config"])
    if isinstance(config, TakesSource):
        values["source"] = str(source_folder(config.source, where="config.source"))
    takes = isinstance(config, TakesModel) or (isinstance(config, MayMerge) and config.model)
    if takes and (folder := model_folder(values["model"], where="config.model")):
        values["model"] = str(folder)
    if isinstance(config, TakesData) and (file := data_file(config.data.dataset, where="config.data.dataset")):
        values["data"] = {**values["data"], "dataset": str(file)}
    return {**tree, "config": values}
