"""Files copied tensor by tensor, as safetensors' own reader sees them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.work
torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from radeon_stack.checksums import sum_of, write_summed  # noqa: E402
from radeon_stack.safetensor_files import places_in  # noqa: E402
from radeon_stack.workloads.finetune.merging import merged_file  # noqa: E402
from radeon_stack.workloads.finetune.streams import in_turn, read_values  # noqa: E402

DTYPES = ("bfloat16", "float16", "float32", "float64", "int8", "uint8", "bool", "int64", "float8_e4m3fn")
SHAPES = st.lists(st.integers(0, 9), max_size=3)
NAMES = st.text(min_size=1).filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6)


@given(TENSORS, st.integers(0, 1 << 30))
@settings(max_examples=60)
def test_a_copy_has_the_names_dtypes_shapes_and_bits_of_its_original_in_its_order(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, list[int]]], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(seed)
    made = {name: torch.randn(shape).to(getattr(torch, dtype)) for name, (dtype, shape) in tensors.items()}
    save_file(made, folder / "original.safetensors")
    places = places_in(folder / "original.safetensors")
    told = write_summed(folder / "copy.safetensors", merged_file(places, {}, lambda: None))
    assert told == sum_of(folder / "copy.safetensors")
    with safe_open(folder / "copy.safetensors", framework="pt") as found:
        assert set(found.keys()) == made.keys() and found.metadata() == {"format": "pt"}
        for name, tensor in made.items():
            copy = found.get_tensor(name)
            assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(copy.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert [place.name for place in places_in(folder / "copy.safetensors")] == [place.name for place in places]


def test_values_are_read_from_the_middle_of_a_tensor(tmp_path: Path) -> None:
    tensor = torch.arange(60.0).view(5, 12)
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    (place,) = places_in(tmp_path / "a.safetensors")
    assert torch.equal(read_values(place, (2, 12), 24), tensor[2:4]) and torch.equal(read_values(place), tensor)


def test_work_in_threads_comes_back_in_order_and_few_results_wait() -> None:
    begun, most, threads, before = 0, 0, torch.get_num_threads(), threading.active_count()

    def one(number: int) -> tuple[int, int]:
        time.sleep(0.001 * (number % 3))
        return number, torch.get_num_threads()

    def work() -> Iterator[Callable[[], tuple[int, int]]]:
        nonlocal begun
        for number in range(50):
            begun += 1
            yield partial(one, number)

    found = []
    for number, of_torch in in_turn(work()):
        found.append(number)
        most = max(most, begun - len(found))
        assert of_torch == 1
    assert found == list(range(50)) and most <= 9
    assert torch.get_num_threads() == threads and threading.active_count() == before


def test_an_error_in_a_thread_is_the_callers() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        list(in_turn([lambda: 1, lambda: 1 // 0]))
    assert torch.get_num_threads() == threads
