"""Layers that are computed again: the gradients are those of transformers' own way, with a product less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.helpers import DEVICE, Adds, distance
from tests.work.counting import Counting

transformers = pytest.importorskip("transformers", reason="needs the packages of the extra 'work'")
peft = pytest.importorskip("peft", reason="needs the packages of the extra 'work'")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the packages of the extra 'work'")

from radeon_stack.kernels import adapters, experts, interface, kept, linear, link, nf4, recompute  # noqa: E402
from radeon_stack.kernels.configs import MAX_RANK  # noqa: E402
from radeon_stack.launch import estimate  # noqa: E402

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 64}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 4}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
LAYERS, RANK = 4, 4
# model_type, what its configuration needs besides sizes, and what its layers end with, if with a product
FAMILIES: dict[str, tuple[dict[str, Any], str | None]] = {
    "llama": ({}, "mlp.down_proj"),
    "qwen2": ({}, "mlp.down_proj"),
    "qwen3": ({}, "mlp.down_proj"),
    "phi3": ({"partial_rotary_factor": 0.5}, "mlp.down_proj"),
    "gemma2": (GEMMA, None),
    "gemma3_text": (GEMMA, None),
    "qwen3_moe": (EXPERTS, "mlp.experts"),
    "qwen2_moe": (SHARED, None),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, "mlp.experts"),
}


@pytest.fixture(autouse=True)
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense layers decoded by their definition and multiplied by torch: what is looked at here is who computes when."""
    monkeypatch.setattr(linear, "decode_once", lambda *_: True)
    monkeypatch.setattr(linear, "adapter_by_torch", lambda _: True)
    monkeypatch.setattr(linear, "decode", lambda matrix, dtype: nf4.decode_reference(matrix, dtype))


