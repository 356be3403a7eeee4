"""unsloth as the backend: what it is asked for, and (where it is installed) a run of it from beginning to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from radeon_stack.catalog.load import read, resolve
from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.errors import CheckError, MachineError
from radeon_stack.launch.launcher import config_record
from radeon_stack.runs import events as ev
from radeon_stack.workloads.finetune import unsloth_backend
from radeon_stack.workloads.probe import checks
from tests.conftest import ROOT
from tests.work.test_training import job_in

pytestmark = pytest.mark.work


class FakeUnsloth(ModuleType):
    """A stand-in that notes how it is called; it trains nothing."""

    def __init__(self, model: Any = None) -> None:
        super().__init__("unsloth")
        self.loaded: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}
        fake = self

        class FastLanguageModel:
            @staticmethod
            def from_pretrained(**given: Any) -> tuple[Any, None]:
                fake.loaded = given
                return model, None

            @staticmethod
            def get_peft_model(model: Any, **given: Any) -> Any:
                fake.asked = given
                return model

        self.FastLanguageModel = FastLanguageModel


def config(**more: Any) -> FinetuneConfig:
    told = {"model": "m", "backend": "unsloth", "lora": {"rank": 8, "alpha": 16}, "data": {"max_length": 128}, **more}
    return FinetuneConfig.model_validate(told)


def small_moe() -> Any:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts))


def test_without_the_package_it_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", None)
    for name in ("UNSLOTH_DISABLE_STATISTICS", "UNSLOTH_COMPILE_LOCATION"):
        monkeypatch.setenv(name, "")
    with pytest.raises(MachineError, match="not installed") as caught:
        unsloth_backend.bring(tmp_path)
    assert caught.value.where == "config.backend" and "KIND=train-unsloth" in caught.value.remedy


def test_nothing_is_counted_and_compiled_code_goes_to_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", FakeUnsloth())
    for name in ("UNSLOTH_DISABLE_STATISTICS", "UNSLOTH_COMPILE_LOCATION"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    unsloth_backend.bring(tmp_path)
    assert os.environ["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert os.environ["UNSLOTH_COMPILE_LOCATION"] == str(tmp_path / "unsloth")


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_fake_unsloth_is_asked_to_load_what_the_recipe_says(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    monkeypatch.setitem(sys.modules, "unsloth", fake := FakeUnsloth("the model"))
    told = config(train={"gradient_checkpointing": checkpointing}, samples={"max_new_tokens": 32})
    job, _ = job_in(tmp_path)
    loading = unsloth_backend.Loading.of(told)
    assert loading.load_16bit(job, tmp_path, torch.bfloat16, "reload", on=None) == "the model"
    assert fake.loaded == {
        "model_name": str(tmp_path),
        "max_seq_length": 128 + 32,
        "dtype": torch.bfloat16,
        "load_in_4bit": False,
        "load_in_16bit": True,
        "use_gradient_checkpointing": "unsloth" if checkpointing else False,
        "local_files_only": True,
    }


def test_a_model_that_unsloth_left_in_16_bit_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setitem(sys.modules, "unsloth", fake := FakeUnsloth(small_moe()))
    (tmp_path / "config.json").write_text("{}")
    told, (job, _) = config(), job_in(tmp_path)
    with pytest.raises(CheckError, match="is still in 16 bit"):
        unsloth_backend.Loading.of(told).load_for_training(
            job, tmp_path, told.quantization, torch.bfloat16, told.model_options.attention
        )
    assert fake.loaded["load_in_4bit"] is True


def test_a_fake_unsloth_is_asked_for_the_recipes_adapter_and_none_on_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", fake := FakeUnsloth())
    told = config(train={"seed": 5})
    unsloth_backend.adapted(small_moe(), told)
    assert fake.asked == {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
        "bias": "none",
        "use_gradient_checkpointing": "unsloth",
        "random_state": 5,
        "max_seq_length": 128,
    }
    unsloth_backend.adapted(small_moe(), config(lora={"target_modules": ["q_proj"]}))
    assert fake.asked["target_modules"] == ["q_proj"]


def test_experts_that_unsloth_packed_are_counted_as_what_they_are() -> None:
    import torch
    from bitsandbytes.nn import Params4bit

    from radeon_stack.workloads.finetune import base

    packed = Params4bit(torch.randn(2, 16, 64), requires_grad=False, quant_type="nf4").to("cpu")
    model = torch.nn.ModuleDict({"experts": torch.nn.Module()})
    model["experts"].register_parameter("down_proj", packed)
    assert base.quantized(model) == {"experts.down_proj": 2 * 16 * 64}
    assert base.memory(model) > 2 * 16 * 64 // 2  # their scales too


def test_what_is_imported_apart_must_be_importable() -> None:
    told = {"imports": ["json"], "apart": ["sqlite3"], "modules": []}
    assert checks.imports(told) == "2 imported, 0 found"
    with pytest.raises(CheckError, match=r"nowhere_at_all cannot be imported: ModuleNotFoundError"):
        checks.imports({**told, "apart": ["nowhere_at_all"]})


@pytest.mark.skipif(find_spec("unsloth") is None, reason="unsloth is not installed: it wants an environment of its own")
def test_unsloth_itself_trains_the_recipe_saves_the_adapter_and_merges(tiny_model: Path, tmp_path: Path) -> None:
    """On the GPU that is here, else by its CPU backend, which compiles for minutes."""
    effective = resolve(
        read("train-llama"), "demo", ("backend=unsloth", "train.steps=3", "samples.count=1", "samples.max_new_tokens=4")
    )
    run = tmp_path / "run"
    (run / "artifacts").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config_record(effective)))
    (run / "events.jsonl").touch()
    where = ["--run", str(run), "--cache", str(tmp_path / "cache"), "--model", str(tiny_model)]
    done = subprocess.run(
        [sys.executable, "-m", "radeon_stack.workloads.finetune", *where],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    events = ev.read_events(run / "events.jsonl")
    losses = [event.values["loss"] for event in events if isinstance(event, ev.Metric)]
    assert len(losses) == 3
    facts: dict[str, Any] = {event.name: event.value for event in events if isinstance(event, ev.Fact)}
    assert facts["environment"]["unsloth"] and facts["model"]["quantized_tensors"] == 2 * 7
    assert facts["merge"]["targeted"] == facts["merge"]["changed"] == 2 * 7
    assert (run / "artifacts" / "adapter" / "adapter_model.safetensors").is_file()
    assert {event.phase for event in events if isinstance(event, ev.Sample)} == {"before", "after", "merged"}
