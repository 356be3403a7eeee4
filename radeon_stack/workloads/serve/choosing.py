"""Which file is served, and by which program? Decided from what is there; loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from radeon_stack.contracts.serve import ANY, LLAMA_CPP, VLLM, ServeConfig
from radeon_stack.errors import MachineError, UsageError

# In this order: 8 bit answers as 16 do, in half of the memory; what is smaller does not always, and is asked for.
PREFERRED = ("q8_0", "bf16", "f16", "q6_k", "q5_k_m", "q4_k_m")
MODULES = {LLAMA_CPP: "llama_cpp", VLLM: "vllm"}
EXPORT = "export it: radeon-stack run export-check --from RUN"


@dataclass(frozen=True)
class Served:
    """A GGUF file or a model's folder, the program that serves it, and what clients call it."""

    server: str
    path: Path
    name: str

    def require_whole(self) -> None:
        """CheckError for a GGUF file that is damaged or cut short: llama.cpp would end without a word."""
        if self.server == LLAMA_CPP:
            from radeon_stack.workloads.export.gguf_files import require_whole_gguf

            require_whole_gguf(self.path)


def choose(config: ServeConfig, source: Path, installed: Sequence[str]) -> Served:
    """UsageError where there is nothing of the kind that is asked for, MachineError where its program is not there."""
    files, folder = gguf_files(source), model_folder(source)
    if not files and folder is None:
        raise UsageError(f"{_named(config)} has no GGUF file and no merged model", where="--from", remedy=EXPORT)
    server = config.server
    if server == ANY:
        server = LLAMA_CPP if files and (LLAMA_CPP in installed or folder is None) else VLLM
        server = LLAMA_CPP if config.quantization != ANY else server
    if server not in installed:
        there = ", ".join(installed) or "neither"
        raise MachineError(
            f"{server} is not installed where it runs; of the two there is: {there}", where="config.server"
        )
    return Served(server, _file(config, files) if server == LLAMA_CPP else _folder(config, folder), _named(config))


def gguf_files(source: Path) -> list[Path]:
    """GGUF files of a run, an export's folder or a folder of one's own, by name."""
    folders = (source / "artifacts" / "gguf", source / "gguf", source)
    return next((found for folder in folders if (found := sorted(folder.glob("*.gguf")))), [])


def model_folder(source: Path) -> Path | None:
    """The merged model of a run, or the folder of one."""
    folders = (source / "artifacts" / "merged", source / "merged", source)
    return next(
        (one for one in folders if (one / "config.json").is_file() and any(one.glob("*.safetensors"))),
        None,
    )


def quantization(file: Path) -> str:
    """`q8_0` of `model-q8_0.gguf` or `Model.Q8_0.gguf`."""
    return file.stem.replace("-", ".").rpartition(".")[2].lower()


def _file(config: ServeConfig, files: Sequence[Path]) -> Path:
    by_quantization = {quantization(file): file for file in files}
    for wanted in PREFERRED if config.quantization == ANY else (config.quantization,):
        if wanted in by_quantization:
            return by_quantization[wanted]
    if config.quantization == ANY and files:
        return files[0]
    there = ", ".join(by_quantization) or "none"
    wanted = "GGUF file" if config.quantization == ANY else f"GGUF file in {config.quantization}"
    raise UsageError(f"{_named(config)} has no {wanted}; there is: {there}", where="config.quantization", remedy=EXPORT)


def _folder(config: ServeConfig, folder: Path | None) -> Path:
    if config.quantization != ANY:
        raise UsageError("vLLM serves the merged model, in 16 bit", where="config.quantization", remedy="leave it out")
    if folder is None:
        raise UsageError(
            f"{_named(config)} has GGUF files and no merged model, which is what vLLM serves",
            where="config.server",
            remedy="give the run that merged it (--from RUN), or leave --with out",
        )
    return folder


def _named(config: ServeConfig) -> str:
    """What clients call it: the folder's name on the host, where it may lie at another place here."""
    return config.name or Path(config.source).name