def small(kind: str, *, dropout: float = 0.0, **more: Any) -> Any:
    """Layers in NF4 with adapters that are not zero, ready to train with every layer computed again."""
    settings = {**SIZES, "num_hidden_layers": LAYERS, "head_dim": 16, "vocab_size": 61, "pad_token_id": 2}
    shape = transformers.AutoConfig.for_model(kind, **{**settings, **FAMILIES[kind][0], **more})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="eager")
    pack(model.model)
    model = model.to(DEVICE)
    if any(interface.is_experts(module) for module in model.modules()):
        interface.register()
        interface.pack_experts(model)
        model.set_experts_implementation(interface.PACKED)
    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout)
    model = peft.get_peft_model(model, adapters.use_nf4_linear(config))
    torch.manual_seed(4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def pack(model: nn.Module) -> None:
    """bitsandbytes' layers in the place of linear ones, a mixture's gate excepted."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not path.endswith("gate"):
            bias = module.bias is not None
            sizes = (module.in_features, module.out_features)
            packed = bitsandbytes.nn.Linear4bit(*sizes, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
            packed.load_state_dict(module.state_dict())
            packed.support_avx512bf16_for_cpu = False
            model.set_submodule(path, packed)


def step(model: Any) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of the adapters, after a step of two batches."""
    model.zero_grad()
    torch.manual_seed(5)
    for ids in torch.randint(3, 61, (2, 2, 7), device=DEVICE):
        logits = model(input_ids=ids, use_cache=False).logits
        (logits * torch.linspace(-1, 1, 61, device=DEVICE)).float().square().mean().backward()
    return {"logits": logits.detach(), **gradients_of(model)}


def products_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of a step, whether each product was a way forward."""
    own, forward = linear.BY_TORCH, []

    def counted(*arguments: Any, over_columns: bool, **known: Any) -> Any:
        forward.append(over_columns)
        return own.multiply(*arguments, over_columns=over_columns, **known)

    monkeypatch.setattr(linear, "BY_TORCH", replace(own, multiply=counted))
    step(model)
    return forward


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def spared(model: Any) -> set[str | None]:
    """By their names in a layer, the modules whose values the second pass does without."""
    found: set[str | None] = set()
    for layer in model.base_model.model.model.layers:
        for module in layer.__dict__.get(recompute.SPARES, ()):
            names = {one: name for name, one in layer.named_modules()}
            found.add(names[module].replace(".base_layer", "") if module is not None else None)
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_are_those_of_transformers_own_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "can_run_on", lambda _: False)
    wanted = step(small(kind))
    model = small(kind)
    assert recompute.use_recompute(model, adapters.can_spare)
    for _ in range(2):  # the first time it is found out what can be spared, the second it is
        found = step(model)
        assert found.keys() == wanted.keys()
        far = {name: distance(found[name], wanted[name]) for name in wanted}
        assert not {name: far for name, far in far.items() if not far < 1e-5}
    assert spared(model) == {FAMILIES[kind][1]}


def test_the_last_product_of_each_layer_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    recompute.use_recompute(model, adapters.can_spare)
    step(model)
    forward = products_of(model, monkeypatch)
    # Two batches of seven products a layer: forward, back, and again but for one.
    assert (forward.count(True), forward.count(False)) == (2 * LAYERS * (7 + 6), 2 * LAYERS * 7)


def test_the_gradients_of_what_several_products_read_are_added_up_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for alone in (False, True):
        model = small("llama")
        recompute.use_recompute(model, adapters.can_spare)
        step(model)
        if alone:
            monkeypatch.setattr(linear, "rows_of", lambda x: x.reshape(-1, x.shape[-1]))
        with Adds((2, 7, 64)) as adds:
            step(model)
        counts.append(adds.count)
    # Of two batches: keys' and values', and the upper half's of the gate.
    assert counts[1] - counts[0] == 2 * LAYERS * 3


def test_experts_leave_their_second_product_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(needed: bool) -> list[torch.Tensor]:
        torch.manual_seed(6)
        x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
        weights = torch.rand(3, 2, device=DEVICE, requires_grad=True)
        index = torch.tensor([[0, 1], [2, 0], [1, 2]], device=DEVICE)
        up, down = (nf4.quantize(torch.randn(3, *sizes, device=DEVICE)) for sizes in ((128, 64), (64, 64)))
        out = experts.gated_experts(x, index, weights, up, down, needed=needed)
        assert needed or not out.any()
        out.backward(torch.linspace(-1, 1, 64, device=DEVICE).expand(3, 64))
        assert x.grad is not None and weights.grad is not None
        return [x.grad, weights.grad]

    for found, wanted in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(found, wanted)


def test_the_first_pass_keeps_nothing_but_what_a_layer_is_given() -> None:
    model = small("llama")
    recompute.use_recompute(model, adapters.can_spare)
    step(model)
    ids = torch.randint(3, 61, (2, 7), device=DEVICE)
    kept: list[torch.Size] = []

    def keep(one: torch.Tensor) -> torch.Tensor:
        kept.append(one.shape)
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        model.base_model.model.model(input_ids=ids, use_cache=False)
    # What the last norm and the hook that makes embeddings differentiable keep is not of the layers.
    assert kept.count(torch.Size((2, 7, 64))) == LAYERS + 2 and torch.Size((2, 7, 128)) not in kept


@pytest.mark.parametrize("why", ["dropout", "attention_dropout", "output_router_logits"])
def test_what_it_would_get_wrong_is_left_to_transformers(why: str) -> None:
    if why == "dropout":
        model = small("llama", dropout=0.5)
    elif why == "attention_dropout":
        model = small("llama", attention_dropout=0.5)
    else:
        model = small("qwen3_moe", output_router_logits=True)
    assert not recompute.use_recompute(model, adapters.can_spare)


def test_layers_whose_inputs_need_no_gradient_are_left_to_torch() -> None:
    model = small("llama")
    model.base_model.model.disable_input_require_grads()
    wanted = step(model)
    recompute.use_recompute(model, adapters.can_spare)
    for _ in range(2):
        found = step(model)
        assert all(distance(found[name], wanted[name]) < 1e-5 for name in wanted)


def test_autocast_is_what_it_was_the_first_time() -> None:
    def autocast(model: Any) -> dict[str, torch.Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float16):
            ids = torch.arange(3, 17, device=DEVICE).view(2, 7)
            logits = model(input_ids=ids, use_cache=False).logits
        model.zero_grad()
        (logits.float().square().mean()).backward()
        return gradients_of(model)

    wanted = autocast(small("llama"))
    model = small("llama")
    recompute.use_recompute(model, adapters.can_spare)
    autocast(model)
    found = autocast(model)
    assert all(distance(found[name], wanted[name]) < 2e-3 for name in wanted)


class Clock:
    """Passes that took so long a layer and row; then none is over."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = list(seconds)

    def begin(self, rows: int) -> None: ...

    def end(self) -> None: ...

    def read(self) -> float | None:
        return self._seconds.pop(0) if self._seconds else None


class LowRank(TorchDispatchMode):
    """Counts products that are as narrow as an adapter."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.count += function is torch.ops.aten.mm.default and out.shape == (14, RANK)
        return out


def keeper_of(
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    *names: str,
    last: tuple[str, ...] = (),
    low: bool = False,
    graph: bool = False,
    took: tuple[float, ...] = (),
) -> kept.Keeper:
    """Whose decision is made, and for as few rows as these. last: of the last layers, if more are kept there."""
    monkeypatch.setattr(kept, "LEAST_ROWS", 1)
    monkeypatch.setattr(kept, "_Clock", lambda _: Clock(*took))
    keeper = kept.Keeper(recompute.checkpointed(model), link.Link(torch.device(DEVICE), 1 << 20), adapters.can_keep)
    keeper.decision = kept.Decision(names, last or names, low, graph)
    recompute.use_recompute(model, adapters.can_spare, keeper)
    return keeper


@pytest.mark.parametrize(("low", "graph"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", FAMILIES)
def test_with_products_kept_the_gradients_are_the_same_bits(
    kind: str, low: bool, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "can_run_on", lambda _: False)
    model = small(kind)
    recompute.use_recompute(model, adapters.can_spare)
    step(model)
    wanted = step(model)
    model = small(kind)
    modules = kept.heeding(recompute.checkpointed(model)[0], adapters.can_keep)
    names = kept.candidates(modules)
    keeper_of(model, monkeypatch, *names, low=low, graph=graph)
    for _ in range(3):
        found = step(model)
    assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == set()
    assert any(name.endswith("o_proj") for name in names)


def test_a_kept_product_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    keeper_of(model, monkeypatch, "mlp.gate_proj", "self_attn.o_proj")
    step(model)
    forward = products_of(model, monkeypatch)
    # Of the six that are computed again without it, two are kept.
    assert (forward.count(True), forward.count(False)) == (2 * LAYERS * (7 + 4), 2 * LAYERS * 7)


def test_an_adapters_own_product_is_kept_where_its_layers_is_not_and_where_nobody_reads_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = []
    for low in (False, True):
        model = small("llama")
        keeper_of(model, monkeypatch, "mlp.gate_proj", low=low)
        step(model)
        with LowRank() as counted:
            step(model)
        counts.append(counted.count)
    # Two batches of seven adapters a layer: forward, back (of d_out), and again.
    assert counts == [2 * LAYERS * 21, 2 * LAYERS * 14]


def test_adapters_products_are_gone_when_the_way_back_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    keeper = keeper_of(model, monkeypatch, low=True)
    step(model)
    loss = model(input_ids=torch.arange(3, 17, device=DEVICE).view(2, 7), use_cache=False).logits.square().mean()
    held = [left.u for one in keeper._stack for left in one.values()]
    assert [u.shape for u in held if u is not None] == LAYERS * 7 * [(14, RANK)]
    loss.backward()
    assert not keeper._stack
    assert keeper.close() == {"kept": [], "last": [], "adapters": True, "graph": False}


def test_the_estimate_knows_from_how_many_rows_on_and_up_to_which_rank() -> None:
    assert estimate.KEPT_TOKENS == kept.LEAST_ROWS and estimate.KEPT_RANK == MAX_RANK


@pytest.mark.parametrize(("room", "low"), [(4 * LAYERS * 7 * RANK * 2, True), (4 * LAYERS * 7 * RANK * 2 - 1, False)])
def test_adapters_products_stay_where_a_share_of_the_room_is_enough_for_them(
    room: int, low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small("llama")
    monkeypatch.setattr(link.Link, "bytes_per_second", lambda _: 0.0)
    monkeypatch.setattr(kept, "device_room", lambda _: room * 14)
    keeper = keeper_of(model, monkeypatch, took=(0.5, 0.011, 0.010))
    keeper.decision = None
    for _ in range(3):
        step(model)
    assert keeper.decision is not None and keeper.decision.adapters is low


def test_the_host_has_room_for_one_batch_and_takes_no_more_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    keeper = keeper_of(model, monkeypatch, "mlp.gate_proj")
    step(model)
    step(model)
    told = keeper.close()
    rows, width, float32 = 2 * 7, 128, 4
    assert told["kept"] == ["mlp.gate_proj"]
    assert told["host_bytes"] == (LAYERS - kept.STAYING) * rows * width * float32
    assert step(model)  # an evaluation after it, say


def test_the_last_layers_products_stay_where_they_are_and_may_be_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    last = ("mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.v_proj")
    keeper = keeper_of(model, monkeypatch, "self_attn.o_proj", last=last)
    step(model)
    forward = products_of(model, monkeypatch)
    again = 6 * LAYERS - kept.STAYING * len(last) - (LAYERS - kept.STAYING)
    assert forward.count(True) == 2 * (7 * LAYERS + again)
    told = keeper.close()
    assert told["last"] == list(last)
    assert told["host_bytes"] == (LAYERS - kept.STAYING) * 14 * 64 * 4


def test_the_last_layer_is_not_computed_again_where_all_of_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    keeper = keeper_of(model, monkeypatch, graph=True)
    step(model)
    forward = products_of(model, monkeypatch)
    assert (forward.count(True), forward.count(False)) == (2 * (7 * LAYERS + 6 * (LAYERS - 1)), 2 * 7 * LAYERS)
    assert not keeper._stack and keeper.close()["graph"]


@pytest.mark.parametrize("graph", [True, False])
def test_all_of_the_last_layer_stays_where_a_share_of_the_room_is_enough_for_it(
    graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small("llama")
    monkeypatch.setattr(link.Link, "bytes_per_second", lambda _: 0.0)
    keeper = keeper_of(model, monkeypatch, took=(0.5, 0.011, 0.010))
    keeper.decision = None
    step(model)
    adapters_own = LAYERS * 7 * RANK * 2
    monkeypatch.setattr(kept, "device_room", lambda _: (4 * keeper._saved + adapters_own) * 14 - (not graph))
    step(model)
    step(model)
    assert keeper.decision is not None and keeper.decision.graph is graph


def test_what_stays_takes_no_more_at_the_peak_than_the_last_but_ones_products_and_all_adapters_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def peak(*last: str, staying: int = kept.STAYING, low: bool = False, graph: bool = False) -> int:
        monkeypatch.setattr(kept, "STAYING", staying)
        model = small("llama", hidden_size=128, intermediate_size=448, head_dim=32)
        keeper_of(model, monkeypatch, last=last, low=low, graph=graph)
        ids = torch.randint(3, 61, (2, 64), device=DEVICE)
        for _ in range(2):
            model.zero_grad()
            counting = Counting([*model.parameters(), *model.buffers(), ids])
            with counting:
                model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        return counting.peak

    without, all_of_them = peak(), ("mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.v_proj")
    assert peak(*all_of_them, staying=1) == without
    assert peak(graph=True) <= without
    column = 2 * 64 * 4  # bytes in float32
    assert peak(*all_of_them) - without == (448 + 448 + 128 + 64) * column
    assert 0 < peak(low=True) - without <= LAYERS * 7 * RANK * column


@pytest.mark.parametrize(
    ("share", "last"),
    [
        (2 * (128 + 128 + 64 + 32), ("mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.v_proj")),
        (2 * (128 + 64 + 31), ("mlp.gate_proj", "self_attn.o_proj")),
        (2 * 31, ()),
    ],
)
def test_as_much_of_the_last_layers_stays_as_the_device_has_room_for_whatever_the_link_carries(
    share: int, last: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small("llama", num_hidden_layers=2)
    monkeypatch.setattr(link.Link, "bytes_per_second", lambda _: 0.0)
    adapters_own = 2 * 7 * RANK * 2 if last else 0  # two layers' own take of it, if there is room for them at all
    monkeypatch.setattr(kept, "device_room", lambda _: (4 * share + adapters_own) * 14)
    keeper = keeper_of(model, monkeypatch, took=(0.5, 0.011, 0.010))
    keeper.decision = None
    for _ in range(3):
        step(model)
    assert keeper.decision == kept.Decision((), last, bool(last), False, 0.010, 0.0, rows=14)


def test_of_more_rows_than_it_was_decided_for_nothing_is_kept_until_it_is_known_what_they_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small("llama")
    monkeypatch.setattr(link.Link, "bytes_per_second", lambda _: 1e9)
    monkeypatch.setattr(kept, "device_room", lambda _: 1 << 30)
    keeper = keeper_of(model, monkeypatch, took=(0.5, 0.011, 0.010))
    keeper.decision = None

    def keeps(rows: int) -> bool:
        with keeper.first_pass(keeper._first, torch.zeros(1, rows, 64)):
            return any(kept.KEEP in vars(module) for module in model.modules())

    for rows in (9, 12, 5, 7):
        model(input_ids=torch.full((1, rows), 5, device=DEVICE), use_cache=False).logits.sum().backward()
    assert keeper.decision is not None and keeper.decision.rows == 12
    assert keeps(12) and keeps(3) and not keeps(13)
    assert keeps(13) and keeper.decision.rows == 13


def test_what_the_host_has_no_room_for_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = step(small("llama"))
    model = small("llama")
    keeper = keeper_of(model, monkeypatch, "mlp.gate_proj")
    keeper._link.limit = 2 * 7 * 128 * 4  # one layer's
    for _ in range(2):
        found = step(model)
    assert keeper._link.taken == keeper._link.limit
    assert all(distance(found[name], wanted[name]) < 1e-5 for name in wanted)


def test_a_graph_that_is_gone_through_twice_gives_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    keeper_of(model, monkeypatch, "mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj", low=True)
    step(model)
    model.zero_grad()
    loss = model(input_ids=torch.arange(3, 17, device=DEVICE).view(2, 7), use_cache=False).logits.square().mean()
    loss.backward(retain_graph=True)
    once = gradients_of(model)
    model.zero_grad()
    loss.backward()
    again = gradients_of(model)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_as_many_are_kept_as_the_link_carries_and_fewer_when_layers_take_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small("llama")
    bytes_a_row = 2 * (128 + 128 + 64)  # what gate, up and o come to
    monkeypatch.setattr(link.Link, "bytes_per_second", lambda _: bytes_a_row / 0.010)
    monkeypatch.setattr(kept, "device_room", lambda _: float("inf"))
    without, slower = (0.5, 0.011, 0.010), (0.5, 0.5, 0.012)
    keeper = keeper_of(model, monkeypatch, took=(*without, *slower, 0.5, 0.5, 0.0107))
    keeper.decision = None
    found: list[tuple[str, ...] | None] = []
    for _ in range(6):
        step(model)
        found.append(keeper.decision.names if keeper.decision else None)
    both = ("mlp.gate_proj", "mlp.up_proj")
    # Two passes a step; the first layer's first pass of all is transformers' own.
    assert found == [None, (*both, "self_attn.o_proj"), (*both, "self_attn.o_proj"), both, both, both]


@pytest.mark.parametrize(
    ("room", "names"), [(0, ()), (63, ("o",)), (100, ("gate",)), (140, ("gate", "o")), (300, ("gate", "up", "o"))]
)
def test_the_widest_products_that_fit_are_kept(room: float, names: tuple[str, ...]) -> None:
    assert kept.fitting({"o": 40, "gate": 100, "up": 100}, room) == names
