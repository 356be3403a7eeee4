"""docs/scaling.md: two processes (benchmarks/scaling_cpu.json) and two cards (several_gpus_h200.json) measured, and 64
nodes worked out (scaling_nodes.json)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from radeon_stack.kernels.audit.table import markdown_table

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SHOWN = 2.0  # seconds of a step, of the tables by nodes
Row = Mapping[str, Any]

HEAD = """<!-- written by tools/docs.py; edit what it reads -->
# What scales how: two processes measured, 64 nodes worked out

*data*: each process has the whole model and a part of every batch; the adapters' gradients are averaged once a step.
*sharded*: as *data*, but each has a share of the frozen base, and gathers every layer's packed bytes twice a pass
(FSDP2).
*Strong* scaling shares one step's rows out; *weak* scaling gives each process as many rows as one has alone.
"""

NOT_MEASURED = "Not measured yet: `PYTHONPATH=. python benchmarks/scaling.py`, on a machine that does nothing else.\n"

SOURCE = "https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md"
ARITHMETIC = f"""Nobody here has such a cluster, and **no Radeon was measured**: this is arithmetic on bytes that are
known and seconds that are assumed, by `benchmarks/scaling.py --arithmetic`. `benchmarks/scaling_model.py` has the
formulas: rings as [NCCL-tests]({SOURCE}) counts them, overlap as in PyTorch's papers on
[DDP](https://arxiv.org/abs/2006.15704) and [FSDP](https://arxiv.org/abs/2304.11277). What is known of RCCL between
nodes is in [doctor.md](doctor.md#rs-ki-030).

Assumed:
"""


def page() -> str:
    """The page as Markdown."""
    measured = BENCHMARKS / "scaling_cpu.json"
    found = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else None
    nodes = json.loads((BENCHMARKS / "scaling_nodes.json").read_text(encoding="utf-8"))
    cards = json.loads((BENCHMARKS / "several_gpus_h200.json").read_text(encoding="utf-8"))
    return "\n".join([HEAD, *two_processes(found), *two_cards(cards), *many_nodes(nodes)])


def two_processes(record: Row | None) -> Iterator[str]:
    """What was measured; that nothing was, where there is no record."""
    if record is None:
        yield "## Two processes on a CPU\n"
        yield NOT_MEASURED
        return
    machine = record["machine"]
    yield f"## Two processes on a CPU: {machine['cpu']}, {record['date']}, commit {record['commit'][:7]}\n"
    rows = f"{record['rows_a_pass']} rows of {record['tokens_a_row']} tokens a pass"
    versions = ", ".join(f"{name} {record[name]}" for name in ("torch", "transformers", "peft", "trl", "bitsandbytes"))
    yield f"`benchmarks/scaling.py`: {record['model']}, {rows}, one thread a process, {machine['cores']} cores."
    yield f"{versions}.\n"
    names = ("processes", "passes each", "s/step", "a fifth below", "a fifth above", "steps")
    runs = [
        (
            *(name, str(run["processes"]), str(run["passes"])),
            *(f"{run[key]:.3f}" for key in ("seconds", "p20", "p80")),
            str(run["timed"]),
        )
        for name, run in record["runs"].items()
    ]
    yield markdown_table(("run", *names), runs)
    yield ""
    yield from _found(record["scaling"])
    if "gloo" in record:
        yield from _sent(record["gloo"], record["runs"])


def two_cards(record: Row) -> Iterator[str]:
    """One card, two, and two as if each were on a node of its own."""
    yield f"## Two {record['card']}s: {record['date']}, commit {record['commit'][:7]}\n"
    yield f"`benchmarks/several_gpus.py`: {record['model']}, {record['rows']} rows of {record['tokens']} tokens a step"
    yield "in all: strong scaling. *On two nodes*: a process each, started as a cluster's job starts it on its"
    versions = ", ".join(f"{name} {record[name]}" for name in ("torch", "transformers", "trl", "bitsandbytes"))
    yield f"nodes, and NCCL {record['nccl']} over TCP of the same machine alone (no P2P, no shared memory)."
    yield f"{versions}.\n"
    alone = record["measured"][0]
    rows = [
        (
            "one card" if one["gpus"] == 1 else f"{one['gpus']} cards" + ", on two nodes" * (one["nodes"] > 1),
            "" if one["gpus"] == 1 else one["parallel"],
            f"{one['step_seconds']:.3f}",
            f"{alone['step_seconds'] / one['step_seconds']:.2f}",
            f"{one['peak_memory_bytes'] / 2**30:.2f}",
            f"{max(abs(a / b - 1) for a, b in zip(one['losses'], alone['losses'], strict=True)):.2%}",
        )
        for one in record["measured"]
    ]
    yield markdown_table(("", "", "s/step", "times faster", "GiB a card", "losses apart"), rows)
    yield ""


def _found(scaling: list[Row]) -> Iterator[str]:
    for row in scaling:
        if row["scaling"] == "strong":
            off = f"no loss further than {100 * row['loss_off']:.2g} % from one process's"
            yield f"- strong, {row['parallel']}: two are {row['speed_up']:.2f} times as fast as one; {off}"
        else:
            yield f"- weak, {row['parallel']}: each of two has {row['efficiency']:.0%} of the speed of one alone"
    yield ""


def _sent(gloo: Mapping[str, Row], runs: Mapping[str, Row]) -> Iterator[str]:
    yield "What a step of two sends, timed without any computing, by gloo over loopback; of a step if nothing hid it:\n"
    sent_by = {"gradients": ("data", "sharded"), "layer": ("sharded",)}
    lines = []
    for name, sent in gloo.items():
        alone = sent["times_a_step"] * sent["seconds"]
        of = [run["seconds"] for run in runs.values() if run["parallel"] in sent_by[name]]
        share = f"{alone / of[0]:.0%}" if of else "–"
        each = f"{1000 * sent['seconds']:.1f}"
        lines.append((name, str(sent["times_a_step"]), f"{sent['bytes'] / 1e6:.2f}", each, f"{alone:.3f}", share))
    yield markdown_table(("what", "times a step", "MB", "ms each", "s a step", "of a step"), lines)
    yield ""


def many_nodes(record: Row) -> Iterator[str]:
    """Assumptions, bytes, where it stops to pay, and the tables by nodes."""
    yield "## 1 to 64 nodes, one card each\n"
    yield ARITHMETIC
    yield from _assumed(record["assumptions"])
    yield ""
    yield "What is sent, by the memory estimate (LoRA of rank 64, gradients in bf16, base in NF4):\n"
    sizes = [
        (
            *(name, f"{load['gradients'] / 1e6:.0f}", str(load["layers"]), f"{load['layer'] / 1e6:.0f}"),
            f"{2 * load['layers'] * load['layer'] / 1e9:.1f}",
        )
        for name, load in record["models"].items()
    ]
    yield markdown_table(("model", "gradients, MB a step", "layers", "MB a layer", "sharded: GB a pass"), sizes)
    yield ""
    yield "### Where it stops to pay\n"
    least = f"{record['assumptions']['pays']:.0%}"
    few, many = record["assumptions"]["passes"]
    yield (
        f"The most nodes with which a card still works {least} of its time: weak with {few} passes a step · weak with "
        f"{many} · strong, {record['assumptions']['all_passes']} passes shared out. 1: a second node is not worth it. "
        "What *data* sends does not grow with the passes of a step, so more of them help; *sharded* sends in every "
        "pass, and only longer passes help: a larger batch, longer texts.\n"
    )
    yield _pays(record["cases"])
    yield ""
    for model in record["models"]:
        yield from _by_nodes(model, record)


def _assumed(told: Row) -> Iterator[str]:
    network = told["networks"][0]
    yield f"- a collective gets {network['share']:.0%} of the link's rate, and {1e6 * network['hop']:.0f} µs pass a hop"
    yield "- one card a node; what is between it and the link (PCIe, the host's memory) is no slower than the link"
    yield f"- the way back is {told['backward']:.0%} of a pass; all layers take the same, embeddings and head nothing"
    yield f"- the last {told['bucket_bytes'] >> 20} MiB of the gradients are waited for, whatever the network"
    yield "- nodes are as fast as each other, and nobody else uses the network"
    yield (
        f"- a step of {told['passes'][0]} passes takes a card 2 or 10 s; an H200's, which was measured, is there to "
        "show what a faster card asks of the network"
    )


def _pays(cases: list[Row]) -> str:
    gbits = sorted({case["gbit"] for case in cases})
    groups: dict[tuple[str, ...], dict[float, list[str]]] = {}
    for case in cases:
        seconds = f"{case['step_seconds']:g} s, {case['source'].partition(':')[0]}"
        group = groups.setdefault((case["model"], case["parallel"], seconds), {})
        group.setdefault(case["gbit"], []).append(str(case["pays"]))
    rows = [(*group, *(" · ".join(found[gbit]) for gbit in gbits)) for group, found in groups.items()]
    return markdown_table(("model", "", "a step alone", *(f"{gbit} Gbit/s" for gbit in gbits)), rows)


def _by_nodes(model: str, record: Row) -> Iterator[str]:
    told = record["assumptions"]
    nodes = [str(count) for count in told["nodes"]]
    titles = {
        "weak": f"share of its time that a card works, in %, {told['passes'][0]} passes a step each",
        "strong": f"times faster than one node, {told['all_passes']} passes a step in all",
    }
    shown = [case for case in record["cases"] if case["model"] == model and case["step_seconds"] == SHOWN]
    for scaling, title in titles.items():
        told_as = _percent if scaling == "weak" else _times
        rows = [
            (case["parallel"], str(case["gbit"]), *(told_as(case["values"][count]) for count in nodes))
            for case in shown
            if case["scaling"] == scaling and case["passes"] in (told["passes"][0], told["all_passes"])
        ]
        yield f"### {model}, {SHOWN:g} s a step of {told['passes'][0]} passes: {scaling} scaling\n"
        yield f"{title[0].upper()}{title[1:]}, by nodes.\n"
        yield markdown_table(("", "Gbit/s", *nodes), rows)
        yield ""


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.01 else 1}f}"


def _times(times: float) -> str:
    return f"{times:.{1 if times >= 0.1 else 2}f}"
