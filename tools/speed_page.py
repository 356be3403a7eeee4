"""docs/kernel-speed.md: how the kernels are used, and the figures of benchmarks/kernel_speed*.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from radeon_stack.kernels.audit.table import markdown_table

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
Row = Mapping[str, Any]

HEAD = """<!-- written by tools/docs.py; edit what it reads -->
# Our kernels: what they do, and how fast they were on a CUDA card

```python
from radeon_stack.kernels.interface import pack_experts, register

register()  # "radeon_grouped" and "radeon_nf4", for transformers
model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="radeon_grouped")
pack_experts(model)  # experts to NF4, by bitsandbytes, in place
model.set_experts_implementation("radeon_nf4")  # read packed, decoded tile by tile
```

- `kernels/experts.py`: mixture-of-experts layers over 16-bit or NF4 experts, gradients of everything, adapters an
  expert. Sums have a fixed order: twice is the same to the bit. The host is never asked for a number.
- `kernels/router.py`: the router with its linear layer, softmax, the top experts and their weights, in 16 bit and of up
  to 128 experts in one launch each way; of more than 4096 tokens, or where it is trained, in two or three back.
- `kernels/linear.py`: an NF4 linear layer with a LoRA adapter.
- `kernels/nf4.py`: decoded values are bitsandbytes' to the bit.
- `kernels/jit/turned.py`: on CUDA, decoded values go from registers to the matrix units. NVIDIA's assembler before 13.3
  has such registers written over while a product still reads them (triton-lang/triton issue 9433): a tile that was
  tried and not chosen gave other sums in 40 of 40 calls (`benchmarks/same_bits_before_h200.json`; those in use gave
  none). Products now end within their step, and it gives none (`same_bits_h200.json`); `tools/hopper.py` reads it off
  the machine code of the tiles in use. AMD's kernels have no such products.

Each stands beside a plain-torch reference that reads like its definition. One Triton source for CUDA and AMD.
**On AMD GPUs it was compiled and its binaries read ([kernels.md](kernels.md)), and never run**: the figures below say
nothing about a Radeon.
"""


def page() -> str:
    """The page as Markdown."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in BENCHMARKS.glob("kernel_speed*.json")]
    newest_first = sorted(records, key=lambda one: str(one["card"]["date"]), reverse=True)
    return "\n".join([HEAD, *(line for record in newest_first for line in _section(record))])


def _section(record: Mapping[str, Any]) -> list[str]:
    card, floor, versions = record["card"], record["floor"], record["versions"]
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [f"## {card['name']}, {card['date'][:10]}, transformers {versions['transformers']}", ""]
    told = (
        f"`benchmarks/kernel_speed.py` at commit {card['commit'][:7]}; {software}; driver {card['driver']}. Measured "
        f"on that card first: {floor['bandwidth'] / 1e9:.0f} GB/s, {floor['matrix']['bfloat16'] / 1e12:.0f} TFLOP/s "
        "in bf16. The kernels are that commit's. "
        "Medians of interleaved rounds, caches written over between them. *device* is a captured graph's "
        "time: what is left when the host costs nothing."
    )
    parts += [told, ""]
    for part, title, names in SECTIONS:
        rows = [row for row in record["figures"] if row["part"] == part and row["case"]["dtype"] == "bfloat16"]
        parts += [f"### {title}", "", _table(rows, names), ""]
    return [*parts, "### The targets", "", *_verdicts(record["verdicts"]), ""]


SECTIONS = (
    ("ffn", "Qwen3-30B-A3B's experts, forward and back to the input", ("seq",)),
    ("seed", "The seed's grid: 64 experts of 1408, forward and back", ("batch", "seq")),
    (
        "gating",
        "The router, forward and back; of many layers, one way back through all",
        ("part", "seq", "experts", "layers"),
    ),
    ("linear", "NF4 linear layers with LoRA of rank 64, forward and back", ("out", "in", "tokens")),
)


def _table(rows: Sequence[Row], names: Sequence[str]) -> str:
    lines = []
    for row in rows:
        values = row["values"]
        if "step_seconds" not in values:
            continue
        device = values.get("device_step_seconds")
        lines.append(
            (
                *(str(row["case"].get(name, 1)) for name in names),
                row["implementation"],
                f"{1000 * values['step_seconds']:.3g}",
                f"{1000 * device:.3g}" if device else "–",
                f"{values['step_of_floor']:.1f}"
                + (f" ({device / values['step_floor_seconds']:.1f})" if device else ""),
                f"{values['weights_bytes'] / 2**20:.0f}" if "weights_bytes" in values else "–",
            )
        )
    return markdown_table(
        (*names, "implementation", "ms", "device ms", "× of the floor (device)", "weights MiB"), lines
    )


def _verdicts(verdicts: Sequence[Row]) -> Iterator[str]:
    targets = dict.fromkeys((one["target"], one["bound"], one["at_most"]) for one in verdicts)
    for target, bound, at_most in targets:
        mine = [one for one in verdicts if (one["target"], one["bound"]) == (target, bound)]
        held = sum(one["holds"] for one in mine)
        ratios = [one["ratio"] for one in mine]
        span = f"{min(ratios):.2f}" if len(mine) == 1 else f"{min(ratios):.2f} to {max(ratios):.2f}"
        told = "holds" if held == len(mine) else f"**does not hold in {len(mine) - held} of {len(mine)}**"
        yield f"- {target} {'≤' if at_most else '≥'} {bound:g}: {told} ({span})"
        for one in mine:
            if not one["holds"]:
                device = f", device {one['device']:.2f}" if one["device"] else ""
                yield f"  - {one['ratio']:.2f}{device}: {one['case']}"
