"""Reading a TOML file of ours into a typed model; a bad file is told by file and key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from radeon_stack.catalog.problems import explain
from radeon_stack.errors import UsageError


class Table(BaseModel):
    """A table in which every key is known and has its type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Model = TypeVar("Model", bound=BaseModel)


def read_table(path: Path) -> dict[str, Any]:
    """The file's tables as they are. UsageError when it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot be read: {error}", where=str(path)) from error


def typed(model: type[Model], table: Any, path: Path, prefix: str = "") -> Model:
    """The table as its model. UsageError names file and key."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise explain(
            error, model, table if isinstance(table, dict) else {}, {}, file=str(path), prefix=prefix
        ) from None
