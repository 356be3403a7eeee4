"""The report stands alone in one file, tells a run at any moment, and trusts nothing it shows."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.runs import bench_report, charts
from radeon_stack.runs import events as ev
from radeon_stack.runs.report import TILES_ACROSS, across, render, stages, verdict, write
from radeon_stack.runs.store import Run, RunStore, State, Status

STATISTICS = {"shape": [4, 8], "mean": 0.0, "std": 0.1, "min": -1.0, "q25": -0.1, "median": 0.0, "q75": 0.1, "max": 1.0}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = RunStore(tmp_path).new("train-llama")
    made.artifacts.mkdir(parents=True)
    return made


def status(state: State, **more: object) -> Status:
    return Status.model_validate(
        {"state": state, "recipe": "train-llama", "preset": "demo", "engine": "local", "started": 1.0} | more
    )


def told(run: Run, *events: ev.Event) -> str:
    write_event = ev.EventWriter(run.events)
    for event in events:
        write_event(event)
    return checked(render(run))


def checked(page: str) -> str:
    """The page, after seeing that every tag is closed, and that it loads nothing and runs nothing."""
    Balance().feed(page)
    assert not re.search(r"<(script|link|img|iframe|object|embed|base|form)\b", page, re.I)
    assert "default-src 'none'" in page
    return page


class Balance(HTMLParser):
    """Fails on a tag that is closed without having been opened."""

    VOID = ("meta", "line", "path")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")], (tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


def test_a_whole_run_is_told(run: Run) -> None:
    run.write_status(status(State.DONE, ended=64.0, exit_code=0))
    page = told(
        run,
        ev.Attempt(pid=1),
        ev.Progress(stage="train", done=0, total=2),
        *(ev.Metric(step=s, values={"loss": 5.0 / s**4, "grad_norm": 1.0, "learning_rate": 1e-4}) for s in (1, 2, 9)),
        *(
            ev.Sample(
                phase=phase, index=0, prompt="When?", response=f"{phase}!", expected="x", correct=phase != "before"
            )
            for phase in ("before", "after", "merged")
        ),
        ev.Fact(name="prompt", value={"prompt": "When?", "expected": "x"}),
        ev.Fact(name="lora_before", value={"q_proj": {"A": STATISTICS, "B": STATISTICS}}),
        ev.Fact(name="lora_after", value={"q_proj": {"A": STATISTICS, "B": STATISTICS}}),
        ev.Fact(name="train_arguments", value={"optim": "adamw_8bit"}),
        ev.Fact(name="something_new", value=[1, 2]),
        ev.Artifact(name="adapter", path="artifacts/adapter", bytes=2048),
        ev.Result(
            values={
                "correct_before": 0,
                "correct_after": 1,
                "samples": 1,
                "steps": 9,
                "train_seconds": 41.0,
                "train_steps": 4,
            }
        ),
    )
    for text in (
        "train-llama, preset demo",
        "Right answers of 1: 0 before, 1 after. 9 steps, the last 4 of them in 41 s of training.",
        "Loss, logarithmic",
        "Gradient norm",
        "0 of 1 right",
        "1 of 1 right",
        "q_proj",
        "[4, 8]",
        "adamw_8bit",
        "Something new",
        "2.0 KiB",
    ):
        assert text in page, text


def measurement(implementation: str, **more: object) -> ev.Measurement:
    case = {"dtype": "bfloat16", "batch": 4, "seq": 2048, "causal": True}
    return ev.Measurement.model_validate({"suite": "attention", "case": case, "implementation": implementation} | more)


def timed(seconds: float, **more: float) -> dict[str, float]:
    span = {"forward_seconds_p20": seconds * 0.99, "forward_seconds_p80": seconds * 1.01}
    floor = {"forward_of_floor": 1.7, "forward_floor_seconds": seconds / 1.7, "forward_memory_bound": 1.0}
    return {"forward_seconds": seconds, "forward_stable": 1.0, "difference_forward": 1.2e-3} | span | floor | more


def test_a_benchmark_is_told_with_its_floor_and_the_reason_of_what_is_not_there(run: Run) -> None:
    run.write_status(status(State.DONE, recipe="bench-attention", preset=None, ended=64.0, exit_code=0))
    page = told(
        run,
        ev.Fact(name="card", value={"name": "Radeon AI PRO R9700", "arch": "gfx1201", "torch": "2.9.1"}),
        ev.Fact(name="floor", value={"bandwidth": 580e9, "matrix": {"bfloat16": 115e12}}),
        measurement("sdpa_flash", values=timed(6.52e-3, forward_operations_per_second=10e12, forward_peak_bytes=2**20)),
        measurement("flash_attn", values=timed(7.05e-3, forward_stable=0.0), note="flash_attn 2.8.4, CK"),
        measurement("sdpa_cudnn", state="missing", note="not on HIP"),
        measurement("sdpa_efficient", state="crashed", note="SIGSEGV: Fatal Python error"),
        ev.Result(values={"ok": 2}),
    )
    for text in (
        "2 of 4 measured, 1 missing, 1 crashed. Quickest in 1 of 1 cases: sdpa_flash.",
        "Radeon AI PRO R9700 (gfx1201)",
        "580 GB/s",
        "115 TFLOP/s",
        "bf16 b4 s2048 causal",
        "6.52 ms ± 1%",
        "1.7× floor, memory",
        "10 TFLOP/s",
        "off by 1.2e-03",
        "unstable; flash_attn 2.8.4, CK",
        "not on HIP",
        "SIGSEGV: Fatal Python error",
    ):
        assert text in page, text
    assert page.count('class="bar"') == 1 and page.count('class="bar unsure"') == 1 and page.count('class="mark"') == 1


def test_a_run_that_failed_before_its_first_step_has_not_learnt_from_its_data(run: Run) -> None:
    run.write_status(status(State.FAILED, exit_code=6, what="out of memory"))
    data = ev.Fact(name="data", value={"name": "birthday", "rows": 1000})
    page = told(run, data)
    assert "What it was to learn from" in page and '<th scope="row">rows</th><td>1,000</td>' in page
    assert "What it learnt from" in told(run, ev.Metric(step=1, values={"loss": 1.0}))


@pytest.mark.parametrize(("tiles", "rows"), [(0, 0), (1, 1), (6, 1), (7, 2), (8, 2), (12, 2), (13, 3), (14, 3)])
def test_no_tile_stands_alone_in_its_row(tiles: int, rows: int) -> None:
    beside = across(tiles)
    assert beside <= TILES_ACROSS and -(-tiles // beside) == rows
    assert tiles < 2 or tiles % beside != 1


def test_a_report_of_training_says_nothing_of_benchmarks(run: Run) -> None:
    assert "What it measured" not in told(run, ev.Metric(step=1, values={"loss": 5.0}))


def test_many_cases_are_folded_away(run: Run) -> None:
    found = [measurement("a", values=timed(1.0), case={"seq": number}) for number in range(11)]
    assert "3 more cases" in told(run, *found)


def test_a_run_that_has_not_said_anything_is_told(run: Run) -> None:
    assert "There is no result yet." in told(run) or "It left no result." in told(run)
    run.write_status(status(State.RUNNING))
    assert "There is no result yet." in told(run)


def test_a_run_killed_in_the_middle_of_a_line_is_told(run: Run) -> None:
    run.write_status(status(State.FAILED, what="the workload was killed", remedy="resume it"))
    told(run, ev.Attempt(pid=1), ev.Metric(step=1, values={"loss": 5.0}))
    with run.events.open("ab") as stream:
        stream.write(b'{"kind": "met')
    page = checked(render(run))
    assert "the workload was killed" in page and "resume it" in page


def test_a_resumed_run_says_from_which_step_and_counts_a_repeated_step_once(run: Run) -> None:
    page = told(
        run,
        ev.Attempt(pid=1),
        ev.Metric(step=4, values={"loss": 9.75}),
        ev.Attempt(pid=2, resumed_step=3),
        ev.Metric(step=4, values={"loss": 3.25}),
    )
    assert "resumed from step <b>3</b>" in page
    assert "3.25" in page and "9.75" not in page


def test_what_a_model_says_cannot_become_markup(run: Run) -> None:
    evil = "</span><script>alert(1)</script><img src=x onerror=alert(1)>"
    run.write_status(status(State.FAILED, recipe=evil, what=evil, where=evil, remedy=evil))
    run.plan.write_text('{"fields": {"<b>": {"value": "</table>", "reason": "<script>"}}}')
    run.config.write_text('{"recipe": {"config": {"</svg>": "<script>"}}}')
    page = told(
        run,
        ev.Sample(phase="after", index=0, prompt=evil, response=evil, expected=evil, correct=None),
        ev.Fact(name=evil, value={evil: evil}),
        ev.Fact(name="data", value={"sample": evil, evil: 1}),
        ev.Fact(name="lora_after", value={evil: {"A": {"mean": evil}}}),
        ev.Metric(step=1, values={evil: 1.0, "loss": 1.0}),
        ev.Artifact(name=evil, path=evil),
        ev.Fact(name="card", value={"name": evil, "arch": evil}),
        ev.Fact(name="floor", value={"bandwidth": evil, "matrix": {evil: 1e400, "</b>": 1}}),
        measurement("</svg><script>", suite="<b>", case={"</svg>": "</h3><script>"}, note=evil, values=timed(1.0)),
        measurement("<script>", state="failed", note=evil, values={"<script>_seconds": 1.0}),
        ev.Result(values={"correct_before": evil, "samples": evil, "train_seconds": evil}),
    )
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"fields": 5}', '{"fields": {"a": 5}}', '{"recipe": [1]}'])
def test_records_of_another_shape_do_not_stop_the_report(run: Run, content: str) -> None:
    for path in (run.plan, run.config, run.path / "status.json"):
        path.write_text(content)
    told(run, *(ev.Fact(name=n, value=5) for n in ("data", "model", "prompt", "lora_before", "merge", "environment")))


def test_a_loss_that_is_not_a_number_is_left_out_of_the_curve_and_kept_in_the_table(run: Run) -> None:
    values = [5.0, math.nan, math.inf, 4.0]
    page = told(run, *(ev.Metric(step=i, values={"loss": v}) for i, v in enumerate(values)))
    assert page.count("<circle") == 2
    assert "nan" in page


def test_ten_thousand_steps_stay_a_small_picture(run: Run) -> None:
    svg = charts.line_chart("Loss", [(float(i), 1 / (i + 1)) for i in range(10_000)])
    assert len(svg) < 20_000


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=20), st.booleans())
def test_any_points_make_a_picture_inside_its_frame(points: list[charts.Point], log: bool) -> None:
    svg = charts.line_chart("</svg>", points, log=log)
    assert "</svg>" not in svg[:-6]
    for y in re.findall(r'cy="([^"]+)"', svg):
        assert charts.TOP - 1 <= float(y) <= charts.HEIGHT - charts.BOTTOM + 1


@given(st.lists(st.floats(), max_size=8), st.none() | st.floats())
def test_any_values_make_bars_inside_their_frame(values: list[float], mark: float | None) -> None:
    bars = tuple(charts.Bar("</svg>", value, "</svg>") for value in values)
    svg = charts.bar_chart("</svg>", [charts.Group("</svg>", bars, mark), charts.Group("empty", ())])
    assert "</svg>" not in svg[:-6]
    for width in re.findall(r"h([0-9.e+-]+)v", svg):
        assert 0 < float(width) <= charts.WIDTH - charts.NAME_WIDTH - charts.TEXT_WIDTH + 0.1
    for at in re.findall(r'x1="([^"]+)"', svg):
        assert charts.NAME_WIDTH <= float(at) <= charts.WIDTH - charts.TEXT_WIDTH + 0.1


@given(st.dictionaries(st.sampled_from(list(timed(1.0))), st.floats()))
def test_figures_that_make_no_sense_do_not_stop_the_report(values: dict[str, float]) -> None:
    list(bench_report.sections([measurement("a", values=values), measurement("b", state="wrong", values=values)]))


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_ticks_are_few_and_span_the_values(low: float, span: float) -> None:
    ticks = charts.linear_ticks(low, low + span)
    assert 1 <= len(ticks) <= 2 * charts.TICKS + 2
    assert ticks[0] <= low + span * 1e-6 + abs(low) * 1e-9 and ticks[-1] >= low + span - span * 1e-6 - abs(low) * 1e-9


def test_stages_last_until_the_next_one_and_not_over_the_pause_before_a_resume() -> None:
    events: list[ev.Event] = [
        ev.Attempt(pid=1, time=0),
        ev.Progress(stage="load", done=0, total=1, time=1),
        ev.Progress(stage="train", done=0, total=1, time=3),
        ev.Metric(step=1, values={}, time=7),
        ev.Attempt(pid=2, time=1000),
        ev.Progress(stage="train", done=1, total=1, time=1001),
        ev.Result(values={}, time=1003),
    ]
    assert [(stage.name, stage.seconds) for stage in stages(events)] == [("load", 2), ("train", 4), ("train", 2)]


def test_the_report_is_replaced_whole(run: Run) -> None:
    assert write(run) == run.report
    assert run.report.read_text().endswith("</html>\n")
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("of_all", [{}, {"train_steps": 9}])
def test_a_run_that_was_not_resumed_tells_the_time_of_all_its_steps(of_all: dict[str, int]) -> None:
    assert verdict({"steps": 9, "train_seconds": 41.0, **of_all}, None) == "9 steps in 41 s of training."
