"""Launching a kernel that is compiled already, without asking Triton's binder again.

A training step at few tokens waits for the host, a layer has some ten launches, and Triton's binder does the same work
at each. The first launch goes through it; the compiled kernel is then kept under what it was specialised for, and
called as Triton's own `JITFunction.run` calls it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from radeon_stack.kernels.keys import settle

ALIGNMENT = 16  # bytes, of an address: what Triton tells apart
MOST_EXACT = 4096  # different numbers to remember: of lengths that come and go


def can_run_on(device: torch.device) -> bool:
    """Whether kernels run there: on GPUs, and on a CPU where Triton's interpreter was asked for."""
    return device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def family(device: torch.device) -> str:
    """Whose tiles: 'hip' or 'cuda' (also for the interpreter on a CPU)."""
    return "hip" if torch.version.hip is not None and device.type == "cuda" else "cuda"


@cache
def shared_memory(device: torch.device) -> int | None:
    """Bytes that a program may have on a CUDA card; None where that is not told."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    found: int | None = getattr(properties, "shared_memory_per_block_optin", None)
    return found


class Launcher:
    """Compiled kernels by (kernel, device, options, constants, specialisation of the arguments)."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._exact: dict[tuple[Any, ...], Any] = {}  # the same by the numbers themselves, which is found sooner

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        arguments: Sequence[Any],
        constants: dict[str, Any],
        *,
        warps: int = 4,
        stages: int = 1,
        fp_fusion: bool = True,
    ) -> None:
        """Launch on the first argument's device; an empty grid is nothing to do.

        `constants` are the kernel's constexpr parameters, in its order.
        """
        if 0 in grid:
            return
        device = arguments[0].device.index
        if device is None:  # a CPU: the interpreter, which has nothing to compile
            kernel[grid](*arguments, **constants)
            return
        if _several() and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(kernel, grid, arguments, constants, warps=warps, stages=stages, fp_fusion=fp_fusion)
            return
        values = constants.values()
        # Addresses in the tensors' place: the launcher would ask each for its own, and the driver for its device.
        passed, told, aligned = _looked_at(arguments)
        # The function in the kernel's place, whose hash is its key in Triton's cache: see settle.
        exact = (kernel.fn, device, warps, stages, fp_fusion, *values, *told)
        compiled = self._exact.get(exact) if aligned else None
        if compiled is None:
            key = (*exact[: -len(told)], *map(_specialised, told, passed))
            compiled = self._compiled.get(key)
            if compiled is None:
                settle(kernel)
                options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fp_fusion}
                self._compiled[key] = kernel[grid](*arguments, **constants, **options)
                return
            if aligned:
                if len(self._exact) >= MOST_EXACT:
                    self._exact.clear()
                self._exact[exact] = compiled
        stream_of = _streams()
        if stream_of is None:
            compiled[grid](*passed, *values)
        else:  # no metadata, and no hooks that would read them
            untold = (compiled.function, compiled.packed_metadata, None, None, None)
            compiled.run(*grid, stream_of(device), *untold, *passed, *values)


@cache
def _several() -> bool:
    """Whether there is another device than the current one: torch asks more than once before it says which that is."""
    return torch.cuda.device_count() > 1


def _looked_at(arguments: Sequence[Any]) -> tuple[list[Any], list[Any], bool]:
    """What is passed; what besides addresses decides which kernel is compiled; whether all addresses are aligned.

    Of a tensor its dtype, and on AMD whether its range is small; a number itself (a parameter has ints, or floats).
    """
    amd = torch.version.hip is not None
    passed: list[Any] = []
    told: list[Any] = []
    hand, tell = passed.append, told.append
    addresses = 0
    for argument in arguments:
        kind = type(argument)
        if kind is int or kind is float:  # asked much sooner than whether it is a tensor
            hand(argument)
            tell(argument)
        else:
            address = argument.data_ptr()
            addresses |= address
            hand(address)
            tell((argument.dtype, argument.untyped_storage().size() >> 31 == 0) if amd else argument.dtype)
    return passed, told, addresses % ALIGNMENT == 0


def _streams() -> Any:
    """What gives a device's current stream; None where somebody is to be told of each launch, as Triton's profiler is.

    Nor is it known of Triton before 3.5, whose hooks are elsewhere, that nobody is.
    """
    driver, hooks = _triton()
    told = getattr(hooks.launch_enter_hook, "calls", True) or getattr(hooks.launch_exit_hook, "calls", True)
    return None if told else driver.active.get_current_stream


@cache
def _triton() -> tuple[Any, Any]:
    """Triton's driver and hooks; it is first asked for where a kernel was compiled, and so is there."""
    import triton

    unknown = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    return triton.runtime.driver, triton.knobs.runtime if hasattr(triton, "knobs") else unknown


def _specialised(told: Any, passed: Any) -> Any:
    """What Triton compiles differently for: a pointer's type, alignment and (for AMD's buffer loads) range; a number's
    width, 1, and factors of 16.
    """
    if isinstance(told, int):
        return told % 16 == 0, told == 1, -(1 << 31) <= told < 1 << 31
    return None if isinstance(told, float) else (told, passed % ALIGNMENT == 0)


launch = Launcher()
