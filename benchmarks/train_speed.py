"""A fine-tune's speed and memory on the GPU that is here: ours, stock TRL + PEFT + bitsandbytes, and unsloth.

    PYTHONPATH=. python benchmarks/train_speed.py [--out FILE] [--only llama,qwen,…] [--with ours,stock,…]
        [--profile] [--packages unsloth=FOLDER] [--commit HASH]

Models of the real shapes with random weights, drawn tensor by tensor where a checkpoint would be read: what is measured
is the loader's own way, without a disk. Rank 64, adamw_8bit, bf16, activation checkpointing, the sequences all of one
length. Each implementation runs in a process of its own; a step's time is the median of those after the first ones.
`stock_prepared` is stock after PEFT's `prepare_model_for_kbit_training`, as PEFT's guide to quantisation has it: all
that is not quantised is in float32, experts too. TRL's own examples do without.
`qwen-whole` is all of Qwen3-30B-A3B with torch held to an R9700's 29.86 GiB.
`--profile`: two steps more after the timed ones, the last of them under torch's profiler (step_profile.py).
`--smoke` is the same code on tiny sizes, on a CPU too (unsloth trains there by its own CPU backend): its times say
nothing.

unsloth is used as its documentation says, and reads its model from a folder: random weights in bf16 are written there
first, into TMPDIR (16 GB for Llama-8B, 12 GB for `qwen`; not for the whole Qwen), and go when the next model comes.
It runs without a network, and the modules that it writes go with its process.

unsloth 2026.10.9 wants older packages than ours, so it gets a folder of its own. Where torch, triton, transformers
5.17 and what those need are installed, these suffice, all without their dependencies:

    pip install --target FOLDER --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9 trl==1.15.0 datasets==4.8.5 \\
        peft==0.21.2 bitsandbytes==0.50.2 tyro==1.0.17 docstring-parser==0.18.0 typeguard==4.6.1 \\
        cut_cross_entropy==25.1.1 dill==0.4.1 multiprocess==0.70.19 pydantic==2.14.3 pydantic_core==2.50.4 \\
        annotated_types==0.8.0
    … --packages unsloth=FOLDER

(else transformers==5.17.0 too), and for ours and stock, beside the last two lines of them, transformers==5.23.0,
trl==1.16.0 and datasets==5.2.0. `--packages NAME=PATH` is the PYTHONPATH of that implementation's process.
xformers, diffusers, torchao, hf_transfer and msgspec, which unsloth declares, it does without: by its own source
torch's attention matches or beats xformers'. Of its wheel the folder `unsloth/` is enough. Rows come encoded, so it
pads them (all have one length: nothing is padded) in the place of its batches without padding.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # in the place of this folder: its file names are none of a library's business
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks.random_checkpoint import INDEX  # noqa: E402
from benchmarks.step_profile import StepProfiler, beside, summary  # noqa: E402
from benchmarks.train_cases import CASES, IMPLEMENTATIONS, SMOKE, Work  # noqa: E402

STEPS, WARM_UP = 13, 4
PROFILED = 2  # steps: the profiler's warm-up, and the one that is kept
CHILD_SECONDS = 500
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "bitsandbytes",
    "accelerate",
    "unsloth",
    "unsloth_zoo",
)
READ_A_FOLDER = {"unsloth"}
# With an R9700's memory, all 48 layers.
NOT_CAPPED = {
    "stock": "its experts stay in 16 bit, 57 GB",
    "stock_prepared": "its experts are in 32 bit, 114 GB",
    "unsloth": "it reads a folder, which would take 61 GB",
}


def measured(name: str, implementation: str, checkpoint: Path | None, *, smoke: bool, profile: bool) -> dict[str, Any]:
    """The child's side: load, train, and tell."""
    case = (SMOKE if smoke else CASES)[name]
    gpu = torch.cuda.is_available()
    if gpu and case.cap:
        torch.cuda.set_per_process_memory_fraction(case.cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        work = Work(case, STEPS + PROFILED * profile, Path(folder), checkpoint)
        trainer = IMPLEMENTATIONS[implementation](work)
        from radeon_stack.workloads.finetune.base import quantized

        packed = sum(quantized(trainer.model).values())
        if not packed:  # unsloth goes on in 16 bit where bitsandbytes does not work
            raise RuntimeError("nothing of it is in 4 bit")
        loaded = {"seconds": time.monotonic() - begun, "peak_gib": peak(), "host_gib": host_gib()}
        reset_peak()
        trainer.add_callback(watch := watcher(StepProfiler() if profile else None))
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    steps = [after - before for before, after in itertools.pairwise(watch.times)]
    timed = steps[WARM_UP - 1 : STEPS - 1]
    median = statistics.median(timed)
    told = {
        "case": name,
        "implementation": implementation,
        "settings": asdict(case),
        "step_seconds": median,
        "step_seconds_all": timed,
        "tokens_per_second": case.length * case.batch * case.accumulation / median,
        "peak_gib": watch.peak,
        "load": loaded,
        "trained": trained,
        "quantized": packed,
        "losses": losses,
        "versions": {package: _version(package) for package in PACKAGES},
    }
    return told | ({"profile": summary(watch.profiler.ran(), steps[-1])} if watch.profiler else {})


def watcher(profiler: StepProfiler | None) -> Any:
    """A callback with the time at which each step was done on the device, and the peak of the timed ones."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.times: list[float] = []
            self.peak = 0.0
            self.profiler = profiler

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.monotonic())
            if (done := len(self.times)) == STEPS:
                self.peak = peak()
            if profiler and done == STEPS:
                profiler.start()
            elif profiler and done == STEPS + 1:
                profiler.step()
                self.times[-1] = time.monotonic()  # the profiler's own turn is no part of the step
            elif profiler and done == STEPS + PROFILED:
                profiler.stop()

    return Watch()


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def host_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "train_speed.json")
    parser.add_argument("--only", default="", help=f"of {','.join(CASES)}")
    parser.add_argument("--with", dest="implementations", default=",".join(IMPLEMENTATIONS))
    parser.add_argument("--profile", action="store_true", help="one more step, kernel by kernel")
    parser.add_argument("--packages", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--commit", default="", help="where this folder is no repository")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument(
        "--child", nargs=4, metavar=("CASE", "IMPLEMENTATION", "CHECKPOINT", "FILE"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.child:
        case, implementation, checkpoint, file = arguments.child
        told = measured(
            case, implementation, Path(checkpoint) if checkpoint else None,
            smoke=arguments.smoke, profile=arguments.profile,
        )  # fmt: skip
        Path(file).write_text(json.dumps(told))
        return
    cases = SMOKE if arguments.smoke else CASES
    wanted = [name for name in cases if not arguments.only or name in arguments.only.split(",")]
    packages = dict(entry.split("=", 1) for entry in arguments.packages)
    flags = [flag for flag, on in (("--smoke", arguments.smoke), ("--profile", arguments.profile)) if on]
    found: list[dict[str, Any]] = []
    for sizes, names in itertools.groupby(wanted, key=lambda name: (cases[name].kind, cases[name].sizes)):
        with checkpoints(*sizes) as checkpoint:
            for name in names:
                for implementation in arguments.implementations.split(","):
                    if cases[name].cap and (why := NOT_CAPPED.get(implementation)):
                        common = {"case": name, "implementation": implementation}
                        found.append({**common, "failed": f"not tried: {why}"})
                    else:
                        environment = surroundings(packages.get(implementation))
                        found.append(apart(name, implementation, checkpoint, environment, flags))
                    print(line(found[-1]), flush=True)
                    save(arguments.out, found, arguments.commit)
                if told := {
                    one["implementation"]: one["profile"] for one in found if one["case"] == name and "profile" in one
                }:
                    print("\n".join(beside(told)), flush=True)


def surroundings(packages: str | None) -> dict[str, str]:
    """A process's environment: its packages, and no network."""
    quiet = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    return {**os.environ, **quiet, **({"PYTHONPATH": packages} if packages else {})}


@contextmanager
def checkpoints(kind: str, sizes: Mapping[str, Any]) -> Iterator[Callable[[Mapping[str, str]], Path]]:
    """Writes a model's folder when it is first asked for, in a process of its own; it goes when the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "model")

        def ask(environment: Mapping[str, str]) -> Path:
            if not (made / INDEX).is_file():  # what is written last
                script = str(ROOT / "benchmarks" / "random_checkpoint.py")
                subprocess.run(
                    [sys.executable, script, kind, json.dumps(sizes), str(made)],
                    cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=CHILD_SECONDS,
                )  # fmt: skip
            return made

        yield ask


def apart(
    name: str,
    implementation: str,
    checkpoint: Callable[[Mapping[str, str]], Path],
    environment: Mapping[str, str],
    flags: Sequence[str],
) -> dict[str, Any]:
    """One measurement in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "told.json")
        environment = {**environment, "UNSLOTH_COMPILE_LOCATION": str(Path(folder, "compiled"))}
        common = {"case": name, "implementation": implementation}
        try:
            read = str(checkpoint(environment)) if implementation in READ_A_FOLDER else ""
            begun = time.monotonic()
            done = subprocess.run(
                [sys.executable, str(Path(__file__)), *flags, "--child", name, implementation, read, str(file)],
                cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=CHILD_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {**common, "failed": f"no end in {CHILD_SECONDS} s"}
        except subprocess.CalledProcessError as error:
            return {**common, "failed": f"no checkpoint: {error.stderr[-2000:]}"}
        seconds = time.monotonic() - begun
        if not file.is_file():
            return {**common, "failed": done.stderr[-2000:], "process_seconds": seconds}
        told: dict[str, Any] = json.loads(file.read_text())
        return {**told, "process_seconds": seconds}


def line(one: Mapping[str, Any]) -> str:
    head = f"{one['case']:<20} {one['implementation']:<14}"
    if "failed" in one:
        return f"{head} failed: {' '.join(one['failed'].split())[-300:]}"
    load, losses = one["load"], one["losses"]
    return (
        f"{head} {one['step_seconds']:.3f} s/step · {one['tokens_per_second']:,.0f} tokens/s · "
        f"{one['peak_gib']:.2f} GiB · "
        f"loaded in {load['seconds']:.0f} s, {load['peak_gib']:.2f} GiB, host {load['host_gib']:.1f} GiB · "
        f"{one['trained']:,} trained, {one['quantized']:,} in 4 bit · loss {losses[0]:.3f} → {losses[-1]:.3f}"
    )


def save(path: Path, found: Sequence[Mapping[str, Any]], commit: str) -> None:
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    record = {
        "card": {"name": gpu.name, "memory": gpu.total_memory} if gpu else None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "measured": list(found),
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
