"""What the figures were measured on. Everything is read, nothing is set; what cannot be read is None."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from radeon_stack import __version__

NVIDIA_SMI_SECONDS = 10
CLOCKS = ("sclk", "mclk")  # engine and memory, as amdgpu names them


@dataclass(frozen=True)
class Card:
    """A device and its software. `arch` is gfx1201, sm_90 or the CPU's; `memory` in bytes; `l2` in bytes."""

    name: str
    arch: str
    memory: int | None
    l2: int | None
    units: int | None
    driver: str | None
    torch: str
    hip: str | None
    cuda: str | None
    triton: str | None
    python: str
    package: str
    commit: str | None
    date: str
    threads: int | None = None
    clocks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """State when it was read, by moment (`before`, `loaded`, `after`): clocks in MHz, temperature in °C, power in W."""

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def look_at(device: torch.device) -> Card:
    """The card that a torch device is."""
    common: dict[str, Any] = {
        "torch": torch.__version__,
        "hip": torch.version.hip,
        "cuda": torch.version.cuda,
        "triton": installed("triton") or installed("pytorch-triton-rocm"),
        "python": platform.python_version(),
        "package": __version__,
        "commit": commit(Path(__file__).parent),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type != "cuda":
        name = cpu_name()
        arch = platform.machine()
        return Card(name, arch, None, None, None, None, threads=torch.get_num_threads(), **common)
    told = torch.cuda.get_device_properties(device)
    arch = told.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{told.major}{told.minor}"
    return Card(
        name=told.name,
        arch=arch,
        memory=told.total_memory,
        l2=told.L2_cache_size,
        units=told.multi_processor_count,
        driver=driver(device),
        **common,
    )


def state(device: torch.device) -> dict[str, Any]:
    """Clocks (MHz), temperature (°C) and power (W) now, as far as the driver tells; {} for a CPU."""
    if device.type != "cuda":
        return {}
    return amd_state(pci_folder(device)) if torch.version.hip else nvidia_state(device)


def nvidia_state(device: torch.device) -> dict[str, Any]:
    asked = {
        "clocks.sm": "sclk",
        "clocks.mem": "mclk",
        "clocks.max.sm": "sclk_max",
        "temperature.gpu": "temperature",
        "power.draw": "power",
    }
    values = nvidia_smi(device, ",".join(asked)).split(",")
    if len(values) != len(asked):
        return {}
    return {name: number(value) for name, value in zip(asked.values(), values, strict=True)}


def amd_state(folder: Path | None) -> dict[str, Any]:
    """From amdgpu's files: the active line of `pp_dpm_*`, the highest one, and hwmon's sensors."""
    if folder is None:
        return {}
    found: dict[str, Any] = {}
    for name in CLOCKS:
        levels = dpm_levels(read(folder / f"pp_dpm_{name}"))
        found[name] = next((mhz for mhz, active in levels if active), None)
        if name == "sclk":
            found["sclk_max"] = max((mhz for mhz, _ in levels), default=None)
    sensors = next(iter(sorted(folder.glob("hwmon/hwmon*"))), folder)
    temperature, power = number(read(sensors / "temp1_input")), number(read(sensors / "power1_average"))
    found["temperature"] = temperature / 1e3 if temperature is not None else None  # millidegrees
    found["power"] = power / 1e6 if power is not None else None  # microwatts
    return found


def dpm_levels(text: str) -> list[tuple[float, bool]]:
    """(MHz, active) of each line of a `pp_dpm_*` file: `1: 2350Mhz *`."""
    found = re.findall(r"^\s*\w+:\s*(\d+)\s*mhz(\s*\*)?", text, re.MULTILINE | re.IGNORECASE)
    return [(float(mhz), bool(mark)) for mhz, mark in found]


def driver(device: torch.device) -> str | None:
    """NVIDIA's version; amdgpu's own when it is not the kernel's, else the kernel's release."""
    if not torch.version.hip:
        return nvidia_smi(device, "driver_version") or None
    own = read(Path("/sys/module/amdgpu/version")).strip()
    return f"amdgpu {own}" if own else f"amdgpu of Linux {platform.release()}"


def nvidia_smi(device: torch.device, query: str) -> str:
    """The first line that nvidia-smi answers for this device, or "" when it does not."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0]


def pci_folder(device: torch.device) -> Path | None:
    """The device's folder in sysfs; None where this torch does not tell its address."""
    told = torch.cuda.get_device_properties(device)
    try:
        address = f"{told.pci_domain_id:04x}:{told.pci_bus_id:02x}:{told.pci_device_id:02x}.0"
    except AttributeError:
        return None
    return Path("/sys/bus/pci/devices") / address


def cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", read(Path("/proc/cpuinfo")), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or "cpu"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit(folder: Path) -> str | None:
    """The commit that the folder is checked out from, with + when it is changed; None outside a repository."""
    try:
        described = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(described, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def read(path: Path) -> str:
    """A small file's text, or "" when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(1 << 16).decode(errors="replace")
    except OSError:
        return ""


def number(text: str) -> float | None:
    try:
        return float(text.strip())
    except ValueError:
        return None
