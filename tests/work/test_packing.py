"""Rows that share a sequence are learnt as each alone: the same loss and gradients, and nothing seen of others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.errors import Exit
from radeon_stack.workloads.finetune.architectures import EAGER, KNOWN, NOT_PACKED
from radeon_stack.workloads.finetune.encoding import IGNORED, Encoded
from radeon_stack.workloads.finetune.packing import Pack, packed
from tests.conftest import Cli
from tests.work.test_architectures import small_model
from tests.work.test_training import job_in

pytestmark = pytest.mark.work
ROOM, WINDOW, WORDS = 48, 6, 128
LENGTHS = (30, 17, 14, 11, 9, 5, 2, 1)  # two packs, of 48 and 41 tokens: one is padded in their batch
# Their other layers see all.
HALF_WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
WINDOWED: dict[str, dict[str, Any]] = {
    **{kind: {"sliding_window": WINDOW} for kind in ("Mistral", "Mixtral", "Gemma2", "Gemma3", "Phi3", "GptOss")},
    **dict.fromkeys(("Qwen2", "Qwen3"), HALF_WINDOWED),
}
PACKED = sorted(KNOWN.keys() - NOT_PACKED)


@pytest.fixture
def rows() -> list[Encoded]:
    """Rows of random words, the first third of each not to be learnt; the last, of one word, teaches nothing."""
    import torch

    torch.manual_seed(5)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, WORDS - 1, (length,)).tolist()
        made.append(Encoded(ids, [IGNORED] * (length // 3) + ids[length // 3 :], ""))
    return made


def settings(**more: Any) -> Any:
    """Packing in float32, nothing quantised, with adapters on experts too where there are any."""
    from radeon_stack.contracts.finetune import Data, FinetuneConfig, Lora, Quantization, Train

    train = Train(steps=1, batch_size=2, gradient_accumulation=1, precision="fp32", gradient_checkpointing=False)
    defaults: dict[str, Any] = {
        "data": Data(packing=True, max_length=ROOM),
        "quantization": Quantization(kind="none"),
        "lora": Lora(rank=4, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")),
        "train": train,
    }
    return FinetuneConfig(model="m", **(defaults | more))


def trainer_of(
    architecture: str, tiny_model: Path, folder: Path, rows: list[Encoded], config: Any, attention: str = ""
) -> Any:
    """Our trainer on a model whose weights and adapters are random, and large enough to show what reaches a row."""
    import torch
    from transformers import AutoTokenizer

    from radeon_stack.contracts.finetune import Lora
    from radeon_stack.workloads.finetune import base, training

    folder.mkdir(parents=True, exist_ok=True)
    windowed = WINDOWED.get(architecture.removesuffix("ForCausalLM"), {})
    small_model(architecture, folder / "model", tiny_model, vocab_size=WORDS, initializer_range=0.1, **windowed)
    if architecture == "Phi3ForCausalLM":
        config = config.model_copy(update={"lora": Lora(rank=4, target_modules=("qkv_proj", "o_proj"))})
    job, _ = job_in(folder)
    model = base.load_for_training(job, folder / "model", config.quantization, torch.float32)
    if attention:
        model.config._attn_implementation = attention  # past the look for its package
    trainer = training.trainer_for(job, config, model, AutoTokenizer.from_pretrained(folder / "model"), rows)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if weight.requires_grad:
                weight.data = torch.randn_like(weight, dtype=torch.float32) * 0.1
                assert "lora" in name
    trainer.model.train()
    # Balance between a mixture's experts would be one of a batch's, not a sum over its rows.
    assert not trainer.aux_loss_enabled
    return trainer


def batches(trainer: Any) -> list[dict[str, Any]]:
    return list(trainer.get_train_dataloader())


def alone(row: Encoded) -> dict[str, Any]:
    """A row as a batch of its own, as it would be without packing."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    batch: dict[str, Any] = DataCollatorForLanguageModeling(2)([{"input_ids": row.input_ids, "labels": row.labels}])
    return batch


