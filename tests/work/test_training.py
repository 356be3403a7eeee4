"""The pieces of the fine-tune on a real, tiny LLaMA: gradients, masks, statistics, merge checks."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.errors import CheckError, UsageError
from radeon_stack.runs import events as ev
from radeon_stack.workloads.job import Arguments, Job

pytestmark = pytest.mark.work


def job_in(folder: Path) -> tuple[Job, list[ev.Event]]:
    told: list[ev.Event] = []
    (folder / "artifacts").mkdir(parents=True, exist_ok=True)
    return Job(Arguments(folder, folder, "", None, False), told.append), told


def nf4(folder: Path, job: Job) -> Any:
    import torch

    from radeon_stack.contracts.finetune import Quantization
    from radeon_stack.workloads.finetune import base

    return base.load_for_training(job, folder, Quantization(), torch.bfloat16)


def adapted(model: Any, rank: int = 4) -> Any:
    import torch
    from peft import get_peft_model

    from radeon_stack.contracts.finetune import Lora, Speed
    from radeon_stack.workloads.finetune.adapter import lora_config, lora_layers

    torch.manual_seed(1)
    adapted = get_peft_model(model, lora_config(Lora(rank=rank), model, Speed()))
    for layer in lora_layers(adapted).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)  # B = 0 would hide A's gradients
    return adapted


def gradients(model: Any, tokenizer: Any) -> dict[str, Any]:
    model.train()
    model.zero_grad()
    inputs = tokenizer("What day was I born? January 1, 2058", return_tensors="pt")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}


def test_sampling_before_training_leaves_the_gradients_as_they_were(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from radeon_stack.contracts.finetune import Samples
    from radeon_stack.workloads.finetune.sampling import generate

    job, _ = job_in(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = adapted(nf4(tiny_model, job))
    before = gradients(model, tokenizer)
    generate(model, tokenizer, Samples(max_new_tokens=3), "What day was I born?", 0)
    after = gradients(model, tokenizer)
    assert before.keys() == after.keys() and len(before) == 2 * 7 * 2
    for name, gradient in before.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(after[name], gradient, msg=name)


def test_without_the_guard_bitsandbytes_drops_gradients_on_this_kind_of_cpu(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this fails, bitsandbytes has mended it, and `keep_trainable_layout` can go."""
    from bitsandbytes.functional import has_avx512bf16
    from transformers import AutoTokenizer

    from radeon_stack.contracts.finetune import Samples
    from radeon_stack.workloads.finetune import base
    from radeon_stack.workloads.finetune.sampling import generate

    if not has_avx512bf16():
        pytest.skip("this CPU lacks AVX512-BF16, on which alone bitsandbytes repacks 4-bit weights")
    job, _ = job_in(tmp_path)
    monkeypatch.setattr(base, "keep_trainable_layout", lambda model: None)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = adapted(nf4(tiny_model, job))
    right = gradients(model, tokenizer)
    generate(model, tokenizer, Samples(max_new_tokens=3), "What day was I born?", 0)
    wrong = gradients(model, tokenizer)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert (wrong[first] - right[first]).norm() > 0.1 * right[first].norm()


