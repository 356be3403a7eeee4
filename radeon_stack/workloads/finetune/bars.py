"""transformers' own progress bars as events of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

from radeon_stack.workloads.job import Job


@contextmanager
def bars(job: Job, stage: str) -> Iterator[None]:
    """Turn transformers' own progress bars into events of a stage, which what fails before the first is in too."""
    job.stage = stage

    def make(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bar:
        return _Bar(job, stage, *args, **kwargs)

    previous = transformers_logging.set_tqdm_hook(make)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


class _Bar:
    """The part of tqdm that transformers uses, telling at most a hundred times how far it is."""

    def __init__(self, job: Job, stage: str, iterable: Any = None, total: float | None = None, **_: Any) -> None:
        self._job, self._stage = job, stage
        self._iterable = iterable
        self._total = float(total if total is not None else len(iterable) if hasattr(iterable, "__len__") else 1)
        self._done, self._told = 0.0, -1

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update(1)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        self._done += n
        percent = int(100 * self._done / self._total) if self._total else 100
        if percent > self._told:
            self._told = percent
            self._job.progress(self._stage, self._done, self._total, unit="tensors")

    def __getattr__(self, name: str) -> Any:
        # set_description, set_postfix, close …: nothing to show
        return lambda *args, **kwargs: None
