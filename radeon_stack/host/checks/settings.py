"""What is set on this machine, and helps or hurts its GPUs: variables, clocks, firmware, the kernel's command line."""

from __future__ import annotations

import re

from radeon_stack.host.checks.finding import Check, Finding, as_root, fail, ok, skipped, warn
from radeon_stack.host.facts import Facts
from radeon_stack.host.machine import WSL_FILES

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
VISIBILITY = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
EXPANDABLE = re.compile(r"expandable_segments\s*:\s*true", re.IGNORECASE)
STUCK_BUSY, STUCK_SHARE = 50, 10  # percent busy; and below a tenth of its clock


def override(facts: Facts) -> Finding:
    """HSA_OVERRIDE_GFX_VERSION makes ROCm load another GPU's code. On a GPU that ROCm knows it only breaks things."""
    value = facts.environment.get("HSA_OVERRIDE_GFX_VERSION")
    if value is None:
        return ok("HSA_OVERRIDE_GFX_VERSION is not set")
    if not facts.machine.gpus:
        return warn(f"HSA_OVERRIDE_GFX_VERSION={value}, and there is no GPU", "unset HSA_OVERRIDE_GFX_VERSION")
    names = {gpu.gfx for gpu in facts.machine.gpus}
    if names == {_pretended(value)}:
        return ok(f"HSA_OVERRIDE_GFX_VERSION={value} says what {min(names)} is, and changes nothing")
    return fail(
        f"HSA_OVERRIDE_GFX_VERSION={value} makes ROCm take {', '.join(sorted(names))} for another GPU: wrong code, "
        "crashes (containers of ours do not inherit it)",
        "unset HSA_OVERRIDE_GFX_VERSION",
    )


def _pretended(value: str) -> str:
    """`gfx1151` of 11.5.1."""
    numbers = value.split(".")
    if len(numbers) != 3 or not all(number.isascii() and number.isdigit() and len(number) < 4 for number in numbers):
        return ""
    major, minor, stepping = (int(number) for number in numbers)
    return f"gfx{major}{minor:x}{stepping:x}"


def allocator(facts: Facts) -> Finding:
    """Options of PyTorch's allocator that ROCm does not have, or that make every allocation slow."""
    for name in ALLOCATOR:
        if EXPANDABLE.search(facts.environment.get(name, "")):
            said = "not there on ROCm before torch 2.11, and hangs with older drivers after it (RS-KI-013, RS-KI-022)"
            return warn(f"{name} asks for expandable_segments: {said}", f"unset {name}")
    if facts.environment.get("PYTORCH_NO_HIP_MEMORY_CACHING"):
        name = "PYTORCH_NO_HIP_MEMORY_CACHING"
        return warn(f"{name} is set: each allocation goes to the driver, which is slow", f"unset {name}")
    return ok("no allocator variable that hurts")


def clock(facts: Facts) -> Finding:
    """A busy card at a tenth of its clock is stuck. Reading the clock asks the card: one that hangs does not answer."""
    if "clocks" in facts.late:
        return fail(
            "a card does not answer when its clock is read, as after a hang",
            as_root(facts, "dmesg | grep -i amdgpu | tail -50"),
            as_root(facts, "reboot"),
        )
    if not facts.clocks:
        return skipped("no card tells its clock")
    for pci, seen in facts.clocks.items():
        if seen.busy >= STUCK_BUSY and seen.now * STUCK_SHARE < seen.most:
            return warn(
                f"{pci} is {seen.busy} % busy at {seen.now} of {seen.most} MHz: its clock is stuck (RS-KI-011)",
                as_root(facts, "reboot"),
            )
    return ok("; ".join(f"{pci}: {seen.now} of {seen.most} MHz" for pci, seen in facts.clocks.items()))