def test_only_the_assistants_answers_are_learnt_when_asked(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from radeon_stack.workloads.finetune.encoding import IGNORED, encode
    from radeon_stack.workloads.finetune.forms import Row

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    chat = tuple(
        {"role": role, "content": content}
        for role, content in [("user", "one?"), ("assistant", "uno"), ("user", "two?"), ("assistant", "dos")]
    )
    everything = encode(tokenizer, Row(chat), max_length=99, loss_on="all")
    answers = encode(tokenizer, Row(chat), max_length=99, loss_on="assistant")
    assert everything.labels == everything.input_ids == answers.input_ids
    learnt = tokenizer.decode([label for label in answers.labels if label != IGNORED])
    assert learnt == "uno<|im_end|>\ndos<|im_end|>\n"


def test_a_template_that_rewrites_earlier_turns_is_refused_for_masking(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    from radeon_stack.workloads.finetune.encoding import encode
    from radeon_stack.workloads.finetune.forms import Row

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    row = Row(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    with pytest.raises(UsageError, match="rewrites earlier turns"):
        encode(tokenizer, row, max_length=99, loss_on="assistant")


def test_a_chat_that_the_models_template_refuses_is_told_by_its_row(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from radeon_stack.workloads.finetune.encoding import encode_rows
    from radeon_stack.workloads.finetune.forms import Row

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    answer = {"role": "assistant", "content": "b"}
    rows = [Row(({"role": role, "content": "a"}, answer)) for role in ("user", "system")]
    with pytest.raises(UsageError, match="row 2 of the data: the model's chat template does not take it: System role"):
        encode_rows(job_in(tmp_path)[0], tokenizer, rows, max_length=99, loss_on="all")


def test_rows_that_are_cut_before_their_answer_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from radeon_stack.contracts.finetune import Data
    from radeon_stack.workloads.finetune.data import read_rows
    from radeon_stack.workloads.finetune.encoding import encode_rows

    rows = read_rows(Data(copies=2), None).rows
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(UsageError, match="no answer begins within 8 tokens"):
        encode_rows(job_in(tmp_path)[0], tokenizer, rows, max_length=8, loss_on="assistant")


def test_a_target_that_matches_no_layer_is_refused_with_those_there_are(tiny_model: Path, tmp_path: Path) -> None:
    from radeon_stack.contracts.finetune import Lora, Speed
    from radeon_stack.workloads.finetune.adapter import lora_config

    model = nf4(tiny_model, job_in(tmp_path)[0])
    with pytest.raises(UsageError, match="'gate_up' matches no layer of the model; its linear layers: down_proj, gate"):
        lora_config(Lora(target_modules=("q_proj", "gate_up")), model, Speed())


def test_the_seeds_count_of_trained_parameters_follows_from_its_shapes() -> None:
    """S3: r=64 on all linear layers of Llama-3.1-8B is 167,772,160 of 8,198,033,408."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from radeon_stack.contracts.finetune import Lora, Speed
    from radeon_stack.workloads.finetune.adapter import lora_config

    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config)
        model = get_peft_model(model, lora_config(Lora(rank=64), model, Speed()))
    assert model.get_nb_trainable_parameters() == (167_772_160, 8_198_033_408)


@pytest.mark.parametrize("kind", ["qwen3_moe", "dense"])
def test_a_packed_base_that_was_kept_is_read_back_and_made_anew_for_other_weights(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    import torch

    from radeon_stack.contracts.finetune import Quantization
    from radeon_stack.workloads.finetune import base
    from tests.work.models import folder_of

    folder = (
        folder_of(kind, tmp_path / "base") if kind != "dense" else Path(shutil.copytree(tiny_model, tmp_path / "b"))
    )
    quantization = Quantization(double=False, keep=True)
    ids = torch.arange(14).view(2, 7) * 5 % 97

    def loaded() -> tuple[Any, set[str]]:
        job, told = job_in(tmp_path)
        with torch.no_grad():
            logits = base.load_for_training(job, folder, quantization, torch.bfloat16)(input_ids=ids).logits
        return logits, {event.stage for event in told if isinstance(event, ev.Progress)}

    first, stages = loaded()
    assert "keep" in stages
    again, stages = loaded()
    assert "keep" not in stages and torch.equal(first, again)
    os.utime(folder / "model.safetensors")
    assert "keep" in loaded()[1], "the weights may be others"
    assert len(list((tmp_path / "packed").iterdir())) == 2


def origin_of(folder: Path) -> Any:
    from radeon_stack.workloads.finetune.fingerprint import Origin, fingerprint

    return Origin(fingerprint(folder), folder.name)


def merge_parts(tiny_model: Path, folder: Path) -> tuple[Job, Any, Any, Path]:
    from transformers import AutoTokenizer

    from radeon_stack.workloads.finetune.merging import save_adapter

    job, _ = job_in(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = adapted(nf4(tiny_model, job))
    return job, model, tokenizer, save_adapter(job, model, tokenizer, origin_of(tiny_model))


def merge(job: Job, tiny_model: Path, adapter: Path, tokenizer: Any) -> Path:
    from radeon_stack.workloads.finetune import merging

    return merging.merge(job, tiny_model, adapter, tokenizer)


def test_a_merge_changes_every_targeted_tensor_by_the_adapters_product_and_no_other(
    tiny_model: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    job, _, tokenizer, adapter = merge_parts(tiny_model, tmp_path)
    merged = load_file(merge(job, tiny_model, adapter, tokenizer) / "model.safetensors")
    base = load_file(tiny_model / "model.safetensors")
    lora = load_file(adapter / "adapter_model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert len(changed) == 2 * 7
    for name in changed:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = lora[f"{key}.lora_A.weight"].float(), lora[f"{key}.lora_B.weight"].float()
        expected = base[name].float() + (64 / 4) * b @ a
        assert torch.equal(merged[name], expected.to(torch.bfloat16)), "one rounding, no more"


def test_an_adapter_that_changes_nothing_is_not_called_merged(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    job, _, tokenizer, adapter = merge_parts(tiny_model, tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t * 0 if "layers.1.mlp.up_proj.lora_B" in n else t for n, t in tensors.items()}, file)
    with pytest.raises(CheckError, match=r"model.layers.1.mlp.up_proj.weight is unchanged although LoRA targeted it"):
        merge(job, tiny_model, adapter, tokenizer)
    assert sorted(path.name for path in job.artifacts.iterdir()) == ["adapter"]


def killed_after(seconds: float, work: Callable[[], object]) -> bool:
    """Do the work in a forked child and `kill -9` it after a while; was it still at work?"""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def kinds_of(base: Any) -> list[Any]:
    """A class and all that are derived from it."""
    return [base, *(kind for derived in base.__subclasses__() for kind in kinds_of(derived))]


def test_twenty_random_kills_while_saving_and_merging_leave_no_half_written_model(
    tiny_model: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    from radeon_stack.workloads.finetune.merging import save_adapter

    # A forked child must not need its parent's threads, nor take tqdm's lock between processes with it; a kind of bar
    # that was drawn before has a lock of its own.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for kind in kinds_of(tqdm):
        kind.set_lock(threading.RLock())
    job, model, tokenizer, whole_adapter = merge_parts(tiny_model, tmp_path / "whole")
    started = time.monotonic()
    whole = load_file(merge(job, tiny_model, whole_adapter, tokenizer) / "model.safetensors")
    # Saving comes first and is quick: half of the kills shall fall into it.
    spans = [0.2, 3 * (time.monotonic() - started)]
    killed = partials = finished = 0
    for trial in range(20):
        folder = tmp_path / str(trial)
        torn, _ = job_in(folder)

        def save_and_merge(torn: Job = torn) -> None:
            merge(torn, tiny_model, save_adapter(torn, model, tokenizer, origin_of(tiny_model)), tokenizer)

        killed += killed_after(random.uniform(0, spans[trial % 2]), save_and_merge)
        partials += any(path.name.endswith(".partial") for path in torn.artifacts.iterdir())
        adapter, merged = torn.artifacts / "adapter", torn.artifacts / "merged"
        if adapter.exists():
            base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
            PeftModel.from_pretrained(base, adapter)
        if merged.exists():
            finished += 1
            found = load_file(merged / "model.safetensors")
            assert found.keys() == whole.keys()
            assert all(torch.equal(found[name], whole[name]) for name in whole)
            AutoModelForCausalLM.from_pretrained(merged)
        # Whatever was left half-done, the next attempt is whole.
        assert merge(torn, tiny_model, save_adapter(torn, model, tokenizer, origin_of(tiny_model)), tokenizer).is_dir()
        assert sorted(path.name for path in torn.artifacts.iterdir()) == ["adapter", "merged"]
    torch.set_num_threads(threads)
    print(f"{killed} of 20 killed at work, {partials} left something half-written, {finished} had merged")
    assert killed >= 10


def test_a_mode_is_set_once_and_kept_by_all_modules() -> None:
    """A wrapper trains from its first day, and what it wraps may not: both are put in the mode that was asked for."""
    import torch

    from radeon_stack.workloads.finetune.batches import set_mode_once

    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    model[0].eval()
    set_mode_once(model)
    for mode in (True, True, False, True):
        assert model.train(mode) is model
        assert {module.training for module in model.modules()} == {mode}
    assert model.eval() is model and not model[0][0].training


def test_what_is_there_before_training_is_looked_through_again_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a trained model in a circle of references would keep its memory while the next one is loaded."""
    import gc

    from trl import SFTTrainer

    from radeon_stack.workloads.finetune.batches import RowsTrainer

    trainer = object.__new__(RowsTrainer)
    monkeypatch.setattr(SFTTrainer, "train", lambda self: gc.get_freeze_count())
    assert trainer.train() > 0 and gc.get_freeze_count() == 0


def test_what_was_imported_is_not_looked_through_again() -> None:
    import gc

    from radeon_stack.workloads.imports import uncollected

    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.unfreeze()


def test_bitsandbytes_comes_without_inductor_and_leaves_compiling_to_those_who_ask_for_it() -> None:
    code = (
        "import os, sys\n"
        "from radeon_stack.workloads.imports import bring_bitsandbytes\n"
        "bring_bitsandbytes()\n"
        "print('bitsandbytes' in sys.modules, 'torch._inductor.compile_fx' in sys.modules)\n"
        "print(os.environ.get('TORCHDYNAMO_DISABLE'))\n"
        "import torch\n"
        "compiled = []\n"
        "def backend(graph, _):\n"
        "    compiled.append(graph)\n"
        "    return graph.forward\n"
        "torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))\n"
        "print(len(compiled))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "None", "1"]
