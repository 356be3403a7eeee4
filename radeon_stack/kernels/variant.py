"""One compiled form of a kernel: what the audit compiles, and what a warm cache holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A kernel with one tuning configuration and the types of its arguments.

    Whatever the launcher would turn into a constant is one here too: a stride of 1 is "constexpr" in the signature
    and 1 in `constexprs`.
    """

    name: str
    """"grouped_forward[bf16 128x128x64]": unique among the variants of a target."""
    kernel: Any
    """The triton.JITFunction."""
    signature: Mapping[str, str]
    """Type by parameter, in Triton's names: "*bf16", "*u8", "i32", "fp32", or "constexpr"."""
    constexprs: Mapping[str, Any]
    """Value of each constexpr parameter."""
    num_warps: int
    num_stages: int
    dot: bool
    """It has a tl.dot, so its binary must have matrix instructions."""
    default: bool
    """A default configuration, which may not spill."""
    fp_fusion: bool = True
    """enable_fp_fusion; off where decoded values must be bit-exact."""
    aligned: tuple[str, ...] = ()
    """Pointers and integers that are divisible by 16."""
    large: tuple[str, ...] = ()
    """Pointers into more than 2 GiB: Triton addresses the others with 32-bit offsets."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of Triton's AMD backend, such as waves_per_eu."""
