"""What a GPU's fault looks like in what a process prints, and what follows from one."""

from __future__ import annotations

import re

_FAULT = re.compile(
    r"Memory access fault by GPU|HSA_STATUS_ERROR_(MEMORY_FAULT|MEMORY_APERTURE_VIOLATION)|GPU Hang"
    r"|HIP error: an illegal memory access|hipErrorIllegalAddress"
)
REMEDY = "reboot before it is used again: after a fault it has hung whole machines"


def tells_of_a_fault(text: str) -> bool:
    """Whether ROCm says there that the GPU faulted."""
    return _FAULT.search(text) is not None
