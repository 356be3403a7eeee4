"""Our kernels on the GPU that is here, against what people use today: the suites' figures, and what was aimed for.

    PYTHONPATH=. python benchmarks/kernel_speed.py [--out FILE] [--commit HASH] [--only ffn,seed,gating,linear]

Needs torch, triton, transformers, bitsandbytes and peft, and this folder's parent. `ffn` is Qwen3-30B-A3B's experts,
`seed` the seed's grid against the eager loop, `gating` the router, `linear` an NF4 layer with LoRA; before them
`decode` compares NF4 decoding with bitsandbytes' to the bit. In each, every implementation first shows how far from
float64 it is, then those that are right are timed: one process, interleaved rounds, caches written over, medians.
"device" is the time of a captured graph: what is left when the host costs nothing.

Kernels are compiled beforehand by several processes. The measuring process is restarted after a crash, without the part
that it crashed in. `--smoke` is the same code on a CPU, on tiny sizes: its times say nothing.
Exit 0, though targets be missed; with --check 7.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # in the place of this folder: transformers and bitsandbytes import a package `kernels`
    sys.path[0] = str(ROOT)

from benchmarks.kernel_targets import Verdict, judge  # noqa: E402
from radeon_stack.figures import Case, case_label, milliseconds  # noqa: E402

PARTS = ("ffn", "seed", "gating", "linear")
COMPILE_SECONDS = 150
MISSED = 7
QWEN3 = {"hidden": 2048, "intermediate": 768, "experts": 128, "top_k": 8}
SEED = {"hidden": 2048, "intermediate": 1408, "experts": 64, "top_k": 8}
TINY = {"hidden": 64, "intermediate": 64, "experts": 4, "top_k": 2}
LAYERS = 48  # of Qwen3-30B-A3B, each with its router
EXPERTS = ("eager", "grouped_mm", "dequantize_grouped_mm", "radeon_grouped", "radeon_nf4")
LINEARS = ("peft", "peft_16bit", "radeon_linear")
ROUTERS = ("transformers", "radeon_router")
SLOW = ("eager",)  # a tenth of a second a call: some rounds of its own
BUDGET: dict[str, Any] = {"seconds": 0.1, "least": 11, "most": 50, "warmup": 2, "warmup_seconds": 0.02}
SLOW_BUDGET: dict[str, Any] = {"seconds": 0.3, "least": 3, "most": 5, "warmup": 0, "warmup_seconds": 0.0}
SMOKE_BUDGET: dict[str, Any] = {"seconds": 1e-3, "least": 2, "most": 2, "warmup": 0, "warmup_seconds": 0.0}


@dataclass(frozen=True)
class Entry:
    """A case of a part, its implementations, and the phases that are timed (none: only compared)."""

    part: str
    suite: str
    case: Case
    names: Sequence[str]
    phases: Sequence[str] = ("forward", "backward", "step")


def plan(*, smoke: bool) -> Iterator[Entry]:
    """Everything that is compared and timed."""
    halves = ("float16",) if smoke else ("bfloat16", "float16")
    main = halves[0]
    qwen3, seed = (TINY, TINY) if smoke else (QWEN3, SEED)

    def ffn(part: str, dtype: str, sizes: Mapping[str, int], batch: int, seq: int, routing: str, **more: Any) -> Entry:
        case: Case = {"dtype": dtype, "batch": batch, "seq": seq, **sizes, "routing": routing}
        return Entry(part, "ffn", case, **{"names": EXPERTS, **more})

    for tokens in (5, 24) if smoke else (128, 512, 2048, 4096):
        yield ffn("ffn", main, qwen3, 1, tokens, "even")
    for tokens, routing in ((1, "even"), (24, "skewed"), (24, "single")) if smoke else (
        (1, "even"), (2048, "skewed"), (512, "single")):  # fmt: skip
        yield ffn("ffn", main, qwen3, 1, tokens, routing, phases=())
    if not smoke:
        yield ffn("ffn", "float16", qwen3, 1, 512, "even", phases=())
    for dtype in halves:
        for batch in (1, 4):
            for seq in (3, 6) if smoke else (128, 512):
                names = [name for name in EXPERTS if name != "dequantize_grouped_mm"]
                yield ffn("seed", dtype, seed, batch, seq, "even", names=names, phases=("step",))
    for part in ("router", "bare"):
        for tokens, experts in ((24, 8),) if smoke else ((128, 128), (512, 128), (2048, 128), (4096, 128), (2048, 64)):
            sizes = {"batch": 1, "seq": tokens, "hidden": qwen3["hidden"], "experts": experts, "top_k": qwen3["top_k"]}
            for layers in (1, 3) if smoke else (1, LAYERS) if part == "router" else (1,):
                yield Entry("gating", "gating", {"dtype": main, **sizes, "part": part, "layers": layers}, ROUTERS)
    for out, wide in ((64, 128),) if smoke else ((4096, 4096), (4096, 14336), (14336, 4096)):
        for tokens in (5, 24) if smoke else (16, 64, 128, 256, 512, 1024):
            sizes = {"tokens": tokens, "out": out, "in": wide, "rank": 4 if smoke else 64}
            yield Entry("linear", "linear", {"dtype": main, **sizes}, LINEARS, ("step",))
    if not smoke:
        sizes = {"tokens": 256, "out": 4096, "in": 4096, "rank": 64}
        yield Entry("linear", "linear", {"dtype": "float16", **sizes}, LINEARS, ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "kernel_speed.json")
    parser.add_argument("--commit", help="where this folder is no repository")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--check", action="store_true", help="exit 7 where a target is missed")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)), help="that compile")
    parser.add_argument("--inside", choices=["compile", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--parts", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if arguments.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    if arguments.inside == "compile":
        compile_share(arguments)
    elif arguments.inside == "measure":
        measure_parts(arguments)
    else:
        sys.exit(conduct(arguments))


def conduct(arguments: argparse.Namespace) -> int:
    """The parent, which never touches the device: compile, measure, judge."""
    begun = time.monotonic()
    parts = ["decode", *(part for part in PARTS if part in arguments.only.split(","))]
    record: dict[str, Any] = {"done": [], "crashed": {}, "decode": [], "proofs": [], "figures": [], "failed": []}
    save(arguments.out, record)
    if not arguments.smoke:
        compile_all(arguments)
    compiled = time.monotonic() - begun
    while left := [part for part in parts if part not in record["done"] and part not in record["crashed"]]:
        command = [*myself(arguments), "--inside", "measure", "--parts", ",".join(left)]
        ended = subprocess.run(command, check=False).returncode
        record = json.loads(arguments.out.read_text())
        remaining = [part for part in left if part not in record["done"]]
        if remaining:  # it ended in the first of them
            record["crashed"][remaining[0]] = f"exit {ended}"
            print(f"!! {remaining[0]}: the process ended with {ended}", flush=True)
            save(arguments.out, record)
    verdicts = judge(record, parts)
    record["verdicts"] = [{**asdict(one), "holds": one.holds} for one in verdicts]
    record["seconds"] = {"compiling": round(compiled, 1), "all": round(time.monotonic() - begun, 1)}
    save(arguments.out, record)
    tell(record, verdicts, arguments.out)
    return MISSED if arguments.check and not all(one.holds for one in verdicts) else 0


def myself(arguments: argparse.Namespace) -> list[str]:
    """This script again, with what it was told."""
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(arguments.out), "--only", arguments.only]
    command += ["--commit", arguments.commit] if arguments.commit else []
    return command + (["--smoke"] if arguments.smoke else [])


def save(path: Path, record: Mapping[str, Any]) -> None:
    """All of it, whole or not at all: what is measured outlives a crash."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(path)


