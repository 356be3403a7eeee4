"""`report.html`: one file that stands alone and tells a run, at any moment and however it ended."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radeon_stack import __version__, atomic
from radeon_stack.contracts.capabilities import Answer, counts
from radeon_stack.runs import bench_report, charts, loaded
from radeon_stack.runs.events import (
    Artifact,
    Attempt,
    Event,
    Fact,
    Loaded,
    Measurement,
    Progress,
    metrics_by_step,
    read_events,
)
from radeon_stack.runs.measurements import counted, measurements_of, quickest
from radeon_stack.runs.store import Run, Status
from radeon_stack.runs.summary import PHASES, answers_of, last_result, phases_of, samples_of, steps_of_last

CHARTS = (("loss", "Loss"), ("grad_norm", "Gradient norm"), ("learning_rate", "Learning rate"))
TOLD_APART = (
    "export",
    "lora_before",
    "lora_after",
    "data",
    "batches",
    "prompt",
    "environment",
    "model",
    "merge",
    "card",
)
LOG_SPAN = 100.0  # a curve that falls by more than this is shown on a logarithmic axis too
TILES_ACROSS = 6  # that the page has room for
STATISTICS = ("mean", "std", "min", "q25", "median", "q75", "max")


@dataclass(frozen=True)
class Chart:
    """A curve with its name."""

    title: str
    svg: str


@dataclass(frozen=True)
class Column:
    """The samples of a phase."""

    title: str
    samples: list[Any]
    score: str


@dataclass(frozen=True)
class Stage:
    """A stage and how long it took, in seconds."""

    name: str
    seconds: float


def write(run: Run) -> Path:
    """Write the run's report, whole; returns its path."""
    atomic.write_text(run.report, render(run))
    return run.report


def render(run: Run) -> str:
    """The report's HTML. Everything in it is untrusted text and escaped; it holds no script and loads nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "size": size, "value": plain, "rows": rows}
    return environment.get_template("report.html.j2").render(**contents(run))


def contents(run: Run) -> dict[str, Any]:
    """All that the template shows."""
    events = read_events(run.events)
    status = run.status()
    metrics = metrics_by_step(events)
    facts = {event.name: event.value for event in events if isinstance(event, Fact)}
    result = last_result(events)
    plan = _table(run.read_json(run.plan).get("fields"))
    config = _table(run.read_json(run.config).get("recipe"))
    measurements = measurements_of(events)
    card, floor = _table(facts.get("card")), _table(facts.get("floor"))
    key_figures = [*tiles(metrics, result, facts), *bench_report.tiles(card, floor)]
    environment = _table(facts.get("environment")) or ({"device": card["name"], **card} if "name" in card else {})
    return {
        "run": run.id,
        "status": status,
        "state": str(status.state) if status else "lost",
        "verdict": verdict(result, status, measurements, answers_of(events), loaded.loaded_of(events)),
        "header": header(status, plan, environment),
        "attempts": [event for event in events if isinstance(event, Attempt)],
        "tiles": key_figures,
        "across": across(len(key_figures)),
        "suites": bench_report.sections(measurements),
        "charts": list(curves(metrics)),
        "columns": columns(events),
        "answers": answers_of(events),
        "loaded": [
            (one, loaded.figures(one), loaded.files(one), loaded.elsewhere(one)) for one in loaded.loaded_of(events)
        ],
        "conversations": loaded.conversations(loaded.loaded_of(events)),
        "prompt": _table(facts.get("prompt")),
        "data": _table(facts.get("data")) | _table(facts.get("batches")),
        "lora": statistics(facts),
        "statistics": STATISTICS,
        "merge": _table(facts.get("merge")),
        "artifacts": [event for event in events if isinstance(event, Artifact)],
        "model": _table(facts.get("model")),
        "environment": environment,
        "others": {name: value for name, value in facts.items() if name not in TOLD_APART},
        "config": _table(config.get("config")),
        "plan": {name: field for name, field in plan.items() if isinstance(field, dict)},
        "stages": stages(events),
        "metrics": metrics,
        "metric_names": sorted({name for values in metrics.values() for name in values}),
        "version": __version__,
        "written": utc(time.time()),
    }


def verdict(
    result: Mapping[str, Any],
    status: Status | None,
    measurements: Sequence[Measurement] = (),
    answers: Sequence[Answer] = (),
    exports: Sequence[Loaded] = (),
) -> str:
    """The run in a sentence."""
    told = (counted(measurements), quickest(measurements), loaded.verdict(exports))
    parts = [f"{text[0].upper()}{text[1:]}." for text in told if text]
    if answers:
        found = ", ".join(f"{count} {verdict}" for verdict, count in counts(answers).items())
        parts.append(f"{len(answers)} questions: {found}.")
    words = {"before": "before", "after": "after", "merged": "by the merged model, reloaded"}
    scores = [f"{result[f'correct_{p}']} {words[p]}" for p in PHASES if f"correct_{p}" in result]
    if scores:
        parts.append(f"Right answers of {result.get('samples', '?')}: {', '.join(scores)}.")
    if isinstance(result.get("train_seconds"), int | float):
        last = steps_of_last(result)
        which = f", the last {last} of them" if last else ""
        parts.append(f"{result.get('steps', '?')} steps{which} in {result['train_seconds']:.0f} s of training.")
    if isinstance(result.get("best_eval_loss"), int | float):
        parts.append(evaluated(result))
    if not parts:
        parts.append("There is no result yet." if status and not status.state.ended else "It left no result.")
    return " ".join(parts)


def evaluated(result: Mapping[str, Any]) -> str:
    """What the evaluations came to, and which step's adapter was saved."""
    best = f"Evaluated best at step {result.get('best_step', '?')}: loss {number(result['best_eval_loss'])}"
    ended = "; training ended early, with no better one since" if result.get("stopped_early") else ""
    return f"{best}{ended}. The adapter saved is that of step {result.get('saved_step', '?')}."


