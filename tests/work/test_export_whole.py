"""Exports from beginning to end, by llama.cpp itself and vLLM itself; what goes wrong on the way is found and named.

They need the environment for `verify`, which is made once (`make test-export`): compiling llama.cpp takes minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from radeon_stack.images.environments import environment_for
from radeon_stack.runs import events as ev
from radeon_stack.runs.store import home as store_home
from tests.conftest import Cli, Result, tiny_llama, wait_for
from tests.work.models import folder_of
from tests.work.test_merging import flip

MADE = environment_for("verify", store_home())  # before each test is given a home of its own
pytestmark = [
    pytest.mark.work,
    pytest.mark.skipif(not MADE.ready, reason="no environment for verify in the home folder: make test-export"),
]
QUICK = (
    *("--engine", "local", "--set", "threads=1", "--set", "questions.count=1", "--set", "questions.greedy_tokens=8"),
    *("--set", "questions.max_new_tokens=8", "--set", "limits.right_min=0.0", "--set", "limits.agreement_min=0.0"),
    *("--set", "limits_of.q8_0.right_min=0.0"),  # twelve steps teach nothing
)
BY_LLAMA = ("--set", "loaders=['llama.cpp']", "--set", "gguf.quantizations=['bf16', 'q8_0']")


@pytest.fixture(autouse=True)
def environments(home: Path) -> None:
    (home / "environments").symlink_to(MADE.folder.parent)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with a whole tokenizer: llama.cpp's converter knows tokenizers by what they make of a text."""
    return tiny_llama(tmp_path_factory.mktemp("base") / "tiny-llama", words=None, heads=2)  # vLLM has none of 16


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_run: tuple[str, ...], base: Path, cli: Cli, shared_cache: Path
) -> dict[str, Any]:
    """A tiny LLaMA that was trained, and merged."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "cache").symlink_to(shared_cache)
    done = cli(*tiny_run, "--model", base, "--engine", "local", env={**os.environ, "RADEON_STACK_HOME": str(folder)})
    assert done.code == 0, done.err
    return dict(done.json)


@pytest.fixture
def source(trained: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the run, which a test may damage."""
    return Path(shutil.copytree(trained["directory"], tmp_path / Path(trained["directory"]).name))


def exported(cli: Cli, source: Path, *more: str, sets: tuple[str, ...] = BY_LLAMA) -> Result:
    return cli("run", "export-check", "--from", source, "--json", *QUICK, *sets, *more)


def left_half_written(run: Path) -> list[str]:
    return [str(file.relative_to(run)) for file in run.rglob("*") if ".partial" in file.name]


def the_run(home: Path) -> Path:
    return next(home.glob("runs/*-export-check-*"))


def test_a_run_is_converted_loaded_and_answers_the_same_by_llama_cpp(cli: Cli, source: Path) -> None:
    done = exported(cli, source)
    assert done.code == 0, done.err
    told = {one["loader"]: one for one in done.json["loaded"]}
    assert list(told) == ["transformers", "llama.cpp bf16", "llama.cpp q8_0"]
    assert all(one["state"] == "ok" for one in told.values())
    assert told["llama.cpp bf16"]["values"]["perplexity_ratio"] == pytest.approx(1.0, abs=0.02)
    run = Path(done.json["directory"])
    assert done.json["facts"]["gguf_bf16"]["compared"] == 20 and left_half_written(run) == []
    assert "Who loads it, and how well" in (run / "report.html").read_text()
    sums = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=run / "artifacts/gguf", check=False)
    assert sums.returncode == 0


def test_a_dense_qwen_that_is_no_run_goes_the_same_way(cli: Cli, base: Path, tmp_path: Path) -> None:
    words = json.loads((base / "config.json").read_text())["vocab_size"]
    folder = folder_of("qwen3", tmp_path / "qwen3", vocab_size=words)
    for file in (*base.glob("*token*"), *base.glob("*.jinja")):
        shutil.copy(file, folder)
    done = exported(cli, folder)
    assert done.code == 0, done.err
    told = {one["loader"]: one["values"] for one in done.json["loaded"]}
    assert done.json["facts"]["gguf_bf16"]["compared"] == len(load_file(folder / "model.safetensors"))
    assert told["llama.cpp bf16"]["perplexity_ratio"] == pytest.approx(1, abs=0.02)