def compile_all(arguments: argparse.Namespace) -> None:
    """Run each of our kernels once, in several processes: Triton keeps on disk what it compiles."""
    count, begun = arguments.workers, time.monotonic()
    workers = [
        subprocess.Popen([*myself(arguments), "--inside", "compile", "--share", f"{number}/{count}"])
        for number in range(count)
    ]
    for worker in workers:
        try:
            worker.wait(max(1.0, COMPILE_SECONDS - (time.monotonic() - begun)))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    print(f"compiled by {count} processes in {time.monotonic() - begun:.0f} s", flush=True)


def compile_share(arguments: argparse.Namespace) -> None:
    """A worker: its share of what is ours."""
    import torch

    from radeon_stack.workloads.bench.suite import SUITES, find_suite
    from radeon_stack.workloads.bench.work import free, reason

    device = the_device(arguments)
    number, count = map(int, arguments.share.split("/"))
    wanted = arguments.only.split(",")
    ours = [(entry, name) for entry in plan(smoke=arguments.smoke) if entry.part in wanted
            for name in entry.names if name.startswith("radeon")]  # fmt: skip
    random.Random(0).shuffle(ours)  # noqa: S311  # so that each share has long and short ones
    for entry, name in ours[number::count]:
        suite = find_suite(SUITES[entry.suite])
        try:
            suite.build(name, suite.setting(entry.case, device, 0)).results()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # told again, with its figure, when it is measured
            print(f"compile: {case_label(entry.case)} | {name} | {reason(error)}", flush=True)
        free(device)


