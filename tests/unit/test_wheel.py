"""A built wheel works by itself: recipes and docker folder travel inside it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling is missing: make setup")
def test_a_wheel_in_an_empty_folder_lists_shows_and_renders(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        assert "radeon_stack.cli:main" in archive.read("radeon_stack-0.1.0.dist-info/entry_points.txt").decode()
    empty = tmp_path / "empty"
    empty.mkdir()
    outside = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-P", "-m", "radeon_stack", *arguments]
        return subprocess.run(command, cwd=empty, env=outside, check=True, capture_output=True, text=True).stdout

    where = subprocess.run(
        [sys.executable, "-P", "-c", "import radeon_stack; print(radeon_stack.__file__)"],
        cwd=empty, env=outside, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert str(tmp_path) in where
    assert "train-llama" in [recipe["name"] for recipe in json.loads(run("list", "--json"))]
    assert "FROM radeon-stack/stand-in:cpu" in run("image", "render", "--arch", "cpu")
    run("image", "render", "--arch", "cpu", "-o", "context")
    assert (empty / "context" / "requirements.txt").is_file()
