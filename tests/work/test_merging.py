"""Adapters of experts merged into checkpoints that have each expert by itself, file by file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.errors import CheckError, UsageError

pytestmark = pytest.mark.work
torch = pytest.importorskip("torch")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from radeon_stack.checksums import write_summed  # noqa: E402
from radeon_stack.safetensor_files import places  # noqa: E402
from radeon_stack.workloads.finetune import merging  # noqa: E402
from radeon_stack.workloads.finetune.deltas import targets  # noqa: E402
from tests.work.models import folder_of  # noqa: E402
from tests.work.test_adapters import adapted, packed, stirred  # noqa: E402
from tests.work.test_training import job_in  # noqa: E402


class Nothing:
    """In a tokenizer's place: these models have none."""

    def save_pretrained(self, folder: Path) -> None:
        pass


def merge(base: Path, adapter: Path, folder: Path) -> dict[str, Any]:
    job, _ = job_in(folder)
    merged = merging.merge(job, base, adapter, Nothing())
    return {name: tensor for file in sorted(merged.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def adapter_of(base: Path, folder: Path, rank: int = 4) -> Path:
    stirred(adapted(packed(base), rank)).save_pretrained(folder)
    return folder


def flip(file: Path, at: int) -> None:
    """One bit of a byte, turned."""
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(("kind", "inner"), [("qwen3_moe", 64), ("qwen3_moe", 192), ("mixtral", 64)])
def test_what_is_merged_is_what_peft_merges_an_expert_a_file(kind: str, inner: int, tmp_path: Path) -> None:
    width = {"moe_intermediate_size": inner} if kind == "qwen3_moe" else {}
    base = folder_of(kind, tmp_path / "base", **width)
    adapter = adapter_of(base, tmp_path / "adapter")
    found = merge(base, adapter, tmp_path / "run")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    theirs.merge_and_unload().to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    wanted = load_file(tmp_path / "theirs" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert found.keys() == wanted.keys() == before.keys()
    for name, tensor in wanted.items():
        # Summed in another order, a rounding may fall to the other side.
        assert (found[name].float() - tensor.float()).abs().max() <= 2**-8 * tensor.abs().max(), name
    changed = {name for name in before if not torch.equal(before[name], found[name])}
    assert changed == {name for name in before if "experts" in name or ("attn" in name and "_norm" not in name)}


def test_the_merged_model_is_loaded_by_transformers_and_speaks_as_the_adapted_one(tmp_path: Path) -> None:
    base = folder_of("qwen3_moe", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "run")
    ids = torch.arange(14).view(2, 7) * 5 % 97
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/artifacts/merged", dtype=torch.float32)
    adapted_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        found, wanted = merged(input_ids=ids).logits, adapted_base(input_ids=ids).logits
        bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=ids).logits
    assert (found - wanted).abs().max() < 0.1 * (bare - wanted).abs().max()


def test_a_base_in_several_files_stays_in_them_with_their_index(tmp_path: Path) -> None:
    base = folder_of("qwen3_moe", tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    found = merge(tmp_path / "shards", adapter_of(base, tmp_path / "adapter"), tmp_path / "run")
    merged = tmp_path / "run/artifacts/merged"
    assert json.loads((merged / "model.safetensors.index.json").read_text()) == index
    whole = merge(base, tmp_path / "adapter", tmp_path / "other")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_an_expert_that_learnt_nothing_is_the_bases(tmp_path: Path) -> None:
    base = folder_of("qwen3_moe", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if "layers.1" in name and "experts.lora_B" in name)  # the down projection's
    tensors[key].view(64, 4, 5)[:, :, 3] = 0
    save_file(tensors, file)
    found, before = merge(base, adapter, tmp_path / "run"), load_file(base / "model.safetensors")
    same = {name for name in before if "experts" in name and torch.equal(before[name], found[name])}
    assert same == {"model.layers.1.mlp.experts.3.down_proj.weight"}


def test_a_tensor_that_was_written_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = folder_of("qwen3_moe", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")

    def flipping(file: Path, parts: Any) -> str:
        told = write_summed(file, parts)
        place = places(file.parent)["model.layers.1.mlp.experts.2.up_proj.weight"]
        flip(place.file, place.begin)
        return told

    monkeypatch.setattr(merging, "write_summed", flipping)
    with pytest.raises(CheckError, match=r"experts\.2\.up_proj\.weight is not what base and adapter make"):
        merge(base, adapter, tmp_path / "run")
    assert not (tmp_path / "run/artifacts/merged").exists()


def test_an_adapter_of_another_model_is_refused_by_name(tmp_path: Path, tiny_model: Path) -> None:
    base = folder_of("qwen3_moe", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"the base has no model\.layers\.0\.mlp\.experts"):
        targets(tiny_model, adapter)
    wider = folder_of("qwen3_moe", tmp_path / "wider", moe_intermediate_size=128)
    with pytest.raises(UsageError, match=r"is for a tensor of \[64, 64\]; the base has \[64, 128\]"):
        merge(wider, adapter, tmp_path / "run")


def test_other_forms_than_plain_lora_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)).save_pretrained(tmp_path / "dora")
    with pytest.raises(UsageError, match="adapters with use_dora cannot be merged"):
        targets(tiny_model, tmp_path / "dora")
