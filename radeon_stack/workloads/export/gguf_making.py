"""A merged folder → GGUF, by llama.cpp's own converter and quantizer. A file has its name once it is right."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from radeon_stack.atomic import PARTIAL
from radeon_stack.errors import CheckError, MachineError, WorkloadError
from radeon_stack.workloads.export import apart

# It tells tokenizers apart by what they make of a text, and has rules for those that it knows.
UNKNOWN_TOKENIZER = "pre-tokenizer was not recognized"
CONVERTED = ("bf16", "f16", "q8_0")  # what the converter writes by itself
BITS = {"bf16": 16.0, "f16": 16.0, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.9}  # a weight's, about
FTYPES = {
    "f16": "MOSTLY_F16",
    "q8_0": "MOSTLY_Q8_0",
    "q6_k": "MOSTLY_Q6_K",
    "q5_k_m": "MOSTLY_Q5_K_M",
    "q4_k_m": "MOSTLY_Q4_K_M",
}


def converter() -> Path:
    """llama.cpp's converter, which our wheel of llama-cpp-python carries. MachineError where that wheel is not."""
    spec = importlib.util.find_spec("llama_cpp")
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        if (script := Path(place, "converter", "convert_hf_to_gguf.py")).is_file():
            return script
    raise MachineError(
        "this llama-cpp-python has no converter" if places else "llama-cpp-python is not installed where this runs",
        where="llama_cpp/converter",
        remedy="take the verify image (make image KIND=verify), or leave it to --engine local, which builds the wheel",
    )


@contextmanager
def named_once_right(file: Path) -> Iterator[Path]:
    """A place to write to; what is there gets its name at the end, when it has been compared. Else nothing stays."""
    partial = file.with_name(file.name + PARTIAL)
    partial.unlink(missing_ok=True)
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)  # a full disk needs the room to say so
        raise


def convert(folder: Path, file: Path, kind: str, tick: Callable[[int], None]) -> apart.Done:
    """Convert a folder to a file; `tick` hears how many bytes are written."""
    command = [sys.executable, str(converter()), str(folder), "--outfile", str(file), "--outtype", kind]
    try:
        return apart.run(command, lambda: tick(_size(file)))
    except WorkloadError as error:
        if UNKNOWN_TOKENIZER not in error.what:
            raise
        raise CheckError(
            "llama.cpp does not know this tokenizer: changed, another model's, or newer than its converter",
            where=f"{folder}/tokenizer.json",
            remedy="take the tokenizer of the base as it was published, and merge again",
        ) from error


def quantize(source: Path, file: Path, kind: str, threads: int, tick: Callable[[int], None]) -> apart.Done:
    """Quantise a 16-bit file."""
    request = {"source": str(source), "file": str(file), "kind": kind, "threads": threads}
    return apart.called(__name__, request, lambda: tick(_size(file)))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The child's side of `quantize`: llama.cpp's quantizer, which tells its reason on stderr."""
    from llama_cpp import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{FTYPES[request['kind']]}")
    settings.nthread = request["threads"]
    code = llama_cpp.llama_model_quantize(request["source"].encode(), request["file"].encode(), ctypes.byref(settings))
    if code:
        raise WorkloadError(f"llama.cpp could not quantise to {request['kind']} (code {code})", where="log.txt")
    return {}
