"""What a run came to, as plain data and as a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import JsonValue

from radeon_stack.contracts.capabilities import Answer, counts
from radeon_stack.runs.events import Answered, Artifact, Event, Fact, Result, Sample, metrics_by_step, read_events
from radeon_stack.runs.loaded import loaded_of, loaded_text
from radeon_stack.runs.measurements import as_data, counted, measurements_of, quickest
from radeon_stack.runs.outcome import Outcome
from radeon_stack.runs.store import Run

PHASES = ("before", "after", "merged")
NARROW, WIDE = 9, 20  # the column of names; an artifact's may be of any length


def summary(run: Run, outcome: Outcome) -> dict[str, Any]:
    """One JSON object: state, figures, a loss a step, samples, and where the outputs are."""
    events = read_events(run.events)
    status = run.status()
    result = last_result(events)
    return {
        "run": run.id,
        "state": str(outcome.state),
        "exit_code": int(outcome.exit_code) if outcome.state.ended else None,
        "recipe": status.recipe if status else "",
        "preset": status.preset if status else None,
        "engine": status.engine if status else "",
        "image": _field(run, "image"),
        "error": {"what": outcome.what, "where": outcome.where, "remedy": outcome.remedy} if outcome.what else None,
        "diagnosis": asdict(outcome.diagnosis) if outcome.diagnosis else None,
        "result": result,
        "metrics": [{"step": step, **values} for step, values in metrics_by_step(events).items()],
        "samples": {phase: [_sample(s) for s in samples_of(events, phase)] for phase in phases_of(events)},
        "loaded": [one.model_dump(mode="json", exclude={"kind", "time"}) for one in loaded_of(events)],
        "answers": [answer.model_dump(mode="json", exclude_defaults=True) for answer in answers_of(events)],
        "measurements": [as_data(one) for one in measurements_of(events)],
        "facts": {event.name: event.value for event in events if isinstance(event, Fact)},
        "artifacts": {name: str(run.path / path) for name, path in artifacts(events).items()},
        "directory": str(run.path),
        "report": str(run.report) if run.report.exists() else None,
    }


def lines(run: Run, outcome: Outcome) -> list[str]:
    """The same for a person: what was learnt, and where it lies."""
    told = summary(run, outcome)
    result = told["result"]
    rows: list[tuple[str, str]] = []
    phases = [p for p in PHASES if f"correct_{p}" in result]
    if phases:
        words = {"before": "before", "after": "after", "merged": "merged and reloaded"}
        rows.append(("answers", ", ".join(f"{result[f'correct_{p}']}/{result['samples']} {words[p]}" for p in phases)))
    losses = [metric["loss"] for metric in told["metrics"] if "loss" in metric]
    if losses:
        rows.append(("loss", f"{losses[0]:.4g} → {losses[-1]:.4g} in {len(losses)} steps"))
    if isinstance(result.get("best_eval_loss"), int | float):
        best = f"{result['best_eval_loss']:.4g} at its best, step {result.get('best_step', '?')}"
        early = ", where training ended early" if result.get("stopped_early") else ""
        rows.append(
            ("evaluated", f"{best}; saved: step {result.get('saved_step', '?')} of {result.get('steps', '?')}{early}")
        )
    if isinstance(result.get("train_seconds"), int | float):
        last = steps_of_last(result)
        which = f", the last {last} of {result['steps']} steps" if last else ""
        rows.append(("training", f"{result['train_seconds']:.0f} s{which}"))
    asked = answers_of(read_events(run.events))
    if asked:
        rows.append(("answers", ", ".join(f"{count} {verdict}" for verdict, count in counts(asked).items())))
    measurements = measurements_of(read_events(run.events))
    rows += [
        (name, text) for name, text in (("figures", counted(measurements)), ("best", quickest(measurements))) if text
    ]
    rows += [
        (one.loader, loaded_text(one).partition(": ")[2] or one.state) for one in loaded_of(read_events(run.events))
    ]
    rows += told["artifacts"].items()
    if told["report"]:
        rows.append(("report", told["report"]))
    width = min(max([NARROW, *(len(name) for name, _ in rows)]), WIDE)
    return [f"{told['state']}  {run.id}", *(f"  {name:<{width}} {text}" for name, text in rows)]


def last_result(events: list[Event]) -> dict[str, JsonValue]:
    """Figures of the last attempt that came to its end; {} when none did."""
    results = [event.values for event in events if isinstance(event, Result)]
    return results[-1] if results else {}


def steps_of_last(result: Mapping[str, Any]) -> int | None:
    """How many steps `train_seconds` are of, where a run was resumed; None where they are of all."""
    last, steps = result.get("train_steps"), result.get("steps")
    return last if isinstance(last, int) and isinstance(steps, int) and last < steps else None


def samples_of(events: list[Event], phase: str) -> list[Sample]:
    """Samples of a phase, by index; a later attempt's replace an earlier one's."""
    latest = {event.index: event for event in events if isinstance(event, Sample) and event.phase == phase}
    return [latest[index] for index in sorted(latest)]


def phases_of(events: list[Event]) -> list[str]:
    """The phases of training, whether there are samples of them or not, and who else answered."""
    return list(dict.fromkeys([*PHASES, *(event.phase for event in events if isinstance(event, Sample))]))


def answers_of(events: list[Event]) -> list[Answer]:
    """The answers to a probe's questions, in their order."""
    return list({event.answer.question: event.answer for event in events if isinstance(event, Answered)}.values())


def artifacts(events: list[Event]) -> dict[str, str]:
    """Finished outputs by name; paths relative to the run directory."""
    return {event.name: event.path for event in events if isinstance(event, Artifact)}


def _sample(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": sample.prompt,
        "response": sample.response,
        "expected": sample.expected,
        "correct": sample.correct,
    }


def _field(run: Run, name: str) -> JsonValue:
    fields = run.read_json(run.plan).get("fields")
    field = fields.get(name) if isinstance(fields, dict) else None
    return field.get("value") if isinstance(field, dict) else None
