"""What is in a namespace is there when it is entered."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.engine.conftest import missing
from tests.engine.debian import HERE, apart

pytestmark = [pytest.mark.engine]
MANY = 100  # each is a program that is started: long enough to come too early


def test_nobody_enters_before_the_last_mount_is_made(tmp_path: Path) -> None:
    if os.geteuid():
        missing("root is needed for a mount namespace")
    source, places = tmp_path / "source", [tmp_path / f"place{number}" for number in range(MANY)]
    source.write_text("mounted")
    for place in places:
        place.write_text("bare")
    links = {tmp_path / f"source{number}": str(place) for number, place in enumerate(places)}
    for link in links:
        os.link(source, link)
    with apart(HERE, links, ["sleep", "infinity"], tmp_path / "log", {"PATH": os.environ["PATH"]}) as there:
        seen = subprocess.run([*there.enter, "cat", *map(str, places)], capture_output=True, text=True, check=True)
    assert seen.stdout == "mounted" * MANY


def test_a_namespace_that_cannot_be_furnished_says_why(tmp_path: Path) -> None:
    if os.geteuid():
        missing("root is needed for a mount namespace")
    absent = {tmp_path / "absent": str(tmp_path / "place")}
    with (
        pytest.raises(AssertionError, match="absent"),
        apart(HERE, absent, ["true"], tmp_path / "log", {"PATH": os.environ["PATH"]}),
    ):
        pass
