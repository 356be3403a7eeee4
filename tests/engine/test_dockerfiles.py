"""BuildKit's own checks have nothing to say of any Dockerfile that we render."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from radeon_stack.catalog.platforms import load_platforms
from radeon_stack.host.clients import baking_client
from radeon_stack.images.builds import write_context
from radeon_stack.images.spec import image_spec

pytestmark = [pytest.mark.engine]
CLEAN = "Check complete, no warnings found."
UNCLEAN = "FROM base as other\nENTRYPOINT sh -c true\n"  # FromAsCasing, JSONArgsRecommended


def checked(client: str, context: Path, base: str, empty: Path) -> str:
    """What `docker build --check` prints of a context; an empty folder stands for its base, which it does not need."""
    command = [client, "buildx", "build", "--check", "--build-context", f"{base}={empty}", str(context)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.fixture
def checker(tmp_path: Path) -> str:
    client = baking_client()
    probe = tmp_path / "probe"
    probe.mkdir()
    (probe / "Dockerfile").write_text(UNCLEAN)
    said = checked(client, probe, "base", tmp_path) if client else ""
    if client is None or "FromAsCasing" not in said or "JSONArgsRecommended" not in said:
        pytest.skip("no engine here has BuildKit's checks (Docker 27 or newer, and docker-buildx)")
    return client


@pytest.mark.parametrize("kind", ["train", "verify"])
def test_buildkit_has_nothing_to_say_of_any_platform(kind: str, checker: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, platform in load_platforms().items():
        for trim in (False, True):
            context = tmp_path / f"{name}-{trim}"
            spec = image_spec(kind, platform, trim=trim)
            write_context(spec, context)
            said = checked(checker, context, spec.base, empty)
            assert CLEAN in said, f"{name}: {said}"