def the_device(arguments: argparse.Namespace) -> Any:
    import torch

    if not arguments.smoke and not torch.cuda.is_available():
        sys.exit("torch sees no GPU; --smoke runs on a CPU")
    return torch.device("cpu" if arguments.smoke else "cuda")


def measure_parts(arguments: argparse.Namespace) -> None:
    """The measuring process: part after part, saved after each."""
    import torch

    from radeon_stack.workloads.bench.card import installed, look_at, state
    from radeon_stack.workloads.bench.floor import Floor, measure_floor

    device = the_device(arguments)
    record = json.loads(arguments.out.read_text())
    if "floor" not in record:
        before = state(device)
        dtypes = dict.fromkeys(str(entry.case["dtype"]) for entry in plan(smoke=arguments.smoke))
        record["floor"] = measure_floor(device, dtypes).facts()
        record["card"] = {**look_at(device).facts(), "clocks": {"before": before, "loaded": state(device)}}
        record["card"]["commit"] = arguments.commit or record["card"]["commit"]
        names = ("torch", "triton", "transformers", "bitsandbytes", "peft")
        record["versions"] = {name: installed(name) for name in names}
        record["budget"] = {"usual": BUDGET, "slow": SLOW_BUDGET}
    floor, begun = Floor(**record["floor"]), time.monotonic()
    for part in arguments.parts.split(","):
        if part == "decode":
            record["decode"] = list(decoding(device, smoke=arguments.smoke))
        for number, entry in enumerate(one for one in plan(smoke=arguments.smoke) if one.part == part):
            measure_entry(entry, record, device, floor, smoke=arguments.smoke)
            save(arguments.out, record)
            if not number:
                gc.freeze()  # what this part imported stays: looking through it each time costs more than measuring
        if device.type == "cuda":
            torch.cuda.synchronize()  # a fault of the device would meet every later part: let it end this process here
        record["done"].append(part)
        record["card"]["clocks"]["after"] = state(device)
        save(arguments.out, record)
        print(f"[{time.monotonic() - begun:4.0f} s] {part} is done", flush=True)