def header(status: Status | None, plan: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, str]:
    """Where, when and on what."""
    told: dict[str, str] = {}
    if status is None:
        return told
    told["recipe"] = status.recipe + (f", preset {status.preset}" if status.preset else "")
    told["started"] = utc(status.started)
    if status.ended:
        told["wall time"] = f"{status.ended - status.started:.0f} s"
    told["engine"] = status.engine
    image = _table(plan.get("image")).get("value")
    if image:
        told["image"] = str(image)
    for name in ("device", "threads", "torch"):
        if environment.get(name) is not None:
            told[name] = str(environment[name])
    return told


def tiles(
    metrics: Mapping[int, Mapping[str, float]], result: Mapping[str, Any], facts: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Key figures that were measured, and no others."""
    trainer, model = _table(facts.get("trainer_output")), _table(facts.get("model"))
    found: list[tuple[str, Any, str]] = []
    losses = [values["loss"] for values in metrics.values() if "loss" in values]
    if losses:
        found.append(("loss", f"{number(losses[0])} → {number(losses[-1])}", ""))
    if isinstance(result.get("best_eval_loss"), int | float):
        found.append(("evaluation loss, at its best", f"{number(result['best_eval_loss'])}", ""))
    found.append(("training", trainer.get("train_runtime"), " s"))
    found.append(("steps a second", trainer.get("train_steps_per_second"), ""))
    found.append(("samples a second", trainer.get("train_samples_per_second"), ""))
    found.append(("mean training loss", trainer.get("train_loss"), ""))
    if isinstance(model.get("trainable"), int):
        found.append(("trained parameters", f"{model['trainable']:,} ({model.get('trainable_percent', '?')} %)", ""))
    found.append(("peak memory", result.get("peak_memory_bytes") and size(result["peak_memory_bytes"]), ""))
    return [(name, f"{number(value)}{unit}") for name, value, unit in found if value is not None]


def across(count: int) -> int:
    """How many tiles to a row, so that none is left alone in the last one."""
    return math.ceil(count / math.ceil(count / TILES_ACROSS)) if count else 1


def curves(metrics: Mapping[int, Mapping[str, float]]) -> Iterator[Chart]:
    """Loss (that of the evaluations with it), gradient norm and learning rate over the steps."""
    for name, title in CHARTS:
        points = curve(metrics, name)
        if not points:
            continue
        also = ("evaluation", curve(metrics, "eval_loss")) if name == "loss" else None
        yield Chart(title, charts.line_chart(title, points, also=also))
        positive = [y for _, y in points if y > 0 and math.isfinite(y)]
        if name == "loss" and positive and max(positive) > LOG_SPAN * min(positive):
            yield Chart(
                f"{title}, logarithmic", charts.line_chart(f"{title}, logarithmic", points, also=also, log=True)
            )


def curve(metrics: Mapping[int, Mapping[str, float]], name: str) -> list[charts.Point]:
    """A figure over the steps."""
    return [(float(step), values[name]) for step, values in metrics.items() if name in values]


def columns(events: list[Event]) -> list[Column]:
    """Samples a phase, for the phases there were."""
    titles = {"before": "Before training", "after": "After training", "merged": "Merged, saved and reloaded"}
    found = []
    for phase in phases_of(events):
        samples = samples_of(events, phase)
        judged = [sample for sample in samples if sample.correct is not None]
        score = f"{sum(bool(s.correct) for s in judged)} of {len(judged)} right" if judged else ""
        if samples:
            found.append(Column(titles.get(phase, phase), samples, score))
    return found


def statistics(facts: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """(module, matrix, before, after) for each A and B there are statistics of."""
    before, after = _table(facts.get("lora_before")), _table(facts.get("lora_after"))
    return [
        (module, matrix, _table(_table(before.get(module)).get(matrix)), _table(_table(after.get(module)).get(matrix)))
        for module in dict.fromkeys([*before, *after])
        for matrix in ("A", "B")
    ]


def stages(events: list[Event]) -> list[Stage]:
    """Each stage with the time from its first word to the next stage's, or to an attempt's last word."""
    found: list[Stage] = []
    name, begun, last = "", 0.0, 0.0
    for event in [*events, Attempt(pid=0)]:
        begins = event.stage if isinstance(event, Progress) else "" if isinstance(event, Attempt) else name
        if begins != name:
            if name:
                found.append(Stage(name, max(0.0, (event.time if begins else last) - begun)))
            name, begun = begins, event.time
        last = event.time
    return found


def rows(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """A nested value as dotted rows."""
    if isinstance(value, dict) and value:
        return [row for key, inner in value.items() for row in rows(inner, f"{prefix}{key}.")]
    return [(prefix.rstrip("."), value)]


def number(value: Any) -> str:
    """A figure in four digits; anything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def size(value: Any) -> str:
    """Bytes for a reader."""
    if not isinstance(value, int | float):
        return str(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def plain(value: Any) -> str:
    """A value in a table cell."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def utc(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "unknown"


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
