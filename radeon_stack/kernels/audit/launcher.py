"""Compiles a variant exactly as a launch on an AMD GPU would, on a machine without one.

Triton's own launcher is asked, not `triton.compile`: it decides which arguments become constants, what it may assume
of the others, and with that the key under which the binary is cached. It only has to be told what GPU there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from radeon_stack.kernels.keys import settle
from radeon_stack.kernels.variant import Variant

NOT_A_POWER = 17  # an integer that is neither 1 nor divisible by 16: the launcher assumes nothing of it
WIDE = 1 << 40  # … and that needs 64 bits


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant."""

    assembly: str
    ttgir: str
    """Triton's GPU dialect, in which each value has its layout."""
    shared: int
    """Bytes of LDS that the launch adds to those in the assembly."""
    key: str
    """The binary's folder in the cache."""


def compile_variant(variant: Variant, arch: str) -> Compiled:
    """`compile_kernel`, and what it made."""
    return read_compiled(compile_kernel(variant, arch))


def compile_kernel(variant: Variant, arch: str) -> Any:
    """Compile one variant for a GPU of `arch`, into the cache folder that TRITON_CACHE_DIR names.

    A triton.compiler.CompiledKernel. It leaves Triton believing that this GPU is there: meant for a process of its
    own. ValueError when the launcher does not see the arguments as the variant's signature tells them; errors of the
    compiler pass through.
    """
    pretend(arch)
    settle(variant.kernel)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": variant.fp_fusion}
    arguments = [_argument(variant, name) for name in variant.kernel.arg_names]
    made = variant.kernel.run(*arguments, grid=(1,), warmup=True, **options, **variant.options)
    _agree(variant.signature, made.src.signature)
    return made


def pretend(arch: str) -> None:
    """Have Triton believe that the GPU of this process is an AMD one of `arch`."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(_Driver(GPUTarget("hip", arch, wave_size(arch))))


def wave_size(arch: str) -> int:
    """Work-items of a wave: of CDNA 64, of RDNA 32, which is what Triton compiles for."""
    return 64 if arch.startswith("gfx9") else 32


def read_compiled(made: Any) -> Compiled:
    """What a triton.compiler.CompiledKernel holds."""
    return Compiled(made.asm["amdgcn"], made.asm["ttgir"], made.metadata.shared, made.hash)


@dataclass(frozen=True)
class _Driver:
    """As much of a driver as the launcher asks before it compiles."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    @property
    def utils(self) -> Any:
        """What Triton compiled to talk to HIP; compiled when it is not there yet, and HIP is."""
        from triton.backends.amd.driver import HIPUtils

        return HIPUtils()


@dataclass(frozen=True)
class _Pointer:
    """As much of a tensor as the launcher asks of an argument."""

    dtype: str
    address: int
    size: int

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return self.size


def _argument(variant: Variant, name: str) -> Any:
    """A value that the launcher sees as the signature says."""
    if name not in variant.signature:
        raise ValueError(f"the signature has no type for {name}")
    kind, aligned = variant.signature[name], name in variant.aligned
    if kind == "constexpr":
        return variant.constexprs[name]
    if kind.startswith("*"):
        return _Pointer(kind.removeprefix("*"), 0 if aligned else 1, WIDE if name in variant.large else 0)
    if kind in ("i32", "i64"):
        return (WIDE if kind == "i64" else 0) + (16 if aligned else NOT_A_POWER)
    if kind == "fp32":
        return 0.5
    if kind == "u1":
        return True
    raise ValueError(f"no argument of type {kind}, as {name} is said to be")


def _agree(told: Mapping[str, str], seen: Mapping[str, str]) -> None:
    wrong = [f"{name} is {seen.get(name)}, not {kind}" for name, kind in told.items() if seen.get(name) != kind]
    if wrong or len(told) != len(seen):
        raise ValueError("to the launcher " + ("; ".join(wrong) or "there are other parameters"))
