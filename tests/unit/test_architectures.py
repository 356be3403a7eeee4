"""A model's config.json is looked at, and not believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.errors import UsageError
from radeon_stack.workloads.finetune.architectures import KNOWN, architectures_of, attention_for, require_known


def folder(parent: Path, config: str | bytes) -> Path:
    path = parent / "model"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_bytes(config.encode() if isinstance(config, str) else config)
    return path


@pytest.mark.parametrize("architecture", KNOWN)
def test_a_known_architecture_is_taken(tmp_path: Path, architecture: str) -> None:
    require_known(folder(tmp_path, json.dumps({"architectures": [architecture]})))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{}", "config.model: config.json names no architecture; known: LlamaForCausalLM (Llama 2 and 3"),
        ('{"architectures": []}', "names no architecture"),
        ('{"architectures": ["BertForMaskedLM"]}', "the architecture BertForMaskedLM is not known; known: Llama"),
        ('{"architectures": ["LlamaForCausalLM", "Other"]}', "the architecture Other is not known"),
        ('{"architectures": "LlamaForCausalLM"}', "model/config.json: 'architectures' is no list of names"),
        ('{"architectures": [["LlamaForCausalLM"]]}', "'architectures' is no list of names"),
        ("[]", "'architectures' is no list of names"),
        ("{", "model/config.json: is not JSON: Expecting property name"),
        (b"\xff\xfe{", "model/config.json: is not JSON"),
        ("[" * 100_000, "model/config.json: is not JSON: maximum recursion depth"),
        (" " * ((4 << 20) + 1), "is larger than 4 MiB: no model's configuration"),
        (json.dumps({"architectures": ["\x1b[2J" + "x" * 5000]}), "is not known; known"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_any_other_is_refused_saying_why(tmp_path: Path, config: str | bytes, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        require_known(folder(tmp_path, config))
    assert says in str(caught.value) and len(str(caught.value)) < 800 and "\x1b" not in str(caught.value)


def test_an_unknown_one_may_be_forced_and_a_broken_file_may_not(tmp_path: Path) -> None:
    require_known(folder(tmp_path, '{"architectures": ["Other"]}'), anyway=True)
    with pytest.raises(UsageError, match="is not JSON"):
        require_known(folder(tmp_path, "{"), anyway=True)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config.json: cannot be read: No such file"):
        architectures_of(tmp_path / "none")


@given(st.recursive(st.none() | st.integers() | st.text(max_size=9), lambda v: st.lists(v, max_size=3), max_leaves=5))
def test_any_value_is_names_or_a_usage_error(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = folder(tmp_path_factory.mktemp("m"), json.dumps({"architectures": value}))
    try:
        assert all(isinstance(name, str) for name in architectures_of(path))
    except UsageError as error:
        assert error.where == "model/config.json"


def test_attention_is_as_chosen_but_for_models_that_have_no_sdpa(tmp_path: Path) -> None:
    llama = folder(tmp_path, '{"architectures": ["LlamaForCausalLM"]}')
    assert [attention_for(llama, chosen) for chosen in ("auto", "eager", "flex_attention")] == [
        *("sdpa", "eager", "flex_attention")
    ]
    gemma = folder(tmp_path, '{"architectures": ["Gemma2ForCausalLM"]}')
    assert [attention_for(gemma, chosen) for chosen in ("auto", "sdpa", "flex_attention")] == [
        *("eager", "eager", "flex_attention")
    ]
