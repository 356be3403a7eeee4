"""Tensors read from safetensors files by plain reads and given back as bytes, and work on them in several threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from radeon_stack.errors import UsageError
from radeon_stack.safetensor_files import Place, read_into

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOST_THREADS = 8

T = TypeVar("T")


def read_values(place: Place, shape: tuple[int, ...] | None = None, skip: int = 0) -> torch.Tensor:
    """A tensor, or what fills a shape after `skip` values. UsageError for others than floats of 16 bit or more."""
    if place.dtype not in FLOATS:
        raise UsageError(f"{place.name} is in {place.dtype}, not in floats of 16 bit or more", where=str(place.file))
    made = torch.empty(place.shape if shape is None else shape, dtype=FLOATS[place.dtype])
    read_into(as_bytes(made), place, skip * made.itemsize)
    return made


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's own memory."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy())


def in_turn(work: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results in order, while others are worked on in threads; no more of them than threads are waiting.

    Each is done by one thread of torch's: where others use the processors too, hers would wait for each other at every
    small step, which took ten times as long.
    """
    count = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting: deque[Future[T]] = deque()
            for one in work:
                waiting.append(pool.submit(one))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(before)
