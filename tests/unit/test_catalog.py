"""Recipes are read, merged and checked; every error names file, key, what was found and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.catalog.load import from_record, read, recipe_paths, resolve
from radeon_stack.catalog.merge import Layers, flatten, parse_assignment, parse_value
from radeon_stack.catalog.sizes import format_size, parse_size
from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.errors import UsageError

GOOD = """
summary = "s"
image = "train"
workload = "finetune"
[config]
model = "m"
"""


def effective(*sets: str, preset: str | None = "demo") -> Any:
    return resolve(read("train-llama"), preset, sets)


def refusal(*sets: str) -> str:
    with pytest.raises(UsageError) as caught:
        effective(*sets)
    return str(caught.value)


def test_every_recipe_and_every_preset_that_we_ship_is_valid() -> None:
    paths = list(recipe_paths())
    assert {"bench-attention", "probe", "train-llama"} <= {path.stem for path in paths}
    assert [path.stem for path in paths] == sorted(path.stem for path in paths)
    for path in paths:
        source = read(path.stem)
        for preset in (None, *source.presets):
            assert resolve(source, preset).recipe.summary


def test_the_default_of_train_llama_is_the_seeds_run() -> None:
    config: FinetuneConfig = effective(preset=None).config
    train, lora = config.train, config.lora
    assert (train.steps, train.batch_size, train.gradient_accumulation, train.learning_rate) == (100, 5, 2, 5e-5)
    assert (train.scheduler, train.warmup, train.weight_decay, train.max_grad_norm) == ("linear", 0.1, 0.01, 1.0)
    assert (train.optimizer, train.precision, train.seed, train.data_seed) == ("adamw_8bit", "bf16", 42, 3407)
    assert (lora.rank, lora.target_modules, config.data.copies, config.data.max_length) == (
        64,
        "all-linear",
        1000,
        1024,
    )


def test_a_flag_wins_over_set_which_wins_over_the_preset_which_wins_over_the_recipe() -> None:
    found = resolve(
        read("train-llama"),
        "demo",
        ["train.steps=7", "model=from-set"],
        {"--model": {"config": {"model": "from-flag"}}},
    )
    config: Any = found.config
    assert (config.model, config.train.steps, config.train.batch_size, config.lora.rank) == ("from-flag", 7, 2, 64)
    origin = found.origin
    assert origin["config.model"] == "--model"
    assert origin["config.train.steps"] == "--set train.steps"
    assert origin["config.train.batch_size"].endswith("presets.demo")
    assert origin["config.lora.rank"].endswith("train-llama.toml")


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("train.stepz=5", ["config.train.stepz", "unknown key", "did you mean 'steps'?"]),
        ("train.steps=many", ["config.train.steps", "found 'many' (string)", "allowed: an integer"]),
        ("train.steps=0", ["config.train.steps", "found 0 (integer)", "greater than or equal to 1"]),
        ("train.learning_rate=nan", ["config.train.learning_rate", "a finite number"]),
        ("train.optimizer=adamw_8bt", ["config.train.optimizer", "'adamw_8bit'", "did you mean 'adamw_8bit'?"]),
        ("lora.target_modules=5", ["config.lora.target_modules", "an array of strings or 'all-linear'"]),
        ("resources.memory=lots", ["resources.memory", "a size with its unit"]),
        ("resources.network=host", ["resources.network", "found 'host'", "'none' or 'bridge'"]),
        ("resources.ipc=host", ["resources.ipc", "found 'host'", "'private'"]),
        (
            "resources.gpus.min=3",
            ["resources.gpus", "found { min = 3, max = 0, default = 1 } (table)", "min not above max"],
        ),
        ("train.steps=[true, {a = 1}]", ["config.train.steps", "found [true, { a = 1 }] (array)"]),
        ("train=3", ["config.train", "found 3 (integer)", "allowed: a table"]),
        ("workload=bake", ["workload", "'finetune'"]),
        ("train.steps", ["--set", "is not an assignment", "write --set"]),
        ("samples.prompt=\udce9", ["--set", "'samples.prompt' is not UTF-8"]),
    ],
)
def test_a_bad_value_is_told_with_its_place_and_what_is_allowed(assignment: str, says: list[str]) -> None:
    message = refusal(assignment)
    assert message.startswith("--set")
    assert not [part for part in says if part not in message], message
    assert "\n" not in message


def test_two_mistakes_are_told_at_once() -> None:
    message = refusal("train.stepz=5", "lora.rang=1")
    assert "config.train.stepz" in message and "config.lora.rang" in message


def test_an_unknown_recipe_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"no recipe 'train-lama'; did you mean 'train-llama'\?"):
        read("train-lama")


def test_an_unknown_preset_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="no preset 'dmeo'; did you mean 'demo'"):
        effective(preset="dmeo")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("summary = ", "not valid TOML"),
        (GOOD.replace('image = "train"', ""), "image: this key is missing"),
        (GOOD + "[resources]\nmemry = '1GiB'\n", "resources.memry: unknown key; did you mean 'memory'?"),
        (GOOD.replace('model = "m"', ""), "config.model: this key is missing"),
        (GOOD + "[presets]\ndemo = 5\n", "presets: must be a table of tables"),
        ("config = 5\n" + GOOD.split("[config]")[0], "config: found 5 (integer); allowed: a table"),
        ("x" * (1 << 21), "too large"),
    ],
)
def test_a_broken_recipe_file_is_named_with_the_key(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        resolve(read(str(file)), "demo" if "presets" in text else None)
    assert str(file) in str(caught.value)
    assert says in str(caught.value)


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not valid TOML"):
        read(str(file))


def test_a_recipe_survives_being_written_down_and_read_back() -> None:
    found = effective("train.steps=7", 'lora.target_modules=["q_proj"]')
    again = from_record({"name": found.name, "preset": "demo", "recipe": found.tree()}, Path("config.json"))
    assert again.config == found.config
    assert again.tree() == found.tree()


def test_a_line_break_in_a_set_value_cannot_add_keys() -> None:
    assert parse_value('1\nother = "x"') == '1\nother = "x"'


LEAF = st.one_of(st.integers(0, 9), st.booleans(), st.sampled_from(["x", "y"]))
KEY = st.sampled_from("abc")
TREE = st.recursive(LEAF, lambda inner: st.dictionaries(KEY, inner, max_size=3), max_leaves=6).filter(
    lambda tree: isinstance(tree, dict)
)


@given(st.lists(TREE, max_size=4))
def test_after_any_merge_each_leaf_is_the_last_layers_and_its_origin_says_so(trees: list[dict[str, Any]]) -> None:
    layers = Layers()
    for number, tree in enumerate(trees):
        layers.add(tree, str(number))
    for key, value in flatten(layers.tree):
        if isinstance(value, dict):
            continue
        given_by: Any = trees[int(layers.origin[key])]
        for part in key.split("."):
            given_by = given_by[part]
        assert given_by == value


@given(TREE)
def test_merging_does_not_change_the_layers(tree: dict[str, Any]) -> None:
    import copy

    before = copy.deepcopy(tree)
    layers = Layers()
    layers.add(tree, "a")
    layers.add({"a": {"b": 1}}, "b")
    assert tree == before


@given(st.text())
def test_any_text_after_set_is_an_assignment_or_a_usage_error(text: str) -> None:
    try:
        tree = parse_assignment(text)
    except UsageError:
        return
    assert tree


@pytest.mark.parametrize(("text", "size"), [("16GiB", 16 << 30), ("512 MiB", 512 << 20), ("1.5gib", 3 << 29), (7, 7)])
def test_sizes_are_read_as_people_write_them(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["16", "16GB", "GiB", "-1GiB", None, True, "1e3GiB"])
def test_a_size_without_a_known_unit_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="16GiB"):
        parse_size(text)


@given(st.integers(0, 1 << 50))
def test_a_formatted_size_is_read_back_to_within_a_twentieth(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= size / 20
