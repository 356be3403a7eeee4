"""The labels that images of ours carry: what they are found, chosen and compared by."""

from __future__ import annotations

KIND = "radeon-stack.kind"
PLATFORM = "radeon-stack.platform"
KEY = "radeon-stack.key"
BASE = "radeon-stack.base"
ROCM = "radeon-stack.rocm"
GFX = "radeon-stack.gfx"
DRIVERS = "radeon-stack.drivers"
TORCH = "radeon-stack.torch"
WHEELS = "radeon-stack.wheels"
