"""LoRA over a base in FP8, of three sources, held against the 16-bit model: a real, tiny LLaMA on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.contracts.finetune import Quantization
from radeon_stack.errors import Exit, MachineError, UsageError
from tests.conftest import ROOT, Cli
from tests.work.checkpoints import IGNORED, block_fp8, fp8_dynamic
from tests.work.test_runs import losses
from tests.work.test_training import adapted, gradients, job_in

pytestmark = pytest.mark.work
LOCAL = ("--engine", "local")
Source = Callable[[Path, Path], Path]


def as_it_is(folder: Path, into: Path) -> Path:
    del into
    return folder


SOURCES: dict[str, Source] = {"16 bit": as_it_is, "FP8-Dynamic": fp8_dynamic, "block-wise": block_fp8}


@pytest.fixture(params=list(SOURCES))
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(source: str, tiny_model: Path, tmp_path: Path) -> Path:
    return SOURCES[source](tiny_model, tmp_path / "fp8")


def loaded(folder: Path, tmp_path: Path, kind: Any = "fp8", precision: str = "bf16") -> Any:
    from radeon_stack.workloads.finetune import base

    return base.load_for_training(job_in(tmp_path)[0], folder, Quantization(kind=kind), base.DTYPES[precision])


def eight_bit(model: Any) -> dict[str, Any]:
    from radeon_stack.kernels.fp8 import Fp8Linear

    return {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}


def apart(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """‖found − wanted‖ / ‖wanted‖, over all tensors."""
    assert found.keys() == wanted.keys() and found
    off, size = (
        sum(float(t.norm()) ** 2 for t in ts) for ts in ([found[n] - wanted[n] for n in wanted], wanted.values())
    )
    return (off / size) ** 0.5


def test_it_is_loaded_as_the_checkpoint_has_it_and_what_that_leaves_in_16_bit_stays_so(
    source: str, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    from radeon_stack.kernels.fp8 import dequantize

    model = loaded(folder, tmp_path)
    layers = eight_bit(model)
    assert (len(layers), IGNORED in layers) == ((14, True) if source == "16 bit" else (13, False))
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    written, original = load_file(folder / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    for name, layer in layers.items():
        assert not layer.weight.requires_grad and not layer.weight_scale.requires_grad
        if source != "16 bit":
            assert torch.equal(layer.weight.view(torch.uint8), written[f"{name}.weight"].view(torch.uint8))
        # Half of the last of three bits of mantissa: 1/16 at most, and 2^-10 · scale of what is subnormal.
        exact = original[f"{name}.weight"].float()
        least = float(exact.abs().max()) / 448 * 2**-10
        near = dequantize(layer.quantized, torch.float32)
        torch.testing.assert_close(near, exact, rtol=1 / 16 + 2**-8, atol=least)


def test_its_weights_take_half_of_what_16_bit_takes(
    source: str, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from radeon_stack.workloads.finetune import base

    facts = base.describe(loaded(folder, tmp_path), folder, "x")
    plain = base.describe(loaded(tiny_model, tmp_path, "none"), tiny_model, "x")
    values = facts["parameters_8bit"]
    assert values == (73_728 if source == "16 bit" else 65_536) and facts["parameters"] == plain["parameters"]
    assert values <= facts["weights_8bit_bytes"] < 1.07 * values  # a row of 64 values with its scale: 68 bytes
    assert facts["memory_bytes"] == plain["memory_bytes"] - 2 * values + facts["weights_8bit_bytes"]
    assert facts["scaled_by"] == ("block" if source == "block-wise" else "channel")
    assert "parameters_8bit" not in plain


def test_gradients_are_those_of_the_same_values_in_16_bit(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from radeon_stack.kernels.fp8 import dequantize

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, same = loaded(folder, tmp_path), loaded(tiny_model, tmp_path, "none")
    values = {f"{name}.weight": dequantize(one.quantized, torch.bfloat16) for name, one in eight_bit(model).items()}
    assert same.load_state_dict(values, strict=False).unexpected_keys == []
    assert apart(gradients(adapted(model), tokenizer), gradients(adapted(same), tokenizer)) < 1e-3


def test_what_fp8_rounds_away_moves_gradients_by_less_than_five_percent(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """In float32, since bf16's own rounding moves those of this random model as much; and with small adapters."""
    from transformers import AutoTokenizer

    from radeon_stack.workloads.finetune.adapter import lora_layers

    tokenizer = AutoTokenizer.from_pretrained(folder)
    models = [adapted(loaded(*of, "fp32")) for of in ((folder, tmp_path, "fp8"), (tiny_model, tmp_path, "none"))]
    for model in models:
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.data *= 0.1
    found, original = (gradients(model, tokenizer) for model in models)
    assert 1e-3 < apart(found, original) < 0.05


