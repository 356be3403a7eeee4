"""Which models are trained: those whose architecture has been seen to train, by a test. Needs no torch.

`tests/work/test_architectures.py` takes a step with a small model of each, through the same loading, adapter, training
and merge as a run; a name stands here because that test holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from radeon_stack.contracts.options import AUTO
from radeon_stack.errors import UsageError
from radeon_stack.text import one_line

# architecture, as config.json names it → the models that have it
KNOWN = {
    "LlamaForCausalLM": "Llama 2 and 3, SmolLM 1 and 2",
    "MistralForCausalLM": "Mistral",
    "MixtralForCausalLM": "Mixtral",
    "Qwen2ForCausalLM": "Qwen 2 and 2.5",
    "Qwen2MoeForCausalLM": "Qwen 2 MoE",
    "Qwen3ForCausalLM": "Qwen 3",
    "Qwen3MoeForCausalLM": "Qwen 3 MoE",
    "Gemma2ForCausalLM": "Gemma 2",
    "Gemma3ForCausalLM": "Gemma 3 (text)",
    "Phi3ForCausalLM": "Phi 3 and 4",
    "GptOssForCausalLM": "gpt-oss, from 16-bit weights",
}
# transformers has no scaled-dot-product attention for them: they cap the scores, or have a sink beside them.
EAGER = {"Gemma2ForCausalLM", "GptOssForCausalLM"}
# Its masks are made without positions (transformers 5.23), so rows of a pack would attend to each other.
NOT_PACKED = {"GptOssForCausalLM"}
MAX_CONFIG_BYTES = 4 << 20  # they have some KiB


def require_known(folder: Path, *, anyway: bool = False) -> None:
    """UsageError for a model folder whose architecture is not among the known ones, unless `anyway`."""
    found = architectures_of(folder)
    unknown = [name for name in found if name not in KNOWN]
    if (found and not unknown) or anyway:
        return
    told = (
        f"the architecture {one_line(unknown[0], 60)} is not known" if unknown else "config.json names no architecture"
    )
    raise UsageError(
        f"{told}; known: {', '.join(f'{name} ({models})' for name, models in KNOWN.items())}",
        where="config.model",
        remedy="it may train all the same: --set any_architecture=true",
    )


def require_packable(folder: Path, max_length: int) -> None:
    """UsageError for a model that is not known to keep the rows of a pack of `max_length` tokens apart.

    `tests/work/test_packing.py` compares packed rows with each row alone, for all that are let through here.
    """
    remedy = "--set data.packing=false; data.group_by_length=true leaves less padding too"
    for name in architectures_of(folder):
        if name not in KNOWN or name in NOT_PACKED:
            raise UsageError(
                f"{one_line(name, 60)} is not known to keep the rows of a pack apart",
                where="config.data.packing",
                remedy=remedy,
            )
    limit = _rope_limit(_config_of(folder))
    if limit and max_length > limit:
        raise UsageError(
            f"beyond {limit} tokens, the longest row of a batch decides how this model encodes the positions of all "
            f"(config.json's RoPE), and data.max_length is {max_length}",
            where="config.data.packing",
            remedy=f"--set data.max_length={limit}, or data.packing=false",
        )


def _rope_limit(config: dict[str, Any]) -> int:
    """Tokens beyond which rotary frequencies follow the longest row (transformers: `dynamic_rope_update`); 0: none."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in ("dynamic", "longrope", "su"):
        return 0
    name = "original_max_position_embeddings"
    limit = rope.get(name) or config.get(name) or config.get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else 1


def architectures_of(folder: Path) -> list[str]:
    """What a model folder's config.json calls its architectures. UsageError where it is not to be read."""
    found = _config_of(folder).get("architectures")
    names = [] if found is None else found
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError("'architectures' is no list of names", where=f"{folder.name}/config.json")
    return names


def _config_of(folder: Path) -> dict[str, Any]:
    where = f"{folder.name}/config.json"
    try:
        with (folder / "config.json").open("rb") as stream:
            data = stream.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise UsageError(f"is larger than {MAX_CONFIG_BYTES >> 20} MiB: no model's configuration", where=where)
        config: Any = json.loads(data)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=where) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"is not JSON: {one_line(str(error))}", where=where) from error
    if not isinstance(config, dict):
        raise UsageError("'architectures' is no list of names", where=where)
    return config


def attention_for(folder: Path, chosen: str) -> str:
    """The attention that a model folder is loaded with: as chosen; 'sdpa' is 'eager' where the model has none."""
    if chosen not in (AUTO, "sdpa"):
        return chosen
    return "eager" if EAGER & set(architectures_of(folder)) else "sdpa"