def test_an_adapter_alone_is_merged_first_into_the_base_that_it_was_trained_on(cli: Cli, source: Path) -> None:
    merged = source / "artifacts/merged"
    sums = (merged / "SHA256SUMS").read_text()
    shutil.rmtree(merged)
    done = exported(cli, source)
    assert done.code == 0, done.err
    again = Path(done.json["directory"]) / "artifacts/merged"
    weights = [line for line in sums.splitlines() if line.endswith(".safetensors")]
    assert weights == [line for line in (again / "SHA256SUMS").read_text().splitlines() if line in weights]


@pytest.mark.parametrize(
    "stage", ["merge", "gguf bf16", "compare bf16", "gguf q8_0", "ask transformers", "ask llama.cpp q8_0", "ask vllm"]
)
def test_killed_in_any_step_it_leaves_nothing_half_written_and_goes_on_where_it_was(
    stage: str, cli: Cli, source: Path, home: Path
) -> None:
    if stage == "merge":
        shutil.rmtree(source / "artifacts/merged")
    loaders = ("--set", "loaders=['llama.cpp', 'vllm']") if stage == "ask vllm" else ()
    with started(source, *loaders) as process:
        run = wait_for(lambda: next(home.glob("runs/*-export-check-*/events.jsonl"), None), what="events").parent
        wait_for(lambda: stages(run, begun=stage), what=stage)
        os.killpg(workload(run), signal.SIGKILL)
        process.wait(60)
    named = {file.name for file in (run / "artifacts").rglob("model-*") if ".partial" not in file.name}
    done = cli("run", "--resume", run.name, "--json")
    assert done.code == 0, done.err
    assert left_half_written(run) == []
    records = {file.stem for file in (run / "artifacts/steps").iterdir()}
    steps = {"gguf-bf16", "gguf-q8-0", "ask-transformers", "ask-llama.cpp-bf16", "ask-llama.cpp-q8-0"}
    assert records == steps | {"merge": {"merge"}, "ask vllm": {"ask-vllm"}}.get(stage, set())
    told = [e.path for e in ev.read_events(run / "events.jsonl") if isinstance(e, ev.Artifact)]
    assert len(told) == len(set(told)), "what was whole was made again"
    assert named <= {"model-bf16.gguf", "model-q8_0.gguf"}


def started(source: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "radeon_stack", "run", "export-check", "--from", str(source), *QUICK, *BY_LLAMA]
    return subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def stages(run: Path, begun: str) -> bool:
    return any(isinstance(e, ev.Progress) and e.stage == begun for e in ev.read_events(run / "events.jsonl"))


def workload(run: Path) -> int:
    return int(json.loads((run / "status.json").read_text())["handle"]["pid"])


@pytest.mark.parametrize(
    ("file", "named"),
    [("merged/model.safetensors", "model.safetensors"), ("merged/tokenizer.json", "tokenizer.json")],
)
def test_a_byte_of_the_merged_model_that_was_flipped_is_found_by_its_file(
    file: str, named: str, cli: Cli, source: Path, home: Path
) -> None:
    flip(source / "artifacts" / file, 5000)
    done = exported(cli, source)
    assert done.code == 7 and named in done.error, done.err
    assert not (the_run(home) / "artifacts/gguf").exists()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "tokenizer.json", "adapter_config.json"])
def test_so_is_one_of_the_adapter(file: str, cli: Cli, source: Path, home: Path) -> None:
    shutil.rmtree(source / "artifacts/merged")
    flip(source / "artifacts/adapter" / file, 100)
    done = exported(cli, source)
    assert done.code == 7 and file in done.error, done.err
    assert not (the_run(home) / "artifacts/merged").exists() and left_half_written(the_run(home)) == []


def test_so_is_one_of_a_gguf_file_before_anything_loads_it_again(cli: Cli, source: Path, home: Path) -> None:
    done = exported(cli, source, "--set", "limits.perplexity_ratio_max=0.1")
    assert done.code == 7 and "perplexity beside transformers'" in done.error
    run = Path(done.json["directory"])
    flip(run / "artifacts/gguf/model-q8_0.gguf", 4000)
    again = cli("run", "--resume", run.name, "--json")
    assert again.code == 7 and "model-q8_0.gguf: has changed since it was written" in again.error


