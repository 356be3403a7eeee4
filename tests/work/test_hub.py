"""A model by its id: read from a hub where the recipe allows the network, the token passed on by name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from radeon_stack.errors import Exit
from tests.conftest import Cli
from tests.work.hub_server import TOKEN, Hub, serving

pytestmark = pytest.mark.work
NETWORK = ("--engine", "local", "--set", "resources.network=bridge")


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = shutil.copytree(tiny_model, tmp_path / "served")
    for name in ("pytorch_model.bin", "modeling.py"):
        (folder / name).write_text("import os")
    other = shutil.copytree(tiny_model, tmp_path / "other")
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace("LlamaForCausalLM", "LhamaForCausalLM"))
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    shutil.copy(tiny_model / "config.json", pickles)
    models = {"org/tiny": folder, "org/gated": folder, "org/other": other, "org/pickles": pickles}
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with serving(Hub(models, gated={"org/gated"})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def asking(tiny_run: tuple[str, ...], model: str, *more: str) -> list[str]:
    run = [model if word == tiny_run[5] else word for word in tiny_run]
    return [*run, *NETWORK, "--set", "train.steps=2", "--set", "samples.count=0", "--set", "export.merge=false", *more]


def downloads(hub: Hub) -> set[str]:
    return {path.rpartition("/")[2] for path in hub.asked if path.startswith("GET") and "/resolve/" in path}


def test_a_model_is_read_once_without_anything_that_runs_and_a_resumed_run_stays_at_the_commit_it_began_with(
    cli: Cli, tiny_run: tuple[str, ...], hub: Hub
) -> None:
    first = cli(*asking(tiny_run, "hub:org/tiny", "--set", "expect.final_loss_max=0.0001"))
    assert first.code == Exit.CHECK, first.error
    assert first.json["facts"]["model"]["source"] == f"hub:org/tiny@{'a' * 40}"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= downloads(hub)
    assert not downloads(hub) & {"pytorch_model.bin", "modeling.py", "consolidated.00.pth"}
    hub.asked.clear()
    again = cli(*asking(tiny_run, "hub:org/tiny@main"))
    assert again.code == Exit.OK, again.error
    assert not downloads(hub)
    assert cli("runs", "rm", "last").code == 0

    hub.revision = "b" * 40  # somebody pushed
    hub.asked.clear()
    resumed = cli("run", "--resume", "last", "--json")
    assert resumed.json["facts"]["model"]["source"].endswith("a" * 40)
    assert not hub.asked


def test_a_gated_model_wants_the_token_and_the_token_stays_out_of_every_record(
    cli: Cli, tiny_run: tuple[str, ...], hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = cli(*asking(tiny_run, "hub:org/gated"))
    assert refused.code == Exit.USAGE
    assert "org/gated is given out on request alone; no HF_TOKEN is given" in refused.error
    assert "--set secrets='[\"HF_TOKEN\"]'" in refused.error
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    taken = cli(*asking(tiny_run, "hub:org/gated", "--set", 'secrets=["HF_TOKEN"]'))
    assert taken.code == Exit.OK, taken.error
    files = [path for path in home.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 10 and not any(TOKEN.encode() in path.read_bytes() for path in files)
    assert TOKEN not in taken.out + taken.error


@pytest.mark.parametrize(
    ("model", "code", "says"),
    [
        ("hub:org/nobody", Exit.USAGE, "the hub knows no model org/nobody, or does not show it"),
        ("hub:org/tiny@v9", Exit.USAGE, "org/tiny has no revision v9"),
        ("hub:org/pickles", Exit.USAGE, "org/pickles has no weights as safetensors"),
        ("hub:org/other", Exit.USAGE, "the architecture LhamaForCausalLM is not known"),
        ("hub:../etc", Exit.USAGE, "'hub:ORG/NAME'"),
    ],
)
def test_what_the_hub_does_not_have_is_told_with_the_key(
    cli: Cli, tiny_run: tuple[str, ...], hub: Hub, model: str, code: Exit, says: str
) -> None:
    result = cli(*asking(tiny_run, model))
    assert result.code == code and says in result.error and "config.model" in result.error


def test_a_hub_that_cannot_be_reached_is_this_machines_matter(
    cli: Cli, tiny_run: tuple[str, ...], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = cli(*asking(tiny_run, "hub:org/tiny"))
    assert result.code == Exit.MACHINE and "cannot be read from the hub" in result.error


def test_without_the_network_nothing_is_started(cli: Cli, tiny_run: tuple[str, ...], hub: Hub) -> None:
    closed = cli(*asking(tiny_run, "hub:org/tiny", "--set", "resources.network=none"))
    assert closed.code == Exit.USAGE and "--set resources.network=bridge" in closed.error
    bare = cli(*asking(tiny_run, "org/tiny"))
    assert bare.code == Exit.USAGE and "--model hub:org/tiny --set resources.network=bridge" in bare.error
    assert not hub.asked
