"""Memory worked out beforehand, against what was measured; and model folders that lie."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.catalog.load import read, resolve
from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.errors import UsageError
from radeon_stack.launch.estimate import TOLERANCE, Training, estimate, training_of
from radeon_stack.launch.model_shape import ModelShape, read_shape
from tests.conftest import ROOT, Cli
from tests.shapes import ATTENTION, folder_of, llama_8b, qwen3_30b_a3b

GIB = 1 << 30


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return read_shape(folder_of(tmp_path_factory.mktemp("llama"), *llama_8b()))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return read_shape(folder_of(tmp_path_factory.mktemp("qwen"), *qwen3_30b_a3b()))


@pytest.fixture(scope="module")
def qwen_of_8_layers(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return read_shape(folder_of(tmp_path_factory.mktemp("qwen8"), *qwen3_30b_a3b(8)))


def near(found: int, measured: float) -> bool:
    return abs(found - measured) <= TOLERANCE * measured


def test_parameters_are_counted_as_the_seeds_logs_have_them(llama: ModelShape, qwen: ModelShape) -> None:
    everything = estimate(llama, Training(5, 60, 64))
    assert (llama.parameters + everything.trained, everything.trained) == (8_198_033_408, 167_772_160)
    attention = estimate(qwen, Training(1, 60, 64, targets=ATTENTION))
    assert (qwen.parameters + attention.trained, attention.trained) == (30_585_600_000, 53_477_376)


def test_our_llama_run_on_a_card_was_estimated_within_the_tolerance(llama: ModelShape) -> None:
    record = json.loads((ROOT / "benchmarks/seed_train_llama.json").read_text())
    # The chat has 47 tokens with the tokenizer of that run.
    found = estimate(llama, Training(batch=5, length=47, rank=64))
    assert near(found.tensors, record["result"]["peak_memory_bytes"])
    weights = found.parts["weights in 4 bit"] + found.parts["weights in 16 bit"] + found.parts["adapter"]
    # What torch counts as parameters has no absmax.
    assert abs(weights - llama.quantizable / 64 - record["model"]["memory_bytes"]) < 0.001 * weights


@pytest.mark.parametrize(("batch", "length", "gib"), [(5, 60, 8.99), (4, 2048, 15.32)])
def test_stock_llama_on_an_h200_was_estimated_within_the_tolerance(
    llama: ModelShape, batch: int, length: int, gib: float
) -> None:
    """TRL, PEFT and bitsandbytes, measured 2026-11-23. They hold in float32 what is not quantised."""
    assert near(estimate(llama, Training(batch, length, 64, prepared=True)).tensors, gib * GIB)


@pytest.mark.parametrize(("batch", "length", "gib"), [(5, 60, 20.81), (4, 2048, 24.16)])
def test_stock_qwen_moe_was_estimated_within_the_tolerance(
    qwen_of_8_layers: ModelShape, batch: int, length: int, gib: float
) -> None:
    """The same of 8 of 48 layers: the experts, which nothing quantises, are float32 too."""
    training = Training(batch, length, 64, targets=ATTENTION, prepared=True)
    assert near(estimate(qwen_of_8_layers, training).tensors, gib * GIB)
    assert not near(estimate(qwen_of_8_layers, replace(training, prepared=False)).tensors, gib * GIB)


def test_experts_in_4_bit_put_the_whole_qwen_on_one_r9700(qwen: ModelShape) -> None:
    training = Training(1, 512, 64, targets=ATTENTION)
    assert estimate(qwen, training).total > 50 * GIB
    assert estimate(qwen, replace(training, experts_quantized=True)).total < 20 * GIB


def test_what_is_stored_has_the_size_of_its_format(llama: ModelShape) -> None:
    double, single = (estimate(llama, Training(1, 8, 64, double=d)).parts["weights in 4 bit"] for d in (True, False))
    blocks = llama.quantizable // 64
    assert single == llama.quantizable // 2 + 4 * blocks
    assert double == llama.quantizable // 2 + blocks + 4 * (blocks // 256)
    assert estimate(llama, Training(1, 8, 64, quantized=False)).parts["weights in 16 bit"] == 2 * llama.parameters


def test_fp8_takes_half_of_16_bit_whether_it_is_stored_so_or_rounded_while_read(
    llama: ModelShape, tmp_path: Path
) -> None:
    config, tensors = llama_8b()
    scales = {f"{name}_scale": (sizes[0], 1) for name, sizes in tensors.items() if "_proj" in name}
    stored = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    shape = read_shape(folder_of(tmp_path, config | {"quantization_config": stored}, tensors | scales))
    assert shape == llama
    found = estimate(shape, Training(1, 8, 64, quantized=False, eight=True))
    rows = 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    assert found.parts["weights in 8 bit"] == llama.quantizable + 4 * rows
    assert found.parts["weights in 16 bit"] == 2 * llama.kept
    assert found.parts["adapter"] == 4 * found.trained
    effective = resolve(read("train-llama-fp8"), None, ())
    assert isinstance(effective.config, FinetuneConfig)
    assert training_of(effective.config).eight


def test_what_is_kept_and_what_is_computed_again_adds_up(llama: ModelShape) -> None:
    def activations(**settings: Any) -> int:
        return estimate(llama, Training(4, 2048, 64, **settings)).parts["activations"]

    kept, some, most = (activations(checkpointing=c, every=n) for c, n in ((False, 1), (True, 8), (True, 2)))
    every, offloaded = activations(), activations(offloaded=True)
    assert kept > some > most > every > offloaded
    assert every - offloaded == 31 * 4 * 2048 * 4096 * 2


def test_the_adapters_products_of_layers_that_are_computed_again_are_kept(llama: ModelShape) -> None:
    def products(batch: int, **settings: Any) -> int:
        return estimate(llama, Training(batch, 2048, 64, **{"kept": True, **settings})).parts["kept products"]

    assert products(4) == 32 * 7 * 4 * 2048 * 64 * 2
    assert products(4, every=2) == products(2) == products(4) // 2
    assert products(4, targets=ATTENTION) == products(4) * 4 // 7
    without = ({"kept": False}, {"checkpointing": False}, {"quantized": False}, {"offloaded": True})
    assert not any(products(4, **settings) for settings in without)
    assert not estimate(llama, Training(4, 2048, 256, kept=True)).spare
    told = estimate(llama, Training(4, 2048, 64, kept=True))
    assert told.total == estimate(llama, Training(4, 2048, 64)).total, "a card that is too small does without"
    assert not estimate(llama, Training(1, 512, 64, kept=True)).parts["kept products"]  # so few are not worth it


def test_an_optimizer_takes_what_its_states_take(llama: ModelShape) -> None:
    training = Training(1, 8, 64)
    trained = estimate(llama, training).trained
    assert estimate(llama, training).parts["optimizer"] == 2 * trained + 8 * (trained // 256)
    assert estimate(llama, replace(training, optimizer="adamw_torch")).parts["optimizer"] == 4 * trained
    # Without quantisation PEFT holds the adapter in float32, and so are the states.
    plain = replace(training, optimizer="adamw_torch", quantized=False)
    assert estimate(llama, plain).parts["optimizer"] == 8 * trained


def test_several_processes_hold_their_gradients_twice(llama: ModelShape) -> None:
    one, two = (estimate(llama, Training(1, 8, 64, processes=n)) for n in (1, 2))
    assert two.parts["gradients"] == 2 * one.parts["gradients"]
    assert two.tensors - one.tensors == one.parts["gradients"]


def test_a_share_is_a_part_of_the_layers_and_three_of_them_gathered(llama: ModelShape, qwen: ModelShape) -> None:
    for model, of in (
        (llama, Training(1, 8, 64)),
        (qwen, Training(1, 8, 64, targets=ATTENTION, experts_quantized=True)),
    ):
        whole, third = (estimate(model, replace(of, processes=3, shares=shares)) for shares in (1, 3))
        packed = whole.parts["weights in 4 bit"]
        assert third.parts["weights in 4 bit"] == -(-packed // 3)
        assert third.parts["weights in 16 bit"] == whole.parts["weights in 16 bit"]  # embeddings, head, norms
        assert third.parts["gathered"] == 3 * -(-packed // model.layers) and not whole.parts["gathered"]
        assert "a share of 3" in third.reasons["weights in 4 bit"]
    unpacked = estimate(qwen, Training(1, 8, 64, targets=ATTENTION, processes=2, shares=2))
    assert unpacked.parts["weights in 16 bit"] == 2 * qwen.kept + qwen.experts


def test_without_checkpointing_every_layer_keeps_its_own(llama: ModelShape) -> None:
    kept, freed = (estimate(llama, Training(4, 2048, 64, checkpointing=c)).parts["activations"] for c in (False, True))
    assert kept > 8 * freed


def test_eager_attention_takes_the_square_of_the_length(llama: ModelShape) -> None:
    def activations(batch: int, length: int, attention: str) -> int:
        return estimate(llama, Training(batch, length, 64, attention=attention)).parts["activations"]

    assert activations(1, 4096, "sdpa") == activations(2, 2048, "sdpa")
    of_scores = activations(1, 4096, "eager") - activations(2, 2048, "eager")
    assert of_scores == 12 * 32 * (4096**2 - 2 * 2048**2)


def test_packs_take_the_mask_that_keeps_their_rows_apart_and_repeated_keys(llama: ModelShape) -> None:
    def activations(batch: int, length: int, attention: str, packed: bool) -> int:
        training = Training(batch, length, 64, attention=attention, packed=packed)
        return estimate(llama, training).parts["activations"]

    for attention, more in (("sdpa", 3 * 2048 + 4 * (4096 - 1024)), ("flash_attention_2", 0), ("eager", 0)):
        assert activations(2, 2048, attention, True) - activations(2, 2048, attention, False) == 2 * 2048 * more


def test_a_targeted_module_is_matched_by_its_name_and_not_by_its_ending(llama: ModelShape) -> None:
    one = estimate(llama, Training(1, 8, 64, targets=("q_proj",)))
    assert one.trained == 32 * 64 * 2 * 4096
    assert estimate(llama, Training(1, 8, 64, targets=("proj",))).trained == 0


def test_a_head_tied_to_the_embeddings_is_counted_once(tmp_path: Path) -> None:
    config, tensors = llama_8b(1)
    apart = read_shape(folder_of(tmp_path / "a", config, tensors))
    tied = read_shape(folder_of(tmp_path / "b", config | {"tie_word_embeddings": True}, tensors))
    assert apart.parameters - tied.parameters == 128256 * 4096


def test_a_models_own_language_part_counts_where_it_also_sees(tmp_path: Path) -> None:
    config, tensors = llama_8b(1)
    assert read_shape(folder_of(tmp_path, {"text_config": config}, tensors)).hidden == 4096


def test_a_recipe_gives_what_decides_the_memory() -> None:
    def of(*sets: str) -> Training:
        config = resolve(read("train-llama"), None, sets).config
        assert isinstance(config, FinetuneConfig)
        return training_of(config)

    ours = Training(5, 64, 64, merged=True, attention="auto", experts_quantized=True, fused=True, kept=True, head=True)
    assert of() == ours
    assert not of("speed.liger=false").fused and not of("speed.head=false").head
    assert not of("speed.keep_products=false").kept and not of("speed.nf4_linear=false").kept
    assert of("data.dataset=chats.jsonl", "data.max_length=512").length == 512
    assert of("data.packing=true") == replace(of(), length=1024, packed=True)
    assert of("lora.target_modules=['q_proj']", "export.merge=false").targets == ("q_proj",)
    assert not of("quantization.kind=none").quantized
    assert not of("quantization.experts=none").experts_quantized
    assert not of("export.reload=quantized").merged


HEADER = json.dumps({"a.weight": {"dtype": "BF16", "shape": [4, 4]}}).encode()


@pytest.mark.parametrize(
    ("config", "weights", "says"),
    [
        ("{", HEADER, "not readable JSON"),
        ("[]", HEADER, "not a JSON object"),
        ("[" * 100_000, HEADER, "not readable JSON"),
        (" " * (5 << 20), HEADER, "larger than 4 MiB"),
        ({"hidden_size": 0}, HEADER, "hidden_size"),
        ({"hidden_size": 1 << 70}, HEADER, "hidden_size"),
        ({"num_hidden_layers": 1e300}, HEADER, "num_hidden_layers"),
        ({"hidden_size": None}, HEADER, "hidden_size"),
        ({}, b"", "not a safetensors file"),
        ({}, b"\xff" * 8, "not a safetensors file"),
        ({}, b"{}", "there is no linear layer"),
        ({}, b'{"a": 1}', "no plausible tensor: a"),
        ({}, b'{"a": {"shape": [-1, 4]}}', "no plausible tensor"),
        ({}, b'{"a": {"shape": [true, 4]}}', "no plausible tensor"),
        ({}, b'{"a": {"shape": [1e9, 4]}}', "no plausible tensor"),
        ({}, b'{"a": {"shape": [1125899906842624, 1125899906842624]}}', "no plausible tensor"),
        ({}, b'{"\\u001b[31m": {"shape": "4"}}', "no plausible tensor: \N{REPLACEMENT CHARACTER}[31m"),
        ({"quantization_config": {"quant_method": "gptq"}}, HEADER, "stored quantised"),
    ],
)
def test_a_folder_that_lies_is_refused_with_the_file(
    tmp_path: Path, config: str | dict[str, Any], weights: bytes, says: str
) -> None:
    if isinstance(config, dict):
        config = json.dumps({"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1} | config)
    (tmp_path / "config.json").write_text(config)
    length = b"" if weights in (b"", b"\xff" * 8) else len(weights).to_bytes(8, "little")
    (tmp_path / "model.safetensors").write_bytes(length + weights)
    with pytest.raises(UsageError) as caught:
        read_shape(tmp_path)
    assert says in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_estimate_is_a_table_or_json_and_starts_nothing(cli: Cli, tmp_path: Path, home: Path) -> None:
    model = folder_of(tmp_path / "Llama", *llama_8b())
    words = ("run", "train-llama", "--model", model, "--estimate")
    table = cli(*words)
    assert table.code == 0 and "167,772,160 parameters of 2 bytes" in table.out and "adamw_8bit" in table.out
    told = cli(*words, "--json").json
    assert told["tensors"] == sum(told["parts"].values()) < told["total"] < 8 * GIB
    assert told["merged"] == 2 * 8_030_261_248
    shared = cli(*words, "--set", "train.parallel=sharded", "--set", "train.processes=2").out
    assert "on each of 2 cards" in shared and "3 of 32 layers: one computes" in shared and "a share of 2" in shared
    unsaid = cli(*words, "--set", "train.parallel=sharded")
    assert unsaid.code == 2 and "among how many?" in unsaid.error and "train.processes=2" in unsaid.error
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("bench-moe",), "fine-tunes alone"),
        (("train-llama", "--preset", "demo"), "give a folder: --model PATH"),
        (("train-llama", "--model", "/nowhere"), "no model folder /nowhere"),
    ],
)
def test_what_cannot_be_estimated_says_so(cli: Cli, words: tuple[str, ...], says: str) -> None:
    told = cli("run", *words, "--estimate")
    assert told.code == 2 and says in told.error
