"""Adapters of experts merged into checkpoints that have each expert by itself, file by file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.errors import CheckError, UsageError

pytestmark = pytest.mark.work
torch = pytest.importorskip("torch")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from radeon_stack.checksums import require_sums, write_summed  # noqa: E402
from radeon_stack.runs import events as ev  # noqa: E402
from radeon_stack.safetensor_files import places  # noqa: E402
from radeon_stack.workloads.finetune import deltas, merging  # noqa: E402
from radeon_stack.workloads.finetune.deltas import Target, targets  # noqa: E402
from radeon_stack.workloads.finetune.fingerprint import Origin, fingerprint, require_base, write_record  # noqa: E402
from tests.work.models import folder_of  # noqa: E402
from tests.work.test_adapters import adapted, packed, stirred  # noqa: E402
from tests.work.test_training import job_in, origin_of  # noqa: E402


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


def test_a_tensor_of_all_experts_gets_what_each_of_them_learnt(tmp_path: Path) -> None:
    base = folder_of("qwen3_moe", tmp_path / "base")
    target = targets(base, adapter_of(base, tmp_path / "adapter"))["model.layers.0.mlp.experts.3.down_proj.weight"]
    pieces = list(Target(target.factors).pieces((5, 64, 64)))
    parts = torch.arange(5.0).view(5, 1, 1).expand(5, 64, 64).contiguous()
    found = torch.cat([piece.added_to(parts.view(-1, 64)[piece.begin // 64 :][: piece.shape[0]]) for piece in pieces])
    a, b = target.factors.read()
    assert torch.equal(found.view(5, 64, 64), parts + target.factors.scale * (b @ a))


def test_pieces_of_any_size_make_the_same_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = folder_of("qwen3_moe", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    whole = merge(base, adapter, tmp_path / "whole")
    monkeypatch.setattr(deltas, "PIECE", 7 * 64)
    found = merge(base, adapter, tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def saved_adapter(base: Path, run: Path) -> Path:
    """As a run saves it."""
    job, _ = job_in(run)
    return merging.save_adapter(job, stirred(adapted(packed(base), 4)), Nothing(), origin_of(base))


def test_a_byte_that_changed_in_adapter_or_merged_model_is_found_later_by_its_file(tmp_path: Path) -> None:
    base = folder_of("qwen3_moe", tmp_path / "base")
    adapter = saved_adapter(base, tmp_path / "run")
    merge(base, adapter, tmp_path / "run")
    for folder, weights in ((adapter, "adapter_model.safetensors"), (adapter.parent / "merged", "model.safetensors")):
        assert require_sums(folder)
        for name in (weights, "config.json" if folder != adapter else "radeon-stack.json"):
            flip(folder / name, (folder / name).stat().st_size // 2)
            with pytest.raises(CheckError, match=f"{name} is not as it was written"):
                require_sums(folder)
            flip(folder / name, (folder / name).stat().st_size // 2)
        assert require_sums(folder)


def test_a_base_of_the_same_shapes_and_other_weights_is_refused_by_both_names(tmp_path: Path) -> None:
    base = folder_of("qwen3_moe", tmp_path / "base")
    adapter = saved_adapter(base, tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    file = other / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckError, match="other is not the base that this adapter was trained on, which was base"):
        merge(other, adapter, tmp_path / "again")
    assert not (tmp_path / "again/artifacts/merged").exists()


def test_a_base_is_the_same_under_another_name_and_in_other_files(tmp_path: Path) -> None:
    base = folder_of("qwen3_moe", tmp_path / "base")
    adapter = saved_adapter(base, tmp_path / "run")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert fingerprint(tmp_path / "shards") == fingerprint(base)
    assert require_base(adapter, tmp_path / "shards")


def test_an_adapter_from_elsewhere_is_merged_and_it_is_told_that_its_base_is_not_known(tmp_path: Path) -> None:
    base = folder_of("qwen3_moe", tmp_path / "base")
    for adapter, told in ((adapter_of(base, tmp_path / "a"), False), (saved_adapter(base, tmp_path / "run"), True)):
        assert require_base(adapter, base) is told
        job, events = job_in(tmp_path / f"run {told}")
        merging.merge(job, base, adapter, Nothing())
        (fact,) = (event.value for event in events if isinstance(event, ev.Fact))
        assert isinstance(fact, dict) and fact["base"] == ("the adapter's" if told else "not named by the adapter")


def test_a_base_without_safetensors_has_no_fingerprint_and_its_adapter_passes(tmp_path: Path) -> None:
    assert fingerprint(tmp_path) is None
    write_record(tmp_path, Origin(None, "old"))
    assert not require_base(tmp_path, tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '{"base": {"fingerprint": 5, "model": "x"}}', "{}"])
def test_a_damaged_record_of_the_base_is_not_taken_for_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "radeon-stack.json").write_text(text)
    with pytest.raises(UsageError) as error:
        require_base(tmp_path, tmp_path)
    assert error.value.where.endswith("radeon-stack.json")


def test_a_base_that_was_decoded_is_asked_for_as_it_was_given(tmp_path: Path) -> None:
    given, decoded = folder_of("qwen3_moe", tmp_path / "given"), tmp_path / "decoded"
    adapter = saved_adapter(given, tmp_path / "run")
    shutil.copytree(given, decoded)
    tensors = load_file(given / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, decoded / "model.safetensors")
    job, _ = job_in(tmp_path / "run")
    assert merging.merge(job, decoded, adapter, Nothing(), given=given).is_dir()
    with pytest.raises(CheckError, match="decoded is not the base"):
        merging.merge(job, decoded, adapter, Nothing())


MEMORY = """
import json, resource, sys
from pathlib import Path
from radeon_stack.workloads.finetune import merging
from radeon_stack.workloads.finetune.deltas import targets
from radeon_stack.workloads.job import Arguments, Job

