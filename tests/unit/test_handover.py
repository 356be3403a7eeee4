"""What is handed over: whole, summed, with a card, and nothing of the trainer's own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.checksums import write_sums
from radeon_stack.runs import events as ev
from radeon_stack.runs.card import plain
from radeon_stack.runs.handover import modelfile
from tests.conftest import Cli


def run_of(home: Path, name: str, config: dict[str, Any], made: dict[str, dict[str, bytes]], *told: ev.Event) -> Path:
    """A run directory with files below its artifacts, summed."""
    run = home / "runs" / name
    for part, files in made.items():
        folder = run / "artifacts" / part
        folder.mkdir(parents=True)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        write_sums(folder)
    (run / "config.json").write_text(json.dumps({"recipe": {"config": config}}))
    writer = ev.EventWriter(run / "events.jsonl")
    for event in told:
        writer(event)
    writer.close()
    return run


@pytest.fixture
def trained(home: Path) -> Path:
    config = {
        "model": "/home/somebody/Llama-3.1-8B",
        "lora": {"rank": 64},
        "data": {"dataset": "/home/somebody/chats.jsonl"},
    }
    made = {
        "adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"},
        "merged": {"config.json": b"{}", "model.safetensors": b"more weights", "LICENSE": b"of the base"},
    }
    data = {"name": "chats.jsonl", "form": "messages", "rows": 1000}
    return run_of(
        home,
        "20261129-000000-train-llama-aaaa",
        config,
        made,
        ev.Fact(name="data", value=data),
        ev.Result(values={"steps": 24}),
    )


@pytest.fixture
def checked(home: Path, trained: Path) -> Path:
    values = {"correct": 5.0, "asked": 5.0, "perplexity": 21.0}
    return run_of(
        home,
        "20261129-000001-export-check-bbbb",
        {"source": str(trained)},
        {"gguf": {"model-bf16.gguf": b"GGUF 16", "model-q4_k_m.gguf": b"GGUF 4"}},
        ev.Loaded(loader="llama.cpp q4_k_m", values=values),
        ev.Result(values={}),
    )


def test_of_a_checked_export_all_that_either_run_made_is_handed_over_with_sums_that_hold(
    cli: Cli, checked: Path, tmp_path: Path
) -> None:
    done = cli("export", "--from", "last", "--to", tmp_path / "mine", "--json")
    assert done.code == 0, done.err
    assert set(done.json["parts"]) == {"adapter", "merged", "gguf"}
    assert (
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "mine", check=False).returncode
        == 0
    )
    summed = {line.split("  ")[1] for line in (tmp_path / "mine/SHA256SUMS").read_text().splitlines()}
    there = {str(f.relative_to(tmp_path / "mine")) for f in (tmp_path / "mine").rglob("*") if f.is_file()}
    assert summed == there - {"SHA256SUMS"}
    assert (tmp_path / "mine/gguf/Modelfile").read_text().startswith("FROM ./model-q4_k_m.gguf\n")


def test_the_card_tells_data_arguments_figures_and_licence_and_no_place_of_the_trainers_machine(
    cli: Cli, checked: Path, tmp_path: Path
) -> None:
    assert cli("export", "--from", "last", "--to", tmp_path / "mine").code == 0
    card = (tmp_path / "mine/README.md").read_text()
    for told in ("Llama-3.1-8B", "chats.jsonl", "| rows | 1,000 |", "| `lora.rank` | 64 |", "| 5/5 |", "`LICENSE`"):
        assert told in card, told
    assert "/home/somebody" not in card


def test_what_has_changed_since_it_was_made_is_not_handed_over(cli: Cli, checked: Path, tmp_path: Path) -> None:
    (checked / "artifacts/gguf/model-bf16.gguf").write_bytes(b"GGUF 17")
    done = cli("export", "--from", "last", "--to", tmp_path / "mine")
    assert done.code == 7 and "model-bf16.gguf" in done.error
    assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing_and_a_folder_with_something_in_it_is_refused(
    cli: Cli, trained: Path, tmp_path: Path
) -> None:
    assert cli("export", "--from", trained.name, "--to", tmp_path / "mine", "--dry-run").code == 0
    assert not (tmp_path / "mine").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    done = cli("export", "--from", trained.name, "--to", tmp_path / "mine")
    assert done.code == 2 and "is not empty" in done.error
    assert cli("export", "--to", tmp_path / "other").code == 2


def test_a_link_is_not_followed_out_of_what_was_made(cli: Cli, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (trained / "artifacts/adapter/link").symlink_to(tmp_path / "secret")
    assert cli("export", "--from", trained.name, "--to", tmp_path / "mine").code == 0
    assert not (tmp_path / "mine/adapter/link").exists()


def test_a_part_that_is_a_link_or_that_nothing_vouches_for_is_not_handed_over(
    cli: Cli, trained: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "id").write_text("secret")
    (trained / "artifacts/gguf").symlink_to(secret)
    assert cli("export", "--from", trained.name, "--to", tmp_path / "mine").code == 0
    assert not (tmp_path / "mine/gguf").exists()
    (trained / "artifacts/adapter/SHA256SUMS").unlink()
    done = cli("export", "--from", trained.name, "--to", tmp_path / "other")
    assert done.code == 2 and "nothing vouches for it" in done.error


def test_what_a_check_had_only_begun_is_left_out_and_is_not_the_last(
    cli: Cli, checked: Path, home: Path, tmp_path: Path
) -> None:
    begun = home / "runs/20261129-000002-export-check-cccc"
    (begun / "artifacts/gguf").mkdir(parents=True)
    (begun / "artifacts/gguf/model-bf16.gguf.partial").touch()
    (begun / "config.json").write_text((checked / "config.json").read_text())
    (checked / "artifacts/gguf/model-q8_0.gguf.partial").touch()
    assert cli("export", "--from", "last", "--to", tmp_path / "mine").code == 0
    assert {f.name for f in (tmp_path / "mine/gguf").iterdir()} == {
        *("model-bf16.gguf", "model-q4_k_m.gguf", "Modelfile", "SHA256SUMS")
    }


def test_a_text_can_end_no_cell_and_open_no_tag() -> None:
    assert plain("a|b <b>\n`c`") == "a\\|b \\<b\\> \\`c\\`"


def test_a_modelfile_names_the_smallest_file_there_is(tmp_path: Path) -> None:
    (tmp_path / "model-bf16.gguf").touch()
    assert "model-bf16" in modelfile(tmp_path)
    (tmp_path / "model-q8_0.gguf").touch()
    assert "model-q8_0" in modelfile(tmp_path)