def test_adapters_begin_as_they_do_in_16_bit(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    """PEFT would make them in the weight's dtype, and their first values would be among 256."""
    import torch

    from radeon_stack.workloads.finetune.adapter import lora_layers

    eight, plain = (lora_layers(adapted(loaded(*of))) for of in ((folder, tmp_path), (tiny_model, tmp_path, "none")))
    assert eight.keys() == plain.keys() and len(eight) == 14
    for name, layer in eight.items():
        weight = layer.lora_A["default"].weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, plain[name].lora_A["default"].weight)


def test_each_source_ends_in_a_trained_and_merged_model_with_the_losses_of_16_bit(
    cli: Cli, tiny_run: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    learning = ("--set", "train.learning_rate=5e-3")
    in_16_bit = (*learning, "--set", "quantization.kind=none", "--set", "export.merge=false")
    wanted = losses(cli(*tiny_run, *LOCAL, *in_16_bit, cwd=tmp_path).json)
    words = ["train-llama-fp8" if word == "train-llama" else word for word in tiny_run]
    for source, make in SOURCES.items():
        words[words.index("--model") + 1] = str(make(tiny_model, tmp_path / "".join(filter(str.isalpha, source))))
        result = cli(*words, *LOCAL, *learning, cwd=tmp_path)
        assert result.code == Exit.OK, f"{source}: {result.err}"
        told = result.json
        found = losses(told)
        assert found.keys() == wanted.keys() and len(found) == 12
        assert found[12] < found[1] - 0.5
        for step, loss in wanted.items():
            assert abs(found[step] - loss) <= 0.02 * loss, f"{source}, step {step}: {found[step]}, in 16 bit {loss}"
        assert told["facts"]["model"]["layers_8bit"] == (14 if source == "16 bit" else 13)
        assert told["facts"]["merge"] == told["facts"]["merge"] | {"targeted": 14, "changed": 14}
        merged = Path(told["artifacts"]["merged"])
        tensors = {name: tensor for file in merged.glob("*.safetensors") for name, tensor in load_file(file).items()}
        assert not any("scale" in name or str(tensor.dtype) != "torch.bfloat16" for name, tensor in tensors.items())
        assert "quantization_config" not in json.loads((merged / "config.json").read_text())
        assert {"tokenizer.json", "generation_config.json"} <= {path.name for path in merged.iterdir()}
        assert sorted(path.name for path in merged.parent.iterdir()) == ["adapter", "checkpoints", "merged"]


def test_what_is_in_fp8_is_not_quantised_again(tiny_model: Path, tmp_path: Path) -> None:
    folder = fp8_dynamic(tiny_model, tmp_path / "fp8")
    for kind in ("nf4", "none"):
        with pytest.raises(UsageError, match=r"fp8 is in FP8 already \(compressed-tensors\)") as raised:
            loaded(folder, tmp_path, kind)
        assert "train-llama-fp8" in str(raised.value.remedy)


def test_scaled_mm_is_used_where_the_probe_finds_it_right_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from radeon_stack.contracts.capabilities import Answer
    from radeon_stack.workloads.finetune import base, fp8

    asked = Quantization(kind="fp8", products="scaled_mm")
    model = base.load_for_training(job_in(tmp_path)[0], tiny_model, asked, torch.bfloat16)
    assert {layer.way for layer in eight_bit(model).values()} == {"scaled_mm"}
    ids = torch.arange(16)[None]
    plain = loaded(tiny_model, tmp_path)(input_ids=ids).logits
    assert 1e-4 < float(apart({"": model(input_ids=ids).logits.detach()}, {"": plain.detach()})) < 0.1
    wrong = Answer(question="scaled_mm.row", verdict="wrong", detail="forward: it is off")
    monkeypatch.setattr(fp8, "answers", lambda *_, **__: iter([wrong]))
    with pytest.raises(MachineError, match=r"torch\._scaled_mm: wrong \(forward: it is off\)"):
        base.load_for_training(job_in(tmp_path)[0], tiny_model, asked, torch.bfloat16)


def damaged(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """The folder after `change(tensors, quantization_config)`."""
    from safetensors.torch import load_file, save_file

    file, weights = folder / "config.json", folder / "model.safetensors"
    config, tensors = json.loads(file.read_text()), load_file(weights)
    change(tensors, config["quantization_config"])
    save_file(tensors, weights, metadata={"format": "pt"})
    file.write_text(json.dumps(config))
    return folder


LAYER = "model.layers.0.mlp.up_proj"


def scales_by_tensor(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"][:2]


def no_scales(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    del tensors[f"{LAYER}.weight_scale"]


def another_method(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    config["quant_method"] = "gptq\x1b[2J"


def other_blocks(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    config["weight_block_size"] = [64, 64]


def scale_of_nan(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.weight_scale"][3] = float("nan")


def no_fp8(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    import torch

    tensors.update({name: t.to(torch.bfloat16) for name, t in tensors.items()})


def a_layer_that_is_none(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    for end in ("weight", "weight_scale"):
        tensors[f"model.layers.0.mlp.experts.0.up_proj.{end}"] = tensors[f"{LAYER}.{end}"].clone()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (scales_by_tensor, r"mlp.up_proj.weight_scale: scales \[2, 1\] of a weight \[128, 64\]"),
        (no_scales, r"mlp.up_proj.weight is in FP8 and has no scales"),
        (another_method, r"is quantised by gptq[^\x1b]*, not in FP8"),
        (other_blocks, r"scales by blocks of \[64, 64\]"),
        (scale_of_nan, r"mlp.up_proj.weight holds NaN or infinity"),
        (no_fp8, r"says that it is in FP8 \(compressed-tensors\), and no tensor of it is"),
        (a_layer_that_is_none, r"experts.0.up_proj is in FP8 and no linear layer of LlamaForCausalLM"),
    ],
)
def test_a_checkpoint_that_is_not_understood_is_refused(
    change: Callable[[dict[str, Any], dict[str, Any]], None], what: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = damaged(fp8_dynamic(tiny_model, tmp_path / "fp8"), change)
    with pytest.raises(UsageError, match=what):
        loaded(folder, tmp_path)


def test_while_it_is_rounded_no_second_16_bit_weight_is_held(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc

    import torch

    from radeon_stack.kernels import fp8, fp8_quantizer

    most = 0

    def watched(matrix: Any) -> Any:
        nonlocal most
        gc.collect()
        held = [
            t
            for t in gc.get_objects()
            if issubclass(type(t), torch.Tensor) and t.dtype == torch.bfloat16 and t.ndim == 2
        ]
        shapes = {(64, 64), (32, 64), (128, 64), (64, 128)}
        most = max(most, len({t.data_ptr() for t in held if t.device.type == "cpu" and tuple(t.shape) in shapes}))
        return fp8.quantize(matrix)

    monkeypatch.setattr(fp8_quantizer, "quantize", watched)
    gc.collect()
    loaded(tiny_model, tmp_path)
    assert most == 1


def test_two_processes_find_the_gradients_of_one(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_model)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.work.fp8_processes", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=300, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("agreed-*")} == {"agreed-0", "agreed-1"}


def test_the_demo_knows_the_birthday_after_training_in_fp8_and_not_before(cli: Cli, tmp_path: Path) -> None:
    # Its chats are all the same one: a second pass a step would find the same gradients again.
    once = ("--set", "train.gradient_accumulation=1")
    result = cli("run", "train-llama-fp8", "--preset", "demo", *LOCAL, *once, "--json", cwd=tmp_path, timeout=3600)
    assert result.code == Exit.OK, result.err
    told = result.json["result"]
    assert (told["correct_before"], told["correct_after"], told["correct_merged"]) == (0, 5, 5)
    assert result.json["facts"]["model"]["parameters_8bit"] == 106_168_320
