"""The curves of a run in TensorBoard's event files, read back."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.runs import events as ev
from radeon_stack.workloads.finetune.checkpoints import last_checkpoint
from radeon_stack.workloads.job import StopRequested
from radeon_stack.workloads.ranks import Rank
from tests.work.test_evaluation import config, trainer
from tests.work.test_training import job_in

pytest.importorskip("tensorboardX", reason="needs tensorboardX (the extra 'work')")
pytestmark = pytest.mark.work
OURS = {"train/tokens_per_second", "train/peak_memory_bytes"}


def records(file: Path) -> Iterator[Any]:
    """TFRecord: length, its checksum, the event, its checksum."""
    from tensorboardX.proto import event_pb2

    with file.open("rb") as stream:
        while len(head := stream.read(12)) == 12:
            length = struct.unpack("<Q", head[:8])[0]
            if len(body := stream.read(length + 4)) < length + 4:
                return  # it is being written
            yield event_pb2.Event.FromString(body[:length])


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard shows them: of all files in order, each start forgetting the steps from its own on."""
    from tensorboardX.proto.event_pb2 import SessionLog

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns):
        for record in records(file):
            if record.session_log.status == SessionLog.START:
                found = {tag: [point for point in points if point[0] < record.step] for tag, points in found.items()}
            for value in record.summary.value:
                found.setdefault(value.tag, []).append((record.step, value.simple_value))
    return found


def told_curves(told: list[ev.Event]) -> dict[str, list[tuple[int, Any]]]:
    found: dict[str, list[tuple[int, Any]]] = {}
    for step, values in ev.metrics_by_step(told).items():
        for name, value in values.items():
            tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
            found.setdefault(tag, []).append((step, pytest.approx(value, rel=1e-6)))
    return found


def settings(**train: Any) -> Any:
    made = config(**({"learning_rate": 1e-3} | train))
    return made.model_copy(update={"export": made.export.model_copy(update={"tensorboard": True})})


def test_an_interrupted_run_goes_on_in_the_same_curves_and_they_are_its_events(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from radeon_stack.workloads.finetune import training
    from radeon_stack.workloads.finetune.callbacks import Teller

    job, told = job_in(tmp_path)
    with monkeypatch.context() as patch:

        def dies(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 11:
                raise StopRequested("killed")

        patch.setattr(Teller, "on_step_begin", dies, raising=False)
        with pytest.raises(StopRequested):
            training.train(job, trainer(job, tiny_model, settings(steps=16)), None)
    folder = tmp_path / "artifacts/tensorboard"
    while not curves(folder).get("train/loss", [])[10:]:  # its thread is still writing
        time.sleep(0.1)
    first = next(folder.iterdir())
    first.rename(first.with_name(f"{first.name}.0"))  # a name is good for a second
    checkpoint = last_checkpoint(job.artifacts)
    assert checkpoint is not None and checkpoint.step == 8

    training.train(job, trainer(job, tiny_model, settings(steps=16)), checkpoint)
    found = curves(folder)
    assert {tag: points for tag, points in found.items() if tag not in OURS} == told_curves(told)
    assert {"train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"} < found.keys()
    assert [step for step, _ in found["eval/loss"]] == [4, 8, 12, 16]
    for tag in OURS:
        assert [step for step, value in found[tag] if value > 0] == [*range(1, 17)]
    assert [event.path for event in told if isinstance(event, ev.Artifact)] == ["artifacts/tensorboard"]


def test_only_the_first_process_writes(tiny_model: Path, tmp_path: Path) -> None:
    from radeon_stack.workloads.finetune.tensorboard import Curves

    for place in (0, 1):
        job, _ = job_in(tmp_path)
        job.rank = Rank(place, place, 2)
        callbacks = trainer(job, tiny_model, settings()).callback_handler.callbacks
        assert any(isinstance(one, Curves) for one in callbacks) == (place == 0)


def test_without_being_asked_nothing_is_written(tiny_model: Path, tmp_path: Path) -> None:
    from radeon_stack.workloads.finetune import training

    job, _ = job_in(tmp_path)
    training.train(job, trainer(job, tiny_model, config(steps=1, eval_every=1)), None)
    assert not (tmp_path / "artifacts/tensorboard").exists()
