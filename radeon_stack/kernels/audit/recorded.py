"""The kernels that somebody's host code launches, compiled for an AMD GPU that is not here, and not launched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from radeon_stack.kernels.audit.launcher import Compiled, pretend, read_compiled

OPTIONS = ("num_warps", "num_stages", "waves_per_eu")


@dataclass(frozen=True)
class Launch:
    """One launch: what was compiled, and how it would have been run."""

    kernel: str
    options: Mapping[str, Any]
    """num_warps, num_stages, waves_per_eu, as the compiler took them."""
    sizes: Mapping[str, int]
    """Constants that are whole numbers above 1, by name: block sizes and the like."""
    grid: tuple[int, ...]
    compiled: Compiled


@contextmanager
def recorded(arch: str, change: Mapping[str, Any] | None = None) -> Iterator[list[Launch]]:
    """Compile each launch of a Triton kernel within, with its own arguments and options, and launch none.

    `change` replaces parameters and options by name, where a launch has them. Of an autotuned kernel every
    configuration is compiled. Tensors may be on any device, `meta` too: of them the launcher asks the type, the
    address and the size. Patches Triton, so for a process of its own.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    pretend(arch)
    launches: list[Launch] = []
    launch, tune = JITFunction.run, Autotuner.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        bound, _, own = kernel.device_caches[0][-1](*arguments, **options)
        told = {name: (change or {}).get(name, value) for name, value in (bound | own).items()}
        made = launch(kernel, grid=grid, warmup=True, **told)
        launches.append(_launch(kernel, made, told, grid))
        return made

    def compile_all(tuner: Any, *arguments: Any, **options: Any) -> None:
        for config in tuner.configs:
            tuner.fn.run(*arguments, **options, **config.all_kwargs())

    JITFunction.run, Autotuner.run = compile_only, compile_all
    try:
        yield launches
    finally:
        JITFunction.run, Autotuner.run = launch, tune


def _launch(kernel: Any, made: Any, told: Mapping[str, Any], grid: Any) -> Launch:
    values = {name: getattr(value, "value", value) for name, value in told.items()}
    sizes = {kernel.arg_names[place]: values[kernel.arg_names[place]] for place in kernel.constexprs}
    return Launch(
        kernel.fn.__name__,
        {name: getattr(made.metadata, name) for name in OPTIONS},
        {name: value for name, value in sizes.items() if type(value) is int and value > 1},
        tuple(grid(values) if callable(grid) else grid),
        read_compiled(made),
    )
