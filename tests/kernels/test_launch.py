"""Which compiled kernel a launch takes: one that Triton would compile alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.kernels import launch as launching
from radeon_stack.kernels.launch import Launcher

GIB = 1 << 30


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, at an address, in a storage of so many bytes."""

    address = 512
    size = 1024

    @property
    def device(self) -> Any:
        return SimpleNamespace(index=0)

    def data_ptr(self) -> int:
        return self.address

    def untyped_storage(self) -> Any:
        return SimpleNamespace(size=lambda: self.size)


def pointer(address: int = 512, size: int = 1024, dtype: torch.dtype = torch.bfloat16) -> OnGpu:
    tensor = torch.zeros(1, dtype=dtype).as_subclass(OnGpu)
    tensor.address, tensor.size = address, size
    return tensor


@dataclass
class Compiled:
    """As Triton calls it: by its number, and with the hooks, where somebody is to be told; else its own way."""

    number: int
    launched: list[tuple[int, tuple[Any, ...]]]
    stream: int | None = None
    function: str = "function"
    packed_metadata: str = "metadata"

    def run(self, *told: Any) -> None:
        grid, (self.stream, *same), numbers = told[:3], told[3:9], told[9:]
        assert grid == (1, 1, 1) and same == ["function", "metadata", None, None, None]
        self.launched.append((self.number, numbers))

    def __getitem__(self, grid: Any) -> Any:
        return lambda *told: self.launched.append((-self.number, told))


@dataclass
class Kernel:
    """Compiles a number for each launch that asks it, and notes which of them is launched with what."""

    launched: list[tuple[int, tuple[Any, ...]]] = field(default_factory=list)
    compiled: int = 0
    fn: Any = None
    last: Compiled | None = None

    def __getitem__(self, grid: Any) -> Any:
        del grid

        def compile_and_launch(*passed: Any, **named: Any) -> Any:
            del passed, named
            self.compiled += 1
            number = self.compiled
            self.launched.append((number, ()))
            self.last = Compiled(number, self.launched)
            return self.last

        return compile_and_launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    stand_in(monkeypatch)
    return Kernel()


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launching, "settle", lambda _: None)
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_stream=lambda device: 7 + device))


def numbers(kernel: Kernel, *calls: tuple[Any, ...], constants: Any = None) -> list[int]:
    """Which compiled kernel each call took."""
    launch, grid = Launcher(), (1, 1, 1)
    for arguments in calls:
        launch(kernel, grid, arguments, constants or {"BLOCK": 16})
    return [number for number, _ in kernel.launched]


def test_what_is_launched_again_is_handed_addresses_numbers_and_constants(kernel: Kernel) -> None:
    assert numbers(kernel, (pointer(), 48), (pointer(1024), 48), (pointer(2048), 48)) == [1, 1, 1]
    assert [told for _, told in kernel.launched] == [(), (1024, 48, 16), (2048, 48, 16)]
    assert kernel.last is not None and kernel.last.stream == 7


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_whoever_wants_to_be_told_of_launches_is_told_by_triton_itself(kernel: Kernel, hook: str) -> None:
    chain, told = getattr(triton.knobs.runtime, hook), (pointer(), 48)
    launch, grid = Launcher(), (1, 1, 1)
    for _ in range(2):
        launch(kernel, grid, told, {"BLOCK": 16})
    chain.add(print)
    launch(kernel, grid, told, {"BLOCK": 16})
    chain.remove(print)
    launch(kernel, grid, told, {"BLOCK": 16})
    assert [number for number, _ in kernel.launched] == [1, 1, -1, 1]


def test_of_a_triton_whose_hooks_are_not_known_somebody_may_want_to_be_told(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    launching._triton.cache_clear()
    monkeypatch.delattr(triton, "knobs")
    assert numbers(kernel, *[(pointer(), 48)] * 2) == [1, -1]
    launching._triton.cache_clear()


def test_an_address_that_is_not_aligned_takes_a_kernel_of_its_own_before_and_after_aligned_ones(kernel: Kernel) -> None:
    aligned, odd = (pointer(512), pointer(512), 48), (pointer(512), pointer(520), 48)
    assert numbers(kernel, aligned, odd, aligned, aligned, odd, odd, aligned) == [1, 2, 1, 1, 2, 2, 1]


def test_types_and_constants_are_told_apart(kernel: Kernel) -> None:
    launch, grid = Launcher(), (1, 1, 1)
    for dtype, block, warps in ((torch.bfloat16, 16, 4), (torch.float16, 16, 4), (torch.bfloat16, 32, 4)) * 2:
        launch(kernel, grid, (pointer(dtype=dtype),), {"BLOCK": block}, warps=warps)
    launch(kernel, grid, (pointer(),), {"BLOCK": 16}, warps=8)
    assert [number for number, _ in kernel.launched] == [1, 2, 3, 1, 2, 3, 4]


@pytest.mark.parametrize(("hip", "wanted"), [("7.1", [1, 2, 1, 2]), (None, [1, 1, 1, 1])])
def test_a_storage_of_2_gib_and_more_is_another_kernel_on_amd_alone(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, hip: str | None, wanted: list[int]
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    assert numbers(kernel, *[(pointer(size=size),) for size in (2 * GIB - 1, 2 * GIB) * 2]) == wanted


WHOLE = st.integers(-(1 << 40), 1 << 40) | st.sampled_from([0, 1, 2, 16, 17, -1, -16, 1 << 31, (1 << 31) - 1])


@given(st.lists(WHOLE, min_size=1, max_size=12))
def test_numbers_share_a_kernel_only_where_triton_would_share_it(given_: list[int]) -> None:
    def kind(number: int) -> tuple[bool, bool, bool]:
        return number == 1, number % 16 == 0, -(1 << 31) <= number < 1 << 31

    kernel = Kernel()
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in(monkeypatch)
        monkeypatch.setattr(launching, "MOST_EXACT", 3)
        taken = numbers(kernel, *[(pointer(), number) for number in (*given_, *given_)])
    by_kind: dict[tuple[bool, bool, bool], int] = {}
    for number, one in zip((*given_, *given_), taken, strict=True):
        assert by_kind.setdefault(kind(number), one) == one
    assert kernel.compiled == len(by_kind)