def loss_and_gradients(trainer: Any, given: list[dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    """Of these batches as one optimizer step's."""
    trainer.model.zero_grad()
    count = trainer._get_num_items_in_batch(given, "cpu")
    losses = [trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count) for batch in given]
    whole = sum(losses[1:], losses[0])
    whole.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return float(whole.detach()), found


def same(trainer: Any, given: list[dict[str, Any]], rows: list[Encoded]) -> None:
    import torch

    loss, gradients = loss_and_gradients(trainer, given)
    expected, each = loss_and_gradients(trainer, [alone(row) for row in rows])
    assert abs(loss - expected) < 1e-5 * expected
    assert len(gradients) >= 8 and gradients.keys() == each.keys()
    for name, gradient in gradients.items():
        assert each[name].abs().max() > 0, name
        torch.testing.assert_close(gradient, each[name], rtol=1e-4, atol=1e-5 * float(each[name].abs().max()))


@pytest.mark.parametrize("architecture", PACKED)
def test_packed_rows_have_the_loss_and_gradients_of_each_alone(
    architecture: str, tiny_model: Path, tmp_path: Path, rows: list[Encoded]
) -> None:
    trainer = trainer_of(architecture, tiny_model, tmp_path, rows, settings())
    (batch,) = batches(trainer)
    assert sorted(batch) == ["input_ids", "labels", "position_ids"] and batch["input_ids"].shape == (2, ROOM)
    assert trainer.model.config._attn_implementation == ("eager" if architecture in EAGER else "sdpa")
    same(trainer, [batch], rows)


@pytest.mark.parametrize("experts", ["nf4", "none"])
def test_so_have_they_through_experts_of_ours_and_their_adapters(
    experts: Any, tiny_model: Path, tmp_path: Path, rows: list[Encoded]
) -> None:
    from radeon_stack.contracts.finetune import Lora, Quantization

    attention = Lora(rank=4, experts_rank=2, target_modules=("q_proj", "o_proj"))
    kind = {"none": "none", "nf4": "nf4"}[experts]
    config = settings(quantization=Quantization(kind=kind, experts=experts), lora=attention)  # type: ignore[arg-type]
    trainer = trainer_of("Qwen3MoeForCausalLM", tiny_model, tmp_path, rows, config)
    assert sum("experts" in name for name, p in trainer.model.named_parameters() if p.requires_grad) >= 4
    same(trainer, batches(trainer), rows)


def test_so_have_they_with_activations_made_again(tiny_model: Path, tmp_path: Path, rows: list[Encoded]) -> None:
    config = settings()
    config = config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": True})})
    trainer = trainer_of("MistralForCausalLM", tiny_model, tmp_path, rows, config)
    same(trainer, batches(trainer), rows)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """A stand-in for the package's two functions, by transformers' own door; the borders that it was given."""
    import torch
    from transformers import modeling_flash_attention_utils as door

    told: list[list[int]] = []

    def dense(q: Any, k: Any, v: Any, causal: bool = False, window_size: Any = (-1, -1), **_: Any) -> Any:
        """(rows, tokens, heads, width) as flash_attn has it."""
        assert causal
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        apart = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        seen = (apart >= 0) & ((apart <= window_size[0]) if window_size[0] >= 0 else torch.tensor(True))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out.transpose(1, 2)

    def varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **how: Any) -> Any:
        """(tokens, heads, width), each sequence by itself."""
        borders = cu_seqlens_q.tolist()
        told.append(borders)
        parts = [slice(*ends) for ends in pairwise(borders)]
        return torch.cat([dense(q[None, part], k[None, part], v[None, part], **how)[0] for part in parts])

    def process(query_length: int, is_causal: bool, sliding_window: Any = None, **how: Any) -> dict[str, Any]:
        window = sliding_window - 1 if sliding_window else -1
        sizes: dict[str, Any] = {key: how[key] for key in ("max_seqlen_q", "max_seqlen_k") if key in how}
        return {"causal": is_causal, "window_size": (window, window), **sizes}

    functions = ((dense, varlen, None, None, None), (process, dict))
    monkeypatch.setattr(door, "lazy_import_flash_attention", lambda *_, **__: functions)
    return told


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen3MoeForCausalLM"])
def test_so_have_they_by_flash_attention_to_which_a_batch_is_one_sequence(
    architecture: str, tiny_model: Path, tmp_path: Path, rows: list[Encoded], flash_attn: list[list[int]]
) -> None:
    """The kernel's own part, what it does between two borders, is a stand-in's: the package needs a GPU."""
    trainer = trainer_of(architecture, tiny_model, tmp_path, rows, settings(), "flash_attention_2")
    (batch,) = batches(trainer)
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    same(trainer, [batch], rows)
    borders = flash_attn[0]
    found = [after - before for before, after in pairwise(borders)]
    assert sorted(found, reverse=True) == list(LENGTHS)