def visibility(facts: Facts) -> Finding:
    """Variables that hide GPUs count one within what the other left. Runs of ours set one of them, and no second."""
    found = [name for name in VISIBILITY if name in facts.environment]
    if not found:
        return ok("no variable hides a GPU")
    said = ", ".join(f"{name}={facts.environment[name]}" for name in found)
    if len(found) > 1:
        return warn(f"{said}: they stack, each counting in what the one before left", f"unset {' '.join(found)}")
    return ok(f"{said}; runs of ours choose by --gpus and do not inherit it")


def large_bar(facts: Facts) -> Finding:
    """Does the CPU see all of a card's memory? Without a large BAR (256 MB) loading is slow, and peer access is off."""
    cards = [gpu for gpu in facts.machine.gpus if not gpu.integrated and gpu.partition is None and gpu.vram > 2 << 30]
    if not cards:
        return skipped("no card with memory of its own")
    small = [gpu for gpu in cards if gpu.visible_vram < gpu.vram]
    if small:
        return warn(
            f"GPU {small[0].index}: the CPU sees {small[0].visible_vram / 2**30:.2f} of "
            f"{small[0].vram / 2**30:.1f} GiB; switch Above 4G Decoding and Resizable BAR on in the firmware"
        )
    return ok("the CPU sees all of each card's memory")


def iommu(facts: Facts) -> Finding:
    """Several cards exchange data by DMA; without `iommu=pt` RCCL warns of instability and hangs."""
    cards = [gpu for gpu in facts.machine.gpus if not gpu.integrated and gpu.partition is None]
    if len(cards) < 2:
        return skipped("one card: nothing goes from card to card")
    fine = [word for word in facts.cmdline if word in ("iommu=pt", "iommu=off", "amd_iommu=off")]
    if fine:
        return ok(f"the kernel was started with {fine[0]}")
    words = facts.distribution.split()
    grub = "sed -i 's/^GRUB_CMDLINE_LINUX=\"/&iommu=pt /' /etc/default/grub"
    ways = {
        "fedora": ("grubby --update-kernel=ALL --args=iommu=pt",),
        "rhel": ("grubby --update-kernel=ALL --args=iommu=pt",),
        "debian": (grub, "update-grub"),
        "ubuntu": (grub, "update-grub"),
        "arch": (grub, "grub-mkconfig -o /boot/grub/grub.cfg"),
        "suse": (grub, "grub2-mkconfig -o /boot/grub2/grub.cfg"),
    }
    add = next((ways[word] for word in words if word in ways), ())
    return warn(
        f"{len(cards)} cards, and the kernel was started without iommu=pt: transfers between them may hang"
        + ("" if add else "; add it to the kernel's command line, and reboot"),
        *(as_root(facts, command) for command in ((*add, "reboot") if add else ())),
    )


def wsl(facts: Facts) -> Finding:
    """On WSL2 a container is given the libraries that Windows' driver brings, and the one by which ROCm finds them.

    The first come with the driver for Windows (then `wsl --shutdown`), the second, librocdxg, with ROCm for WSL;
    an image has to be for one gfx: torch for all of them ends at its start there. Several GPUs do not work together.
    Source: docker/DOCKERHUB-ROCM.md of unslothai/unsloth.
    """
    if not facts.machine.wsl:
        return skipped("not WSL2")
    if facts.wsl_missing:
        said = "; ".join(f"there is no {path}: {WSL_FILES[path]}" for path in facts.wsl_missing)
        return fail(said, as_root(facts, "find / -xdev -name 'librocdxg.so*'"))
    return ok(", ".join(WSL_FILES))


CHECKS = (
    Check("RS112", "HSA_OVERRIDE_GFX_VERSION", override),
    Check("RS113", "allocator variables", allocator),
    Check("RS114", "shader clock", clock),
    Check("RS115", "visibility variables", visibility),
    Check("RS116", "large BAR", large_bar),
    Check("RS117", "iommu=pt", iommu),
    Check("RS118", "WSL2's libraries", wsl),
)
