"""Experts packed while a checkpoint is loaded: real, tiny models of transformers, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.errors import UsageError

pytestmark = pytest.mark.work
torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM  # noqa: E402

from radeon_stack.kernels import interface, quantizer  # noqa: E402
from tests.work.models import EXPERT_MODELS, folder_of  # noqa: E402


@pytest.fixture(params=list(EXPERT_MODELS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return folder_of(request.param, tmp_path / "model")


def load(folder: Path, **more: Any) -> Any:
    interface.register()
    quantizer.register()
    where = {"dtype": torch.bfloat16, "device_map": {"": "cpu"}, "experts_implementation": "radeon_nf4"}
    return AutoModelForCausalLM.from_pretrained(folder, **where, **more)


def packed(model: Any) -> dict[str, Any]:
    """Every experts' matrix by its name, as the kernels read it."""
    return {
        f"{path}.{name}": interface.experts_weight(module, name)
        for path, module in model.named_modules()
        if interface.is_experts(module)
        for name in interface.matrix_names(module)
    }


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.arange(14).view(2, 7) * 5 % 97).logits


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_parts_of_a_tensor_are_as_long_and_together_all_of_it(count: int) -> None:
    whole = torch.arange(1, 21, dtype=torch.uint8).view(-1, 1)
    parts = [quantizer.part(whole, number, count) for number in range(count)]
    assert {part.numel() for part in parts} == {-(-20 // count)}
    together = torch.cat(parts)
    assert torch.equal(together[:20], whole.flatten()) and not together[20:].any()


def test_a_loader_that_was_told_to_keeps_its_share_of_each_packed_matrix(tmp_path: Path) -> None:
    kept = folder_of("qwen3_moe", tmp_path / "model")
    whole, second = (load(kept, quantization_config=quantizer.Nf4Config(share=share)) for share in (None, (1, 2)))
    for (name, all_of_it), own in zip(whole.named_parameters(), second.parameters(), strict=True):
        wanted = all_of_it.chunk(2)[1] if all_of_it.dtype == torch.uint8 else all_of_it
        assert torch.equal(wanted, own), name
    matrix = "model.layers.0.mlp.experts.down_proj"
    sizes = [model.hf_quantizer.param_element_size(model, matrix, torch.empty(1)) for model in (whole, second)]
    assert sizes == [0.5, 0.25]
    assert "share" not in second.config.quantization_config.to_dict()


@pytest.mark.parametrize("double", [False, True])
def test_experts_are_packed_as_bitsandbytes_packs_a_whole_layer(folder: Path, double: bool) -> None:
    model = load(folder, quantization_config=quantizer.Nf4Config(double=double))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert interface.pack_experts(whole, double=double) == sum(one.shape.numel() for one in packed(model).values())
    expected = packed(whole)
    for name, one in packed(model).items():
        assert torch.equal(one.packed.flatten(), expected[name].packed.flatten())
        assert torch.equal(one.absmax, expected[name].absmax) and one.nested == double
        if double:
            assert torch.equal(one.nested_absmax, expected[name].nested_absmax)
            assert torch.equal(one.nested_offset, expected[name].nested_offset)


def test_no_more_than_one_matrix_of_a_layer_is_there_in_16_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("qwen3_moe", tmp_path / "model")
    seen: list[tuple[int, ...]] = []
    quantize_4bit: Callable[..., Any] = vars(quantizer)["quantize_4bit"]

    def watched(matrix: Any, **more: Any) -> Any:
        seen.append(tuple(matrix.shape))
        return quantize_4bit(matrix, **more)

    monkeypatch.setattr(quantizer, "quantize_4bit", watched)
    load(folder, quantization_config=quantizer.Nf4Config())
    layers, experts = 2, 5
    assert set(seen) == {(64, 64)}
    assert len(seen) == layers * experts * 3, "gate, up and down of each expert, by itself"


@pytest.mark.parametrize("double", [False, True])
def test_what_was_saved_packed_is_read_back_to_the_bit(folder: Path, tmp_path: Path, double: bool) -> None:
    model = load(folder, quantization_config=quantizer.Nf4Config(double=double))
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))
    for name, one in packed(again).items():
        assert torch.equal(one.packed, packed(model)[name].packed)
    small = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    assert small < sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_linear_layers_are_bitsandbytes_as_ever(folder: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    model = load(folder, quantization_config=quantizer.Nf4Config())
    assert isinstance(model.model.layers[0].self_attn.q_proj, Linear4bit)
    assert type(model.lm_head) is torch.nn.Linear


def test_a_checkpoint_without_some_experts_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = folder_of("gpt_oss", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "1.mlp.experts.down_proj" not in k}, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.experts\.down_proj was not found in the checkpoint"):
        load(folder, quantization_config=quantizer.Nf4Config())


def test_rows_that_are_no_whole_blocks_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    folder = folder_of("mixtral", tmp_path / "model", intermediate_size=80)
    with pytest.raises(UsageError, match=r"experts\.down_proj: rows of 80 values"):
        load(folder, quantization_config=quantizer.Nf4Config())


def test_experts_of_unlike_numbers_are_not_packed_together() -> None:
    one = torch.randn(4, 64)
    with pytest.raises(UsageError, match="2, 1 experts' parts"):
        quantizer.pack([[one, one], [one]], double=False)