def logits(trainer: Any, one: Pack, words: list[int], **how: Any) -> Any:
    import torch

    with torch.no_grad():
        told = trainer.model(input_ids=torch.tensor([words]), **({"use_cache": False} | how))
    assert told.logits.shape[1] == len(one.input_ids)
    return told.logits[0]


def spans(one: Pack) -> Iterator[slice]:
    begin = 0
    for length in one.lengths:
        yield slice(begin, begin + length)
        begin += length


def leaks(trainer: Any, one: Pack, **how: Any) -> float:
    """The most that other words in the pack's first row change in its other rows' logits."""
    first, *others = spans(one)
    changed = [word + 1 for word in one.input_ids[first]] + one.input_ids[first.stop :]
    before, after = (logits(trainer, one, words, **how) for words in (one.input_ids, changed))
    assert (before[first] - after[first]).abs().max() > 0.1
    return float(max((before[span] - after[span]).abs().max() for span in others))


def positions(one: Pack) -> Any:
    import torch

    return torch.cat([torch.arange(length) for length in one.lengths])[None]


@pytest.mark.parametrize("architecture", PACKED)
def test_a_row_sees_nothing_of_its_neighbours_as_it_would_by_a_plain_causal_mask(
    architecture: str, tiny_model: Path, tmp_path: Path, rows: list[Encoded]
) -> None:
    import torch

    trainer = trainer_of(architecture, tiny_model, tmp_path, rows, settings())
    one = packed(rows[3:], ROOM)[0]  # rows within the sliding windows' reach of each other
    given = positions(one)
    assert leaks(trainer, one, position_ids=given) < 1e-5
    assert leaks(trainer, one) > 1e-2
    # What TRL pads with (a mask of ones), and what generation keeps (a cache), undo it: neither may be passed on.
    assert leaks(trainer, one, position_ids=given, attention_mask=torch.ones_like(given)) > 1e-2
    assert leaks(trainer, one, position_ids=given, use_cache=True) > 1e-2


@pytest.mark.parametrize("architecture", sorted(NOT_PACKED))
def test_transformers_still_mixes_the_rows_of_those_that_are_refused(
    architecture: str, tiny_model: Path, tmp_path: Path, rows: list[Encoded]
) -> None:
    """When this fails, transformers has mended it, and the name can go from `NOT_PACKED`."""
    trainer = trainer_of(architecture, tiny_model, tmp_path, rows, settings())
    one = packed(rows[3:], ROOM)[0]
    assert leaks(trainer, one, position_ids=positions(one)) > 1e-2


def test_rows_by_length_are_in_an_order_of_their_own_each_epoch_and_found_again() -> None:
    import torch

    from radeon_stack.workloads.finetune.batches import ByLength
    from radeon_stack.workloads.finetune.packing import padding_at_random, padding_in_order

    lengths = [7 * row % 61 + 1 for row in range(400)]
    one, other = ByLength(lengths, 4, 3407), ByLength(lengths, 4, 3407)
    first = list(one)
    torch.manual_seed(99)  # of no consequence
    assert list(other) == first == list(one) and sorted(first) == list(range(400))
    one.set_epoch(1)
    assert list(one) != first and sorted(one) == sorted(first)
    assert list(ByLength(lengths, 4, 3408)) == list(one)
    assert padding_in_order([lengths[row] for row in first], 4) < 0.2 * padding_at_random(lengths, 4)


@pytest.mark.parametrize("how", ["packing", "group_by_length"])
def test_resumed_in_a_later_epoch_a_run_has_the_losses_of_an_uninterrupted_one(
    how: str, tiny_model: Path, tmp_path: Path, rows: list[Encoded]
) -> None:
    from radeon_stack.contracts.finetune import Data
    from radeon_stack.workloads.finetune import training
    from radeon_stack.workloads.finetune.checkpoints import last_checkpoint

    config = settings(data=Data(max_length=ROOM, **{how: True}))  # type: ignore[arg-type]
    config = config.model_copy(
        update={
            "train": config.train.model_copy(
                update={"steps": 12, "learning_rate": 1e-2, "scheduler": "constant", "warmup": 0, "checkpoint_every": 3}
            )
        }
    )
    data = [row for row in rows if len(row.input_ids) > 4] * 2
    losses: list[list[float]] = []
    for stop in (None, 9):
        trainer = trainer_of("LlamaForCausalLM", tiny_model, tmp_path / str(stop), data, config)
        job, _ = job_in(tmp_path / str(stop))
        trainer.args.max_steps = stop or 12
        training.train(job, trainer, None)
        if stop:
            at = last_checkpoint(job.artifacts)
            assert at and at.step == 9
            trainer = trainer_of("LlamaForCausalLM", tiny_model, tmp_path / str(stop), data, config)
            training.train(job, trainer, at)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(trainer.get_train_dataloader()) < 9 and len(losses[0]) == 12
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len({f"{loss:.6g}" for loss in losses[0]}) == 12