def test_a_base_that_is_not_the_adapters_is_refused(cli: Cli, source: Path, base: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "artifacts/merged")
    other = Path(shutil.copytree(base, tmp_path / "other"))
    weights = {name: weight * 1.01 for name, weight in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    done = exported(cli, source, "--model", str(other))
    assert done.code == 7 and "is not the base that this adapter was trained on" in done.error, done.err


def test_a_tokenizer_that_the_converter_does_not_know_is_told_as_that(cli: Cli, tiny_model: Path) -> None:
    """Shortened, it reads texts otherwise than any tokenizer that llama.cpp has rules for."""
    done = exported(cli, tiny_model)
    assert done.code == 7 and "llama.cpp does not know this tokenizer" in done.error, done.err


def test_so_is_another_models_tokenizer(cli: Cli, source: Path) -> None:
    """A folder from elsewhere, which no sums vouch for: its tokenizer has more tokens than the model has rows."""
    merged = source / "artifacts/merged"
    (merged / "SHA256SUMS").unlink()
    told = json.loads((merged / "tokenizer.json").read_text())
    words = told["model"]["vocab"]
    words |= {f"a word of another model {number}": len(words) + number for number in range(10)}
    (merged / "tokenizer.json").write_text(json.dumps(told))
    done = exported(cli, merged)
    assert done.code == 7 and "tokenizer" in done.error, done.err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_disk_that_is_too_small_is_told_before_anything_is_written(cli: Cli, source: Path, home: Path) -> None:
    with small_disk(home / "runs", "700k"):
        done = exported(cli, source)
        assert done.code in (3, 6) and ("MiB are free" in done.err or "the disk is full" in done.err), done.err
        assert left_half_written(home / "runs") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_of_a_disk_that_fills_during_a_conversion_nothing_half_written_stays_and_with_room_the_run_goes_on(
    cli: Cli, source: Path, home: Path
) -> None:
    with small_disk(home / "runs", "64m"):
        with started(source) as process:
            run = wait_for(lambda: next(home.glob("runs/*-export-check-*/events.jsonl"), None), what="events").parent
            wait_for(lambda: stages(run, begun="gguf bf16"), what="its conversion")
            filler = fill(home / "runs/filler")
            assert process.wait(120) in (3, 4, 6)
        assert left_half_written(run) == [] and not (run / "artifacts/gguf/model-bf16.gguf").exists()
        filler.unlink()
        done = cli("run", "--resume", run.name, "--json")
        assert done.code == 0, done.err


def fill(file: Path) -> Path:
    """All that is left of a disk."""
    with suppress(OSError), file.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    return file


class small_disk:  # noqa: N801 - read as a phrase
    def __init__(self, place: Path, size: str) -> None:
        self._place, self._size = place, size

    def __enter__(self) -> None:
        self._place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", str(self._place)], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", str(self._place)], check=True)


def test_fewer_right_answers_than_asked_end_with_7_naming_who_and_what_it_said(cli: Cli, source: Path) -> None:
    done = exported(cli, source, "--set", "limits_of.q8_0.right_min=1.0", "--set", "questions.expected=never said")
    assert done.code == 7
    assert "llama.cpp q8_0: the share of right answers is 0, at least 1 is asked: it answers '" in done.error


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, cli: Cli, shared_cache: Path) -> Iterator[Path]:
    """The tiny mixture of experts of `train-qwen-moe --preset demo`, trained."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "cache").symlink_to(shared_cache)
    done = cli(
        *("run", "train-qwen-moe", "--preset", "demo", "--engine", "local", "--json"),
        env={**os.environ, "RADEON_STACK_HOME": str(folder)},
    )
    assert done.code == 0, done.err
    yield Path(done.json["directory"])


def test_a_mixture_of_experts_goes_the_same_way_through_llama_cpp_and_vllm(cli: Cli, mixture: Path) -> None:
    done = cli("run", "export-check", "--from", mixture, "--json", "--engine", "local", "--set", "threads=1")
    assert done.code == 0, done.err
    told = {one["loader"]: one for one in done.json["loaded"]}
    assert {"llama.cpp bf16", "vllm"} <= set(told)
    assert all(one["values"]["correct"] == 5 for one in told.values())
    experts = 2 * 64 * 3
    assert done.json["facts"]["gguf_bf16"]["compared"] > experts
