"""Which of a machine's GPUs does a run get? `--gpus 0,2 | all | gfx1201 | >=24GiB`, or what the recipe needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from radeon_stack.catalog.sizes import format_size, parse_size
from radeon_stack.errors import MachineError, UsageError
from radeon_stack.host.gpus import Gpu

WAYS = "0,2 or all or gfx1201 or '>=24GiB'"
WHERE = "--gpus"
GFX = re.compile(r"gfx[0-9a-f]{3,5}")
# A "24 GB" card tells 23.98 GiB: firmware keeps some. Who asks for 24 GiB means that card.
NOMINAL = 0.98


@dataclass(frozen=True)
class Selection:
    """The chosen GPUs, in the kernel's order and all of one gfx, and the reason."""

    gpus: tuple[Gpu, ...]
    why: str


def select(
    gpus: tuple[Gpu, ...],
    asked: str | None,
    *,
    least: int,
    most: int,
    busy: Mapping[int, str] | None = None,
    wsl: bool = False,
) -> Selection:
    """Between `least` and `most` GPUs; `busy` tells who has one. WSL2 does not tell its GPU: it has to be named.

    UsageError for a selection that makes no sense, MachineError for one that this machine cannot give.
    """
    busy = busy or {}
    if wsl and most:
        gpus = (_windows_gpu(asked),)
    if most == 0:
        if asked is not None:
            raise UsageError("this recipe takes no GPU", where=WHERE, remedy="leave it out")
        return Selection((), "the recipe takes no GPU")
    by_number = _numbers(asked)
    if by_number is not None:
        chosen = _numbered(gpus, by_number, most)
        taken = {gpu.index: busy[gpu.index] for gpu in chosen if gpu.index in busy}
        why = f"asked for: {asked}"
    else:
        matching, why = _matching(gpus, asked)
        chosen, taken, why = _enough(matching, asked, why, most, busy)
    _require_usable(chosen)
    _require_one_gfx(chosen)
    if taken:
        index, owner = next(iter(taken.items()))
        raise MachineError(
            f"GPU {index} is in use by {owner}", where=WHERE, remedy="wait for it, choose another, or share it: --share"
        )
    if len(chosen) < least:
        raise MachineError(
            f"needs {least} GPU{'s' * (least > 1)}; {_seen(gpus, chosen, asked)}",
            where=f"{WHERE} {asked}" if asked else "resources.gpus.min",
            remedy="see them: radeon-stack doctor; without a Radeon, try a small model: --preset demo",
        )
    return Selection(chosen, why)


def _windows_gpu(asked: str | None) -> Gpu:
    if asked is None or not GFX.fullmatch(asked):
        raise MachineError(
            "WSL2 does not tell which GPU it is", where=WHERE, remedy="say it: --gpus gfx1201 (RX 9070, R9700), …"
        )
    return Gpu(0, -1, asked, "Windows' GPU", 0, 0, 0, 0, 0, "", "", "", None, "", False, None, ())


def _numbers(asked: str | None) -> list[int] | None:
    if asked is None or not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", asked):
        return None
    return [int(number) for number in asked.split(",")]


def _numbered(gpus: tuple[Gpu, ...], numbers: list[int], most: int) -> tuple[Gpu, ...]:
    there = {gpu.index: gpu for gpu in gpus}
    for number in numbers:
        if number not in there:
            known = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in gpus) or "none"
            raise MachineError(f"no GPU {number}; there are: {known}", where=WHERE)
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"a GPU is named twice in '{','.join(map(str, numbers))}'", where=WHERE)
    if len(numbers) > most:
        raise UsageError(f"this recipe takes at most {most} GPU{'s' * (most > 1)}, not {len(numbers)}", where=WHERE)
    return tuple(there[number] for number in sorted(numbers))


def _matching(gpus: tuple[Gpu, ...], asked: str | None) -> tuple[tuple[Gpu, ...], str]:
    """The GPUs that an expression means; an integrated one only when it is named, or alone."""
    cards = tuple(gpu for gpu in gpus if not gpu.integrated)
    left_out = "; the integrated GPU is left out" if cards and len(cards) < len(gpus) else ""
    cards = cards or gpus
    if asked is None:
        return cards, f"the first that are free{left_out}"
    if asked == "all":
        return cards, f"all{left_out}"
    if GFX.fullmatch(asked):
        return tuple(gpu for gpu in gpus if gpu.gfx == asked), f"every {asked}"
    if asked.startswith(">="):
        least = _size(asked[2:])
        return tuple(gpu for gpu in cards if gpu.memory >= least * NOMINAL), f"at least {format_size(least)}{left_out}"
    raise UsageError(f"'{asked}' is no selection of GPUs; give {WAYS}", where=WHERE)


def _size(text: str) -> int:
    try:
        return parse_size(text.strip())
    except ValueError as error:
        raise UsageError(f"'{text}' is no size; give {error}", where=WHERE) from error


def _enough(
    matching: tuple[Gpu, ...], asked: str | None, why: str, most: int, busy: Mapping[int, str]
) -> tuple[tuple[Gpu, ...], dict[int, str], str]:
    """As many as the recipe takes, free ones first; those of one gfx when nothing was asked for."""
    usable = tuple(gpu for gpu in matching if not gpu.problem) or matching
    free = tuple(gpu for gpu in usable if gpu.index not in busy)
    taken = {gpu.index: busy[gpu.index] for gpu in usable if gpu.index in busy}
    if asked is None and free:
        free = tuple(gpu for gpu in free if gpu.gfx == free[0].gfx)
    if free:
        more = f"; the recipe takes {most}" if len(free) > most else ""
        return free[:most], {}, why + more + (f"; {len(taken)} in use" if taken else "")
    return (), taken, why


def _require_usable(chosen: tuple[Gpu, ...]) -> None:
    for gpu in chosen:
        if gpu.problem:
            raise MachineError(
                f"GPU {gpu.index} ({gpu.name}): {gpu.problem}", where=WHERE, remedy="radeon-stack doctor"
            )


def _require_one_gfx(chosen: tuple[Gpu, ...]) -> None:
    names = list(dict.fromkeys(gpu.gfx for gpu in chosen))
    if len(names) > 1:
        raise MachineError(
            f"an image has code for one gfx; these are {' and '.join(names)}",
            where=WHERE,
            remedy=f"choose: --gpus {' or --gpus '.join(names)}",
        )


def _seen(gpus: tuple[Gpu, ...], chosen: tuple[Gpu, ...], asked: str | None) -> str:
    if not gpus:
        return "no GPU is visible (no KFD topology: is the amdgpu driver loaded?)"
    if asked:
        return f"{len(chosen)} of {len(gpus)} on this machine are meant"
    return f"this machine has {len(chosen)} that it could use"