def decoding(device: Any, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Our NF4 decoding beside bitsandbytes', to the bit, on memory that held NaN before."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from radeon_stack.kernels.nf4 import decode, from_bitsandbytes
    from radeon_stack.workloads.bench.work import reason

    for dtype in (torch.float16,) if smoke else (torch.bfloat16, torch.float16):
        for double in (True, False):
            for shape in ((3, 5, 64),) if smoke else ((3, 5, 64), (129, 4096), (16, 1536, 2048)):
                told: dict[str, Any] = {"dtype": str(dtype)[6:], "double": double, "shape": list(shape)}
                try:
                    generator = torch.Generator(device).manual_seed(0)
                    matrix = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
                    kind: dict[str, Any] = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": double}
                    packed, state = quantize_4bit(matrix, **kind)
                    true = dequantize_4bit(packed, state)
                    held = [torch.full_like(matrix, float("nan")) for _ in range(3)]
                    del held
                    found = decode(from_bitsandbytes(packed, state))
                    same = found.view(torch.int16) == true.view(torch.int16)
                    told |= {"equal": bool(same.all()), "different": int((~same).sum())}
                except Exception as error:
                    told |= {"equal": False, "error": reason(error)}
                print(f"decode {told}", flush=True)
                yield told


def measure_entry(entry: Entry, record: dict[str, Any], device: Any, floor: Any, *, smoke: bool) -> None:
    """Compare all of an entry's implementations, time those that are right, and add both to the record."""
    from radeon_stack.workloads.bench.suite import SUITES
    from radeon_stack.workloads.bench.work import free, prove, reason

    fit = []
    for name in entry.names:
        task = {"suite": SUITES[entry.suite], "case": entry.case, "seed": 0, "implementation": name}
        proof = {"part": entry.part, "case": dict(entry.case), "implementation": name, **prove(task, device)}
        record["proofs"].append(proof)
        if proof["state"] == "ok":
            fit.append(name)
        values = proof["values"]
        off = " ".join(f"{key[11:]} {value:.1e}" for key, value in values.items() if key.startswith("difference_"))
        print(f"{case_label(entry.case)} | {name} | {proof['state']} | {off} | {proof['note']}", flush=True)
    if not entry.phases or not fit:
        return
    try:
        figures = timed(entry, fit, record["failed"], device, floor, smoke=smoke)
    except Exception as error:
        record["failed"].append({"part": entry.part, "case": dict(entry.case), "why": reason(error)})
        print(f"{case_label(entry.case)} | failed: {reason(error)}", flush=True)
        return
    finally:
        free(device)
    record["figures"] += figures
    for figure in figures:
        print(figure_text(figure), flush=True)


def timed(
    entry: Entry, names: Sequence[str], failed: list[Any], device: Any, floor: Any, *, smoke: bool
) -> list[dict[str, Any]]:
    """Times of the implementations, by phase, as they are called; and of `step` as a captured graph."""
    from radeon_stack.workloads.bench.suite import SUITES, find_suite
    from radeon_stack.workloads.bench.timing import Budget, measure
    from radeon_stack.workloads.bench.work import phase_values, seed_of

    suite = find_suite(SUITES[entry.suite])
    setting = suite.setting(entry.case, device, seed_of(entry.case, 0))
    built = {name: suite.build(name, setting) for name in names}
    values: dict[str, dict[str, Any]] = {name: dict(built[name].values) for name in names}
    notes: dict[str, list[str]] = {name: [] for name in names}
    quick = [name for name in names if name not in SLOW]
    slow = [name for name in names if name in SLOW]
    usual, long = (Budget(**(SMOKE_BUDGET if smoke else budget)) for budget in (BUDGET, SLOW_BUDGET))
    races = [(phase, quick, usual, False) for phase in entry.phases]
    races += [("step", slow, long, False), ("step", quick, usual, True)]
    for phase, racing, budget, graph in races:
        calls = {name: built[name].calls[phase] for name in racing}
        if not calls:
            continue
        found = measure(calls, device=device, budget=budget, flush=not smoke, graph=graph)
        for name, why in found.failed.items():
            notes[name].append(f"{phase}{' as a graph' if graph else ''}: {why}")
            failed.append(
                {"part": entry.part, "case": dict(entry.case), "implementation": name, "why": notes[name][-1]}
            )
        for name, timing in found.times.items():
            work = built[name].work.get(phase) or suite.work(entry.case)[phase]
            told = phase_values(phase, timing, work, floor)
            if not graph:
                values[name] |= told
            elif timing.graph:
                values[name] |= {f"device_{key}": value for key, value in told.items()}
            else:
                notes[name].append(timing.note)
    common = {"part": entry.part, "case": dict(entry.case)}
    return [{**common, "implementation": name, "values": values[name], "notes": notes[name]} for name in names]


def figure_text(figure: Mapping[str, Any]) -> str:
    """`bf16 b1 s128 … | radeon_nf4 | 1.09 ms (1.05 ms to 1.12 ms) | device 0.88 ms | … | 2.40× of the floor …`"""
    values = figure["values"]
    parts = [case_label(figure["case"]), figure["implementation"]]
    if "step_seconds" in values:
        low, high = (milliseconds(values[f"step_seconds_{name}"]) for name in ("p20", "p80"))
        parts.append(f"{milliseconds(values['step_seconds'])} ({low} to {high})")
    if "device_step_seconds" in values:
        parts.append(f"device {milliseconds(values['device_step_seconds'])}")
    for phase in ("forward", "backward"):
        if f"{phase}_seconds" in values:
            parts.append(f"{phase} {milliseconds(values[f'{phase}_seconds'])}")
    floors = [f"{values[f'{name}of_floor']:.2f}×" for name in ("step_", "device_step_") if f"{name}of_floor" in values]
    if floors:
        bound = "memory" if values.get("step_memory_bound") else "compute"
        parts.append(f"{' '.join(floors)} of the floor ({bound})")
    if "weights_bytes" in values:
        parts.append(f"weights {values['weights_bytes'] / 2**20:.0f} MiB")
    if "step_peak_bytes" in values:
        parts.append(f"peak {values['step_peak_bytes'] / 2**20:.0f} MiB")
    if "step_tokens_per_second" in values:
        parts.append(f"{values['step_tokens_per_second']:.3g} tokens/s")
    parts += ["stable"] if values.get("step_stable") else []
    return " | ".join([*parts, *figure["notes"]])


def tell(record: Mapping[str, Any], verdicts: Sequence[Verdict], path: Path) -> None:
    """Figures, then verdicts, then what they are of."""
    print("\nFigures (forward + backward to the inputs)")
    for figure in record["figures"]:
        print("  " + figure_text(figure))
    on_cpu = record.get("card", {}).get("memory") is None
    print("\nTargets" + (" (on a CPU, by the interpreter: ratios of times say nothing)" if on_cpu else ""))
    for one in verdicts:
        sign, ratio = "≤" if one.at_most else "≥", "not measured" if one.ratio is None else f"{one.ratio:.2f}"
        device = "" if one.device is None else f" (device {one.device:.2f})"
        holds = "holds" if one.holds else "does not hold"
        print(f"  {holds:<13} {ratio}{device}, {sign} {one.bound:g} | {one.target} | {one.case}")
    for part, why in record["crashed"].items():
        print(f"  crashed: {part}, {why}")
    for one in record["failed"]:
        print(f"  failed: {one}")
    missed = sum(not one.holds for one in verdicts)
    print(f"\n{len(verdicts) - missed} of {len(verdicts)} hold")
    if "card" not in record:
        return
    card, floor = record["card"], record["floor"]
    rates = ", ".join(f"{name} {rate / 1e12:.1f} TFLOP/s" for name, rate in floor["matrix"].items())
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    print(
        f"{card['name']} ({card['arch']}), driver {card['driver']}, {card['date']}, commit {card['commit']}; {versions}"
    )
    print(f"floor: {floor['bandwidth'] / 1e9:.0f} GB/s, {rates}; {record['seconds']}; {path}")


if __name__ == "__main__":
    main()
