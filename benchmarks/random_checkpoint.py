"""A checkpoint folder of random weights in a model's real shapes: for what reads its model from a disk.

    PYTHONPATH=. python benchmarks/random_checkpoint.py KIND SIZES FOLDER     # Llama '{"vocab_size": …}' /tmp/model

bf16 safetensors shards of a few GiB, drawn where a GPU is on it; linear weights N(0, 0.02), norms 1; beside them the
configuration and a tokenizer of two words, which is all that training on encoded rows asks of one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # in the place of this folder: its file names are none of a library's business
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

STD = 0.02
SHARD = 4 << 30  # bytes
INDEX = "model.safetensors.index.json"
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %} {% endif %}"


def device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def drawn(shape: Sequence[int]) -> torch.Tensor:
    """A tensor of a checkpoint, bf16, on the GPU that is here; a vector is a norm's weight."""
    made = torch.empty(tuple(shape), dtype=torch.bfloat16, device=device())
    return made.normal_(0, STD) if len(shape) > 1 else made.fill_(1)


def shapes(kind: str, sizes: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The tensors of a model's checkpoint, by the names they are published under."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.device("meta"):
        empty = getattr(transformers, f"{kind}ForCausalLM")(config)
        named = revert_weight_conversion(empty, dict(empty.state_dict()))
    return {name: tensor.shape for name, tensor in named.items()}


def shards(found: Mapping[str, torch.Size], most: int = SHARD) -> Iterator[list[str]]:
    """The names in order, in lists of at most `most` bytes in bf16."""
    names: list[str] = []
    size = 0
    for name, shape in found.items():
        if names and size + 2 * shape.numel() > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names


def tokenizer() -> Any:
    """Something to pad with."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "a", "eos_token": "b"}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1})), **special)
    made.chat_template = CHAT
    return made


def write(kind: str, sizes: Mapping[str, Any], folder: Path) -> None:
    """Write the folder; what is on the disk is all that stays."""
    import transformers
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = getattr(transformers, f"{kind}Config")(**sizes, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    config.architectures, config.dtype = [f"{kind}ForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    found = shapes(kind, sizes)
    places: dict[str, str] = {}
    for number, names in enumerate(shards(found)):
        file = f"model-{number:05d}.safetensors"
        save_file({name: drawn(found[name]).cpu() for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(2 * shape.numel() for shape in found.values())}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))
