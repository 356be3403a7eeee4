"""Our head in transformers' models, in the place of TRL's: the same loss, figures and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.helpers import DEVICE, distance

transformers = pytest.importorskip("transformers", reason="needs the packages of the extra 'work'")
peft = pytest.importorskip("peft", reason="needs the packages of the extra 'work'")
trl = pytest.importorskip("trl.trainer.utils", reason="needs the packages of the extra 'work'")

from radeon_stack.workloads.finetune.encoding import IGNORED  # noqa: E402
from radeon_stack.workloads.finetune.loss import Tally, loss_of, use_head  # noqa: E402

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 4},
    "qwen3_moe": EXPERTS,
}
OFF: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping changes its logits"),
    "granite": ({"logits_scaling": 8.0}, "logits_scaling changes its logits"),
    "phi": ({}, "the head is no plain matrix"),
    "qwen3_moe": ({**EXPERTS, "output_router_logits": True}, "a loss wants the routers' logits"),
}


def small(kind: str, *, targets: Any = "all-linear", **more: Any) -> Any:
    """A model with an adapter and TRL's head."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "head_dim": 16, "vocab_size": 61, "pad_token_id": 2}
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes, **more))
    trl.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return model.to(DEVICE)


def batch(kind: str = "padded") -> dict[str, torch.Tensor]:
    """Three rows, of which one is padded, one is learnt in part, and one not at all; or, with a position for each token
    in the mask's place, each of them two; or none is learnt.
    """
    torch.manual_seed(4)
    ids = torch.randint(3, 61, (3, 9), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[1, :4] = labels[2] = IGNORED
    if kind == "nothing":
        labels[:] = IGNORED
    if kind == "packs":
        positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3], device=DEVICE).expand(3, -1)
        return {"input_ids": ids, "position_ids": positions, "labels": labels.masked_fill(positions == 0, IGNORED)}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: Any, kind: str = "padded", count: int | None = 20) -> dict[str, Any]:
    """The loss, a tally's figures, and the adapters' gradients."""
    tally, given = Tally(), batch(kind)
    output = model(**given, fused_lm_head=True)
    tally.add(output, given)
    loss = loss_of(output, count)
    model.zero_grad()
    loss.backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    return {"loss": loss.detach(), "figures": tally.take(lambda one: one, train=True), **gradients}


@pytest.mark.parametrize("rows", ["padded", "packs", "nothing"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_figures_and_gradients_are_those_of_trls_head(kind: str, rows: str) -> None:
    model = small(kind, **FAMILIES[kind])
    wanted = step(model, rows)
    assert use_head(model.get_base_model(), torch.float32) == "on"
    found = step(model, rows)
    figures, others = found.pop("figures"), wanted.pop("figures")
    assert figures.keys() == others.keys()
    assert figures["num_tokens"] == others["num_tokens"] == [27 if rows == "packs" else 24]
    for name in ("entropy", "mean_token_accuracy"):
        assert figures[name] == pytest.approx(others[name], rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert distance(found[name], tensor) < 1e-5, name
    assert bool(found["loss"]) == (rows != "nothing")


def test_an_evaluation_has_the_same_loss_and_no_way_back() -> None:
    model = small("llama").eval()
    use_head(model.get_base_model(), torch.float32)
    trained = loss_of(model(**batch(), fused_lm_head=True), None)
    with torch.no_grad():
        evaluated = loss_of(model(**batch(), fused_lm_head=True), None)
    assert torch.equal(evaluated, trained.detach()) and not evaluated.requires_grad


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs no GPU, or two")
def test_the_head_may_be_on_another_card_than_the_batch_that_counts_its_tokens() -> None:
    with FakeTensorMode():
        output = SimpleNamespace(log_probs=torch.empty(5, device="cuda:1"))
        assert loss_of(output, torch.tensor(5, device="cuda:0")).device == torch.device("cuda:1")


@pytest.mark.parametrize("kind", OFF)
def test_a_head_of_another_kind_stays_trls_and_says_why(kind: str) -> None:
    more, why = OFF[kind]
    model = small(kind, targets=["q_proj"], **more).get_base_model()
    before = model.forward
    assert use_head(model, torch.float32) == f"off ({why})"
    assert model.forward == before


def test_a_head_that_is_trained_or_of_another_type_stays_trls() -> None:
    model = small("llama", targets=["q_proj", "lm_head"])
    assert use_head(model.get_base_model(), torch.float32) == "off (the head is no plain matrix)"
    model = small("llama").get_base_model()
    assert use_head(model, torch.bfloat16) == "off (the head is in float32)"
    model.lm_head.weight.requires_grad_()
    assert use_head(model, torch.float32) == "off (the head is trained)"


def test_asked_for_logits_and_for_words_the_model_answers_as_before() -> None:
    model, given = small("llama"), batch()
    wanted = model(**given)
    words = model.generate(given["input_ids"], max_new_tokens=4, do_sample=False)
    use_head(model.get_base_model(), torch.float32)
    found = model(**given)
    assert torch.equal(found.logits, wanted.logits) and torch.equal(found.loss, wanted.loss)
    assert torch.equal(model.generate(given["input_ids"], max_new_tokens=4, do_sample=False), words)


def test_where_the_head_has_another_type_than_what_is_computed_in_it_is_trls() -> None:
    model = small("llama")
    use_head(model.get_base_model(), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        output = model(**batch(), fused_lm_head=True)
    assert output.log_probs.shape == (3, 8)  # TRL's has a place for each token
