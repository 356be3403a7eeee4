"""docs/training-speed.md: the figures of benchmarks/train_speed*.json, and where a step's time goes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from radeon_stack.kernels.audit.table import markdown_table

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
REASON = 100  # characters of why something failed
Row = Mapping[str, Any]

HEAD = """<!-- written by tools/docs.py; edit what it reads -->
# Training: how fast, and in how much memory, on a CUDA card

`benchmarks/train_speed.py --profile`: models of the real shapes with random weights, rank 64, adamw_8bit, bf16, every
layer computed again, all sequences of one length. *ours* is what `train-llama` and `train-qwen-moe` run: from commit
7d0d99f on, at 2048 × 4 of Llama, some of a layer's products wait in the host's memory in the place of being computed
again (`speed.keep_products`), and *transfers* are mostly theirs, beside the computing; from b2db4a6 on the adapters'
own and those of the last two layers stay on the card. *stock* is TRL + PEFT + bitsandbytes, and *unsloth* itself, each
as its documentation puts it together and with its own packages. *stock_prepared* is stock after PEFT's
`prepare_model_for_kbit_training`, which PEFT's guide asks for and TRL's examples do without: all that is not quantised
is in float32.
`llama` is Llama-3.1-8B, `qwen` 8 layers of Qwen3-30B-A3B with adapters on attention, `qwen-whole` all 48, with torch
held to an R9700's 29.86 GiB; `qwen-whole-experts` has adapters of rank 8 an expert too. `-short` is 60 tokens × 5 × 2,
else 2048 × 4, and 512 × 1 × 2 for the whole one. Seconds are the median of nine steps.

**No Radeon has run any of it**: the figures say nothing about one. What the host has to do weighs more here than
elsewhere: on this virtual machine a launch, with all that leads to it, takes about 0.06 ms.
"""

EIGHT_BITS = """`benchmarks/fp8_training.py`: twenty steps on one batch of 4 × 512 tokens, for a loss that has to fall;
every layer computed again. `rounded` is a 16-bit checkpoint rounded while it is read, `channel` one with a scale an
output channel, `block` one with a scale for 128 × 128.
"""


def page() -> str:
    """The page as Markdown."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in BENCHMARKS.glob("train_speed*.json")]
    newest_first = sorted(records, key=lambda one: str(one["date"]), reverse=True)
    measured = (line for record in newest_first for line in _section(record))
    return "\n".join([HEAD, *measured, *_eight_bits(), *_several_gpus(), *_estimates()])


def _section(record: Mapping[str, Any]) -> Iterator[str]:
    told = next(row for row in record["measured"] if "versions" in row)["versions"]
    software = ", ".join(f"{name} {told[name]}" for name in ("torch", "triton", "transformers", "trl", "bitsandbytes"))
    yield f"## {record['card']['name']}, {record['date'][:10]}, commit {record['commit'][:7]}"
    yield f"\nOf ours: {software}.\n"
    names = ("case", "implementation", "s/step", "tokens/s", "peak GiB", "loaded in s", "in 4 bit", "trained")
    yield markdown_table(names, [_row(row) for row in record["measured"]])
    for case, rows in groupby(record["measured"], key=lambda row: row["case"]):
        profiles = {row["implementation"]: row["profile"] for row in rows if "profile" in row}
        if profiles:
            yield f"\n### {case}: ms of one step on the device (launches), under the profiler\n"
            yield _profiles(profiles)
    yield ""


def _read(name: str) -> Any:
    return json.loads((BENCHMARKS / name).read_text(encoding="utf-8"))


def _eight_bits() -> Iterator[str]:
    record = _read("fp8_training.json")
    card, day, commit = record["card"]["name"], record["date"][:10], record["commit"][:7]
    yield f"## Llama-3.1-8B from FP8, beside bf16 and NF4: {card}, {day}, commit {commit}\n"
    yield EIGHT_BITS
    names = ("weights from", "s/step", "tokens/s", "peak GiB", "weights GiB", "first loss", "last loss")
    yield markdown_table(names, [_eight_bits_row(row) for row in record["measured"]])
    yield ""


def _eight_bits_row(row: Row) -> tuple[str, ...]:
    if "failed" in row:
        return (row["source"], " ".join(row["failed"].split())[-REASON:], "", "", "", "", "")
    gib = [f"{row[name]:.2f}" for name in ("peak_gib", "weights_gib")]
    speed = (f"{row['step_seconds']:.3f}", f"{row['tokens_per_second']:,.0f}")
    return (row["source"], *speed, *gib, *(f"{row['losses'][place]:.3f}" for place in (0, -1)))


def _several_gpus() -> Iterator[str]:
    record = _read("several_gpus.json")
    yield f"## One GPU and several: {record['card']}, {record['date']}, commit {record['commit'][:7]}\n"
    rows = f"{record['rows']} rows of {record['tokens']} tokens a step in all"
    yield f"`benchmarks/several_gpus.py`: {record['model']}, {rows}, by torchrun and NCCL.\n"
    steps = range(1, 1 + len(record["measured"][0]["losses"]))
    measured = all("peak_memory_bytes" in one for one in record["measured"])
    table = [
        (
            f"{one['gpus']}, shares" if one.get("parallel") == "sharded" else str(one["gpus"]),
            f"{one['step_seconds']:.3f}",
            *([f"{one['peak_memory_bytes'] / 2**30:.2f}"] if measured else []),
            *(f"{loss:.4f}" for loss in one["losses"]),
        )
        for one in record["measured"]
    ]
    memory = ["GiB a GPU"] if measured else []
    yield markdown_table(("GPUs", "s/step", *memory, *(f"loss {step}" for step in steps)), table)
    yield ""


def _estimates() -> Iterator[str]:
    record = _read("estimate.json")
    yield f"## What `--estimate` said, and what was taken: {record['device']}, {record['date']}\n"
    yield f"`benchmarks/estimate.py`: {record['model']}, three steps.\n"
    rows = [
        (name, *(f"{case[key] / 2**30:.2f}" for key in ("estimated", "measured")), f"{100 * case['off']:+.1f} %")
        for name, case in record["cases"].items()
    ]
    yield markdown_table(("case", "estimated GiB", "measured GiB", "off"), rows)
    yield ""


def _row(row: Row) -> tuple[str, ...]:
    head = (row["case"], row["implementation"])
    if "failed" in row:
        return (*head, " ".join(row["failed"].split())[-REASON:], "", "", "", "", "")
    return (
        *head,
        f"{row['step_seconds']:.3f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['peak_gib']:.2f}",
        f"{row['load']['seconds']:.0f}",
        f"{row['quantized'] / 1e9:.2f} billion",
        f"{row['trained'] / 1e6:.1f} million",
    )


def _profiles(profiles: Mapping[str, Row]) -> str:
    def most(kind: str) -> float:
        return max(float(told["kinds"].get(kind, {"seconds": 0})["seconds"]) for told in profiles.values())

    lines = []
    for kind in sorted({kind for told in profiles.values() for kind in told["kinds"]}, key=most, reverse=True):
        cells = [told["kinds"].get(kind) for told in profiles.values()]
        lines.append((kind, *(f"{1e3 * one['seconds']:.1f} ({one['count']})" if one else "–" for one in cells)))
    for name in ("idle", "wall"):
        lines.append((name, *(f"{1e3 * told[f'{name}_seconds']:.1f}" for told in profiles.values())))
    return markdown_table(("kind", *profiles), lines)
