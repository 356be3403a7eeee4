"""What was made, in one folder for other programs: adapter, merged model, GGUF files, card, Modelfile, sums."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from radeon_stack import atomic
from radeon_stack.checksums import SUMS, require_sums, sum_of, sums_of
from radeon_stack.errors import MachineError, UsageError
from radeon_stack.runs.card import Told, card
from radeon_stack.runs.events import read_events
from radeon_stack.runs.sources import is_whole
from radeon_stack.runs.store import Run

PARTS = {
    "adapter": "the LoRA adapter, for PEFT: `PeftModel.from_pretrained(base, 'adapter')`",
    "merged": "the whole model in 16 bit: `from_pretrained('merged')` by transformers, `vllm serve ./merged`",
    "gguf": "for llama.cpp, and with its `Modelfile` for Ollama: `ollama create NAME -f Modelfile`, inside it",
}
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
PREFERRED = ("q4_k_m", "q5_k_m", "q8_0", "bf16", "f16")  # what a Modelfile names
MODELFILE = "Modelfile"


@dataclass(frozen=True)
class Handover:
    """The parts there are, each where it was made; who trained them and who checked them."""

    parts: dict[str, Path]
    training: Told | None
    check: Told | None

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.stat().st_size for folder in self.parts.values() for file in files_of(folder))


def gathered(source: Path) -> Handover:
    """What a run made, and of a checked export what the run made that it took. UsageError where that is nothing."""
    run = Run(source)
    told = Told(run, read_events(run.events))
    earlier = told.config.get("source")
    before = Run(Path(earlier)) if isinstance(earlier, str) and Path(earlier).is_dir() else None
    places = [run.artifacts, *((before.artifacts,) if before else ())]
    # Of two, that of the check. A part that is a link leads out of what was made.
    parts = {
        name: place / name
        for name in PARTS
        for place in reversed(places)
        if is_whole(place / name) and not (place / name).is_symlink()
    }
    if not parts:
        raise UsageError("has nothing to hand over", where=str(source), remedy="see: radeon-stack runs list")
    if not isinstance(earlier, str):
        return Handover(parts, told, None)
    training = Told(before, read_events(before.events)) if before and before.events.is_file() else None
    return Handover(parts, training, told)


def hand_over(found: Handover, folder: Path, tell: Callable[[str, int, int], None]) -> None:
    """Copy all of it to a new folder, which is there once it is whole. `tell` hears what, bytes done and in all.

    CheckError for a part that is not what was made, MachineError where there is no room.
    """
    for part in found.parts.values():
        if not require_sums(part):
            raise UsageError(
                f"nothing vouches for it: it has no {SUMS}",
                where=str(part),
                remedy="was its run stopped, or made by an older radeon-stack? make it again",
            )
    total, free = found.size, shutil.disk_usage(_existing(folder)).free
    if total > free:
        raise MachineError(f"takes {total >> 20:,} MiB, and {free >> 20:,} MiB are free", where=str(folder))
    with atomic.whole_directory(folder) as new:
        done = 0
        for name, part in found.parts.items():
            (new / name).mkdir()
            for file in files_of(part):
                tell(f"{name}/{file.name}", done, total)
                shutil.copyfile(file, new / name / file.name)
                done += file.stat().st_size
        if "gguf" in found.parts:
            (new / "gguf" / MODELFILE).write_text(modelfile(new / "gguf"), encoding="utf-8")
        licences = sorted({file.name for part in found.parts.values() for file in licences_in(part)})
        (new / "README.md").write_text(
            card(found.training, found.check, {name: PARTS[name] for name in found.parts}, licences), encoding="utf-8"
        )
        (new / SUMS).write_text("".join(_sums(new)), encoding="utf-8")
        tell("whole", total, total)


def files_of(folder: Path) -> list[Path]:
    """The files of a part: those that its sums name, and these. Links are not followed: they may lead anywhere."""
    named = {*sums_of(folder), SUMS}
    return sorted(file for file in folder.iterdir() if file.name in named and file.is_file() and not file.is_symlink())


def licences_in(folder: Path) -> Iterator[Path]:
    for pattern in LICENCES:
        yield from folder.glob(pattern)


def modelfile(folder: Path) -> str:
    """Ollama's: it takes chat template and end of turn from the file itself."""
    kinds = {file.stem.partition("-")[2]: file.name for file in sorted(folder.glob("*.gguf"))}
    name = next((kinds[kind] for kind in PREFERRED if kind in kinds), next(iter(kinds.values())))
    return f"FROM ./{name}\nPARAMETER temperature 0.7\nPARAMETER top_p 0.9\n"


def _sums(folder: Path) -> Iterator[str]:
    """In the format of coreutils, with paths: the parts' own sums are files like others."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield f"{sum_of(file)}  {file.relative_to(folder)}\n"


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.is_dir())