LOCAL = ("--engine", "local")


@pytest.mark.parametrize(
    ("row", "more"),
    [
        ({"prompt": "What follows {0}?", "completion": "{1}"}, ("data.loss_on=assistant", "data.eval_share=0.2")),
        ({"text": "The number {0} is followed by {1}."}, ("data.loss_on=all",)),
    ],
    ids=["answers alone, some held back", "plain text"],
)
def test_a_run_in_packs_says_so_beforehand_and_in_its_report(
    cli: Cli, tiny_run: tuple[str, ...], tmp_path: Path, row: dict[str, str], more: tuple[str, ...]
) -> None:
    lines = [json.dumps({key: text.format(n, n + 1) * (1 + n % 9) for key, text in row.items()}) for n in range(90)]
    (tmp_path / "numbers.jsonl").write_text("\n".join(lines))
    sets = ("data.packing=true", "data.max_length=384", "train.steps=4", "train.eval_every=2", "export.merge=false")
    words = [word for one in (*sets, *more) for word in ("--set", one)]
    result = cli(*tiny_run, *LOCAL, "--data", "numbers.jsonl", *words, cwd=tmp_path)
    assert result.code == Exit.OK, result.err
    told, batches = result.json, result.json["facts"]["batches"]
    assert batches["rows"] == told["facts"]["data"]["rows"] > 3 * batches["packs"]
    assert 0 <= batches["padding"] < batches["padding_unpacked"] < 1
    line = next(n for n, line in enumerate(result.err.splitlines()) if line.startswith("batches "))
    assert f"in {batches['packs']} packs" in result.err.splitlines()[line]
    assert line < next(n for n, line in enumerate(result.err.splitlines()) if line.startswith("step 1/"))
    assert "padding unpacked" in Path(told["report"]).read_text()
    steps = [metric for metric in told["metrics"] if "loss" in metric]
    assert len(steps) == 4 and not any("num_tokens" in step for step in steps)
    assert ("eval_loss" in told["result"]) == ("data.eval_share=0.2" in more)


def test_a_model_that_would_mix_them_is_refused_before_torch(
    cli: Cli, tiny_run: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "other")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("LlamaForCausalLM", "GptOssForCausalLM"))
    result = cli(*tiny_run, *LOCAL, "--model", folder, "--set", "data.packing=true")
    assert result.code == Exit.USAGE and "environment" not in result.json["facts"]
    assert "config.data.packing: GptOssForCausalLM is not known to keep the rows of a pack apart" in result.error
    assert "--set data.packing=false" in result.error


def test_the_hooks_that_spread_layers_over_devices_pass_on_what_keeps_rows_apart(
    tiny_model: Path, tmp_path: Path, rows: list[Encoded]
) -> None:
    """On one device, so only the way through them; several were not tried."""
    from accelerate import dispatch_model

    trainer = trainer_of("LlamaForCausalLM", tiny_model, tmp_path, rows, settings())
    inner = trainer.model.get_base_model()
    layers = {f"model.layers.{n}": "cpu" for n in range(2)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    dispatch_model(inner, layers | rest, force_hooks=True)
    assert all(hasattr(layer, "_hf_hook") for layer in inner.model.layers)
    same(trainer, batches(trainer), rows)


def test_a_model_first_seen_when_it_was_fetched_is_refused_then(tiny_model: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from radeon_stack.errors import UsageError
    from radeon_stack.workloads.finetune.data import read_rows
    from radeon_stack.workloads.finetune.story import finetune

    folder = small_model("GptOssForCausalLM", tmp_path / "model", tiny_model, vocab_size=WORDS)
    job, _ = job_in(tmp_path)
    job.arguments = replace(job.arguments, model=str(folder))
    config = settings()
    with pytest.raises(UsageError, match="GptOssForCausalLM is not known to keep the rows of a pack apart"):
        finetune(job, config, read_rows(config.data, None), None)
