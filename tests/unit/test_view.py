"""A run on a terminal: figures are whole at any width, and what is said stays to be read."""

from __future__ import annotations

import io

import pytest

from radeon_stack.runs import events as ev
from radeon_stack.runs.view import CTRL_C, BarView, LineView

FIGURES = {"loss": 0.005664, "grad_norm": 0.01234, "learning_rate": 0.0008667, "eval_loss": 0.001234}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")


def bars(stream: io.StringIO) -> str:
    with BarView(stream) as view:
        view(ev.Progress(stage="tokenize", done=1000, total=1000, unit="rows"))
        view(ev.Progress(stage="train", done=24, total=60, unit="steps"))
        view(ev.Metric(step=24, values=FIGURES))
    return stream.getvalue()


@pytest.mark.parametrize(("columns", "elapsed"), [(80, False), (109, False), (110, True), (160, True)])
def test_bars_show_count_time_and_loss_whole_at_any_width(
    monkeypatch: pytest.MonkeyPatch, columns: int, elapsed: bool
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = [line for line in bars(io.StringIO()).splitlines() if line.strip()]
    tokenize, train = (line.split() for line in lines)
    assert "1000/1000" in tokenize and "00:00" in tokenize
    assert "24/60" in train and "--:--" in train and "0.005664" in train
    assert ("0:00:00" in train) is elapsed
    assert all(len(line) <= columns - CTRL_C for line in lines)  # a terminal's `^C` would break a full one in two


def test_what_is_said_takes_the_bars_place_and_they_go_on_below() -> None:
    stream = Terminal()
    with BarView(stream) as view:
        view(ev.Progress(stage="train", done=24, total=60, unit="steps"))
        view.say("stopping [it saves] first\x1b[2J")
    told = stream.getvalue()
    above, _, below = told.partition("stopping [it saves] first�[2J\n")
    assert above.endswith("\r\x1b[2K") and below.startswith("train ")


def test_without_a_terminal_it_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with LineView(stream) as view:
        view.say("stopping")
    assert (stream.getvalue(), capsys.readouterr().err) == ("", "stopping\n")
