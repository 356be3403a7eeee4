"""Model folders and data files are looked at before anything is launched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from radeon_stack.contracts.finetune import BIRTHDAY, PACKAGE_PREFIX
from radeon_stack.errors import UsageError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
DATA_SUFFIXES = (".jsonl", ".parquet")


def model_folder(model: str, *, where: str) -> Path | None:
    """The absolute folder of a model, or None for one that a Python package carries.

    UsageError when it is missing or lacks its configuration, tokenizer or weights.
    """
    if model.startswith(PACKAGE_PREFIX):
        return None
    folder = Path(os.path.abspath(Path(model).expanduser()))
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise UsageError(
            f"no model folder {folder} ({found})",
            where=where,
            remedy="give one: --model PATH, or try the demo: --preset demo",
        )
    _require(folder, ("config.json",), "config.json", where)
    _require(folder, TOKENIZER_FILES, "a tokenizer (tokenizer.json or tokenizer.model)", where)
    _require(folder, ("*.safetensors",), "weights (*.safetensors)", where)
    return folder


def data_file(dataset: str, *, where: str) -> Path | None:
    """The absolute path of a data file, or None for the data set that travels with us."""
    if dataset == BIRTHDAY:
        return None
    path = Path(os.path.abspath(Path(dataset).expanduser()))
    if path.suffix not in DATA_SUFFIXES:
        raise UsageError(
            f"found '{dataset}'; allowed: '{BIRTHDAY}', or a file ending in {' or '.join(DATA_SUFFIXES)}", where=where
        )
    if not path.is_file():
        raise UsageError(f"no data file {path}", where=where)
    return path


def _require(folder: Path, patterns: tuple[str, ...], what: str, where: str) -> None:
    if not any(next(folder.glob(pattern), None) for pattern in patterns):
        raise UsageError(
            f"the model folder {folder} lacks {what}", where=where, remedy="download the whole model, every file of it"
        )


def absolute_inputs(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values with model and data as absolute paths: a run is resumed from any folder."""
    config = dict(tree["config"])
    folder = model_folder(config["model"], where="config.model")
    file = data_file(config["data"]["dataset"], where="config.data.dataset")
    if folder is not None:
        config["model"] = str(folder)
    if file is not None:
        config["data"] = {**config["data"], "dataset": str(file)}
    return {**tree, "config": config}