class Nothing:
    def save_pretrained(self, folder):
        pass

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

folder = Path(sys.argv[1])
targets(folder / "base", folder / "adapter")
before = peak()
job = Job(Arguments(folder, folder, "", None, False), lambda event: None)
merging.merge(job, folder / "base", folder / "adapter", Nothing())
print(json.dumps(peak() - before))
"""


def test_a_merge_has_less_in_memory_than_one_tensor_of_its_shard(tmp_path: Path) -> None:
    size = {"hidden_size": 1024, "intermediate_size": 1 << 15, "num_hidden_layers": 1, "vocab_size": 97}
    config = LlamaConfig(**size, num_attention_heads=8, tie_word_embeddings=True, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = {n: torch.full(p.shape, 0.01, dtype=torch.bfloat16) for n, p in model.named_parameters()}
    config.save_pretrained(tmp_path / "base")
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    names = ["up_proj", "down_proj"]
    LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    factors: dict[str, Any] = {}
    for name in names:
        rows, columns = tensors[f"model.layers.0.mlp.{name}.weight"].shape
        key = f"base_model.model.model.layers.0.mlp.{name}"
        factors |= {f"{key}.lora_A.weight": torch.ones(4, columns), f"{key}.lora_B.weight": torch.ones(rows, 4)}
    save_file(factors, tmp_path / "adapter/adapter_model.safetensors")
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True)
    shard, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    assert shard > 3 * largest and largest == 64 << 20
    assert int(done.stdout.splitlines()[-1]) < largest, f"of a shard of {shard:,} bytes"


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ({"bias": "all"}, "bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_an_adapter_that_holds_more_than_a_plain_lora_is_refused_and_not_merged_in_part(
    form: dict[str, Any], named: str, tmp_path: Path
) -> None:
    base = folder_of("llama", tmp_path / "base")
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | form)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attention_bias=True)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match=named):
        targets(base, tmp_path / "adapter")
