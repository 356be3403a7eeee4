"""Steps of an export that need no llama.cpp: records, GGUF files that are damaged, tensors compared."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from radeon_stack.errors import CheckError, UsageError, WorkloadError
from radeon_stack.runs import events as ev
from radeon_stack.runs.loaded import loaded_text
from radeon_stack.workloads.bench.isolate import last_words
from radeon_stack.workloads.export import apart
from radeon_stack.workloads.export.asking import Export, asked
from radeon_stack.workloads.export.gguf_files import require_whole_gguf
from radeon_stack.workloads.export.kept import Kept, made
from radeon_stack.workloads.export.loaders import by_vllm
from radeon_stack.workloads.export.origin import origin
from radeon_stack.workloads.job import Job

pytestmark = pytest.mark.work
torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from radeon_stack.workloads.export import tensors  # noqa: E402
from tests.work.models import folder_of  # noqa: E402
from tests.work.test_merging import flip  # noqa: E402

TYPES = {"llama": "llama", "mixtral": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}


def written(folder: Path, file: Path, kind: str, quantized: str = "BF16") -> Path:
    """A GGUF file of a folder's tensors, as llama.cpp's converter lays them: experts of a layer in one tensor."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, TYPES[kind])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_string("a.text", "of some length, as tokenizers have it")
    together: dict[str, list[Any]] = {}
    for name, weight in tensors.checkpoint(folder):
        place = tensors.placed(name, TYPES[kind], config["num_hidden_layers"])
        weight = tensors.turned(weight, name, config) if TYPES[kind] in tensors.TURNED else weight
        together.setdefault(place.name, []).append((place.expert or 0, weight))
    for name, parts in together.items():
        whole = [weight for _, weight in sorted(parts, key=lambda part: part[0])]
        values = (torch.stack(whole) if ".ffn_" in name and "_exps" in name else whole[0]).float().numpy()
        kind_of = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else gguf.GGMLQuantizationType[quantized]
        writer.add_tensor(name, gguf.quants.quantize(values, kind_of), raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3", "qwen3_moe"])
def test_every_tensor_is_found_again_and_is_the_checkpoints_to_the_bit(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path / "model")
    file = written(folder, tmp_path / "model.gguf", kind)
    found = tensors.answer({"file": str(file), "folder": str(folder)})
    assert found["compared"] == len(list(tensors.checkpoint(folder))) and found["worst"] == {}


def test_of_a_quantised_file_the_worst_tensor_is_told(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model", hidden_size=64, intermediate_size=128)
    file = written(folder, tmp_path / "model.gguf", "llama", "Q8_0")
    found = tensors.answer({"file": str(file), "folder": str(folder)})
    assert 0.002 < found["worst"]["Q8_0"]["error"] < tensors.LOOSE["Q8_0"]


def test_one_weight_of_one_expert_that_differs_is_found_by_its_name(tmp_path: Path) -> None:
    folder = folder_of("qwen3_moe", tmp_path / "model")
    file = written(folder, tmp_path / "model.gguf", "qwen3_moe")
    tensor = next(t for t in require_whole_gguf(file).tensors if t.name == "blk.1.ffn_up_exps.weight")
    flip(file, int(tensor.data_offset) + tensor.n_bytes - 1)  # of the last expert
    with pytest.raises(
        CheckError, match=r"blk\.1\.ffn_up_exps\.weight is not model\.layers\.1\.mlp\.experts\.\d+\.up_proj"
    ):
        tensors.answer({"file": str(file), "folder": str(folder)})


def test_llamas_query_rows_left_as_they_were_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("llama", tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "TURNED", ())
        file = written(folder, tmp_path / "model.gguf", "llama")
    with pytest.raises(CheckError, match=r"is not model\.layers\.0\.self_attn\.[qk]_proj\.weight"):
        tensors.answer({"file": str(file), "folder": str(folder)})


def test_a_file_cut_short_anywhere_is_found_before_anything_loads_it(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    whole = written(folder, tmp_path / "model.gguf", "llama").read_bytes()
    dice = random.Random(0)
    for length in [0, 3, 4, 20, 24, len(whole) - 1, *(dice.randrange(len(whole)) for _ in range(20))]:
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckError) as found:
            require_whole_gguf(cut)
        assert found.value.where == str(cut) and "export-check" in found.value.remedy


def test_counts_that_would_be_read_for_ever_are_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "hostile.gguf"
    file.write_bytes(
        b"GGUF" + (3).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little") + (1 << 60).to_bytes(8, "little")
    )
    with pytest.raises(CheckError, match="no plausible header"):
        require_whole_gguf(file)


@pytest.mark.parametrize(
    "value",
    [
        (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little"),  # an array of bytes
        (9).to_bytes(4, "little") + (8).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little"),  # … of strings
        (8).to_bytes(4, "little") + (1 << 40).to_bytes(8, "little"),
        (9).to_bytes(4, "little") + ((9).to_bytes(4, "little") + (1).to_bytes(8, "little")) * 9,
        (77).to_bytes(4, "little"),
    ],
)
def test_so_are_lengths_that_are_longer_than_the_file(value: bytes, tmp_path: Path) -> None:
    file = tmp_path / "hostile.gguf"
    head = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") * 2
    file.write_bytes(head + (1).to_bytes(8, "little") + b"k" + value)
    with pytest.raises(CheckError, match="damaged or cut short"):
        require_whole_gguf(file)


def test_a_step_is_done_once_for_the_same_inputs_and_a_file_that_changed_since_is_found(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "artifacts" / "steps")
    file = tmp_path / "artifacts" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"x" * 1000)
    kept.put("gguf q8_0", {"merged": "abc"}, made(file, file.parent))
    assert kept.get("gguf q8_0", {"merged": "another"}) is None
    assert kept.get("gguf q8_0", {"merged": "abc"}) == made(file, file.parent)
    flip(file, 500)
    with pytest.raises(CheckError, match="has changed since it was written"):
        kept.get("gguf q8_0", {"merged": "abc"})
    file.write_bytes(b"x" * 999)
    with pytest.raises(CheckError, match="999 bytes, and 1,000 were written"):
        kept.get("gguf q8_0", {"merged": "abc"})
    file.unlink()
    assert kept.get("gguf q8_0", {"merged": "abc"}) is None, "it can never be made again"


def test_a_child_that_dies_is_told_with_its_last_words_and_one_that_knows_why_in_its_own(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "def answer(request):\n    import os\n    print('so it ends', flush=True)\n    os.abort()\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(WorkloadError, match=r"broken: SIGABRT: .*so it ends"):
            apart.called("broken", {})
    with pytest.raises(CheckError, match="no such file"):
        apart.called("radeon_stack.workloads.export.gguf_files", {"file": str(tmp_path / "nothing.gguf")})


def test_a_program_that_dies_while_it_is_asked_has_a_line_of_its_own_and_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise WorkloadError("by_vllm: SIGSEGV: in its engine")

    monkeypatch.setattr(apart, "called", dies)
    events: list[ev.Event] = []
    job = Job(cast("Any", SimpleNamespace()), events.append)
    with pytest.raises(WorkloadError, match="SIGSEGV"):
        asked(job, Kept(tmp_path), Export("vllm", tmp_path, "0" * 64, 1), {}, None)
    (told,) = [event for event in events if isinstance(event, ev.Loaded)]
    assert loaded_text(told) == "vllm: gave no answer: by_vllm: SIGSEGV: in its engine"


def test_vllm_is_asked_without_anything_being_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a compiler and Python's headers, which an image need not have."""

    def load(*_: object, **settings: object) -> None:
        assert settings["enforce_eager"] and os.environ["TORCHDYNAMO_DISABLE"] == "1"
        raise InterruptedError

    for name in ("TORCHDYNAMO_DISABLE", "OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "0")  # so that it is put back
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=load, SamplingParams=None))
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=None))
    told = {"prompt_ids": [[1]], "text_ids": [1]}
    with pytest.raises(InterruptedError):
        by_vllm.answer(
            {"model": "", "reference": told, "threads": 1, "greedy_tokens": 1, "max_new_tokens": 1, "seed": 1}
        )


def test_a_childs_last_words_are_without_what_python_draws_below_a_line() -> None:
    said = '  File "a.py", line 3, in f\n    x.gone\n    ^^^^^^\nAttributeError: no gone\n'
    assert last_words(said) == ['File "a.py", line 3, in f', "x.gone", "AttributeError: no gone"]


def test_what_a_folder_holds_is_told_by_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a run"):
        origin(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert origin(tmp_path).merged == tmp_path
    (tmp_path / "adapter_config.json").write_text("{}")
    assert origin(tmp_path).adapter == tmp_path
