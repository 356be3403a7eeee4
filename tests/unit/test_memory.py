"""Out of memory: how much was missing, what to change, and by how much."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.contracts.finetune import Data, Export, FinetuneConfig, Lora, Quantization, Train
from radeon_stack.runs import events as ev
from radeon_stack.workloads.finetune.__main__ import SIZES, sizes_that_fit
from radeon_stack.workloads.finetune.memory import Shortage, advice, cpu_shortage, fitting_batch, shortage
from radeon_stack.workloads.job import ONEDNN, Arguments, Job, Sizes, _failure

GIB = 1 << 30
ALLOCATOR = "[enforce fail at alloc_cpu.cpp:129] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
# Real ones: ComfyUI#9529, ROCm/TheRock#2118, VSmTrans#3, NeuroLens#2 (shortened at their ends).
HIP = (
    "HIP out of memory. Tried to allocate 432.00 MiB. GPU 0 has a total capacity of 15.92 GiB of which 7.12 GiB is "
    "free. Of the allocated memory 8.08 GiB is allocated by PyTorch, and 321.96 MiB is reserved by PyTorch but "
    "unallocated. If reserved but unallocated memory is large try setting PYTORCH_HIP_ALLOC_CONF"
)
ALLOWED = (
    "HIP out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of 255.98 GiB of which 244.65 GiB is "
    "free. 1.05 GiB allowed; Of the allocated memory 1017.01 MiB is allocated by PyTorch, with 17.00 MiB allocated in "
    "private pools (e.g., HIP Graphs), and 54.99 MiB is reserved by PyTorch but unallocated. If reserved"
)
PROCESS = (
    "CUDA out of memory. Tried to allocate 226.00 MiB. GPU 0 has a total capacity of 15.70 GiB of which 210.38 MiB is "
    "free. Including non-PyTorch memory, this process has 15.48 GiB memory in use. Of the allocated memory 14.81 GiB "
    "is allocated by PyTorch, and 336.73 MiB is reserved by PyTorch but unallocated. If reserved"
)
OLDER = (
    "CUDA out of memory. Tried to allocate 55.57 GiB. GPU 0 has a total capacty of 12.00 GiB of which 9.02 GiB is "
    "free. Of the allocated memory 984.52 MiB is allocated by PyTorch, and 463.48 MiB is reserved by PyTorch but"
)


def config(batch: int = 5, accumulation: int = 2, **more: object) -> FinetuneConfig:
    train = {"batch_size": batch, "gradient_accumulation": accumulation, **more}
    return FinetuneConfig(model="m", train=Train.model_validate(train))


def lacking(allocated: float, asked: float, total: float = 29.86) -> Shortage:
    """A card that is full of what torch allocated."""
    return Shortage(round(asked * GIB), round(allocated * GIB), round(total * GIB), round(total * GIB))


@pytest.mark.parametrize(
    ("message", "short_mib", "total_gib"),
    [(HIP, 432 - 7.12 * 1024 - 321.96, 15.92), (ALLOWED, 2 + 1017.01 - 1.05 * 1024, 1.05), (OLDER, 47155, 12.0)],
    ids=["hip", "a fraction allowed", "torch 2.1"],
)
def test_torchs_figures_are_read_from_its_message(message: str, short_mib: float, total_gib: float) -> None:
    found = shortage(message)
    assert found is not None
    assert found.short / 2**20 == pytest.approx(short_mib, rel=0.02)
    assert found.total == round(total_gib * GIB)


def test_what_other_processes_hold_is_not_reachable() -> None:
    found = shortage(PROCESS)
    assert found is not None
    assert found.reachable == pytest.approx((14.81 + (210.38 + 336.73) / 1024) * GIB, rel=1e-6)


@given(
    st.text(max_size=200)
    | st.sampled_from([HIP, ALLOWED, PROCESS, OLDER]).flatmap(
        lambda text: st.integers(0, len(text)).map(lambda end: text[:end])
    )
)
def test_a_message_of_any_kind_is_figures_or_none(message: str) -> None:
    found = shortage(message)
    assert found is None or (found.asked >= 0 and found.reachable <= found.total * 1.01)
    assert cpu_shortage(message, most=1, reachable=1).asked == 0


def test_a_smaller_batch_keeps_the_global_one_and_says_how_much_was_missing() -> None:
    told = advice(lacking(29.46, 4.5), config(), stage="train", held=9 * GIB)
    assert told.short == "4.1 GiB short of 29.9 GiB (29.5 GiB in use, 4.5 GiB more asked for)"
    assert told.where == "config.train.batch_size"
    assert told.remedy == (
        "batch_size 5 → 2 with gradient_accumulation 2 → 5 keeps the same global batch: "
        "--set train.batch_size=2 --set train.gradient_accumulation=5"
    )


@given(st.integers(2, 64), st.integers(1, 32), st.floats(0.0, 1.0))
def test_a_proposed_batch_is_smaller_and_divides_the_global_batch(batch: int, accumulation: int, share: float) -> None:
    found = fitting_batch(batch, accumulation, share)
    assert 1 <= found < batch and batch * accumulation % found == 0
    assert found == 1 or found <= batch * share


@given(st.floats(0.5, 80), st.floats(0.001, 80), st.integers(1, 64), st.integers(1, 16), st.floats(0, 1), st.booleans())
def test_what_is_proposed_fits_by_the_same_figures(
    allocated: float, asked: float, batch: int, accumulation: int, part: float, checkpointing: bool
) -> None:
    found = lacking(allocated, asked, total=allocated + asked / 2)
    held = max(1, round(found.allocated * part))
    settings = config(batch, accumulation, gradient_checkpointing=checkpointing)
    told = advice(found, settings, stage="train", held=held)
    assert told.short and told.remedy
    if "train.batch_size=" in told.remedy and "; and " not in told.remedy:
        smaller = int(told.remedy.split("train.batch_size=")[1].split()[0])
        needed = held + (found.allocated + found.asked - held) * smaller / batch
        assert smaller < batch and needed <= found.reachable


def test_a_batch_of_one_turns_on_checkpointing_and_then_cuts_the_rows() -> None:
    found = lacking(28, 8)
    kept = advice(found, config(1, 10, gradient_checkpointing=False), stage="train", held=6 * GIB)
    assert "--set train.gradient_checkpointing=true" in kept.remedy
    cut = advice(found, config(1, 10), stage="train", held=6 * GIB)
    # 0.9 × 29.86 − 6 GiB of 30 GiB of activations: 69 % of 1,024 tokens, in whole 64s.
    assert cut.remedy == "cut the rows: max_length 1024 → 704: --set data.max_length=704"


def test_packs_are_made_shorter_in_place_of_rows() -> None:
    packing = config(1, 10).model_copy(update={"data": Data(packing=True)})
    assert advice(lacking(28, 8), packing, stage="train", held=6 * GIB).remedy.startswith("shorter packs: max_length")


def test_when_even_one_row_would_not_fit_both_are_said() -> None:
    told = advice(lacking(29, 400), config(4, 1), stage="train", held=6 * GIB)
    assert "batch_size 4 → 1 with gradient_accumulation 1 → 4" in told.remedy
    assert "; and cut the rows: max_length 1024 → 192" in told.remedy


def test_memory_in_pieces_is_not_called_short() -> None:
    found = shortage(HIP)
    assert found is not None
    told = advice(found, config(), stage="train", held=2 * GIB)
    assert told.short.startswith("0.422 GiB asked for in one piece, which is free only in several (8.08 GiB in use")
    assert "batch_size 5 → 2" in told.remedy


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"quantization": Quantization(kind="none")}, "config.quantization.kind"),
        ({"train": Train(optimizer="adamw_torch")}, "config.train.optimizer"),
        ({}, "config.lora.rank"),
        ({"lora": Lora(rank=8)}, "config.model"),
    ],
)
def test_what_is_held_without_any_row_is_made_smaller_first(changed: dict[str, object], where: str) -> None:
    told = advice(lacking(29, 1), config().model_copy(update=changed), stage="train", held=29 * GIB)
    assert told.where == where and "29 GiB are held before any row is read" in told.remedy


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("ask before", "samples.count 5 → 2"),
        ("merge", "the adapter is saved; --set export.merge=false"),
        ("load", "a smaller model, or a card with more memory"),
        ("train", "a smaller model"),  # nothing is known to be held: no step had begun
    ],
)
def test_other_stages_have_remedies_of_their_own(stage: str, says: str) -> None:
    assert says in advice(lacking(29, 1), config(), stage=stage, held=0).remedy


def test_a_cpus_message_has_its_figures_too() -> None:
    found = cpu_shortage(f"{ALLOCATOR}{9 * GIB} bytes. Error code 12", most=2 * GIB, reachable=6 * GIB)
    assert found == Shortage(9 * GIB, 2 * GIB, 6 * GIB, 6 * GIB) and found.short == 5 * GIB


@pytest.mark.parametrize("message", ["", ONEDNN])
def test_one_that_does_not_say_how_much_it_wanted_is_told_with_what_is_in_use(message: str) -> None:
    found = cpu_shortage(message, most=3 * GIB, reachable=4 * GIB)
    told = advice(found, config(), stage="train", held=GIB)
    assert told.short == "3 GiB of 4 GiB in use, and more asked for"
    assert told.where == "config.train.batch_size" and "--set train.batch_size=" in told.remedy


@pytest.mark.parametrize(
    "error",
    [MemoryError("no"), RuntimeError("HIP error: out of memory"), RuntimeError(HIP), RuntimeError(ONEDNN)],
    ids=["python", "hip", "torch", "onednn"],
)
def test_every_way_to_want_memory_is_one_error_with_the_workloads_own_remedy(tmp_path: Path, error: Exception) -> None:
    job = Job(Arguments(tmp_path, tmp_path, "", None, False), lambda event: None, Sizes("config.x", "make x smaller"))
    job.stage = "train"
    told = _failure(error, job)
    assert isinstance(told, ev.Error)
    assert (told.where, told.remedy, told.exit_code) == ("config.x", "make x smaller", 6)
    assert told.what.startswith("out of memory while train: ")
    job.advise = lambda _: Sizes("config.y", "y 5 → 2", "3 GiB short of 4 GiB")
    told = _failure(error, job)
    assert (told.what, told.where, told.remedy) == (
        "out of memory while train: 3 GiB short of 4 GiB",
        "config.y",
        "y 5 → 2",
    )


def test_an_error_of_another_kind_is_not_taken_for_want_of_memory(tmp_path: Path) -> None:
    job = Job(Arguments(tmp_path, tmp_path, "", None, False), lambda event: None)
    assert _failure(RuntimeError("shapes differ"), job).what.startswith("RuntimeError while")


def test_the_recipes_own_values_are_proposed_as_they_would_be_read() -> None:
    told = advice(lacking(29.46, 4.5), config(8, 3), stage="train", held=9 * GIB)
    sets = {part.split("=")[0]: int(part.split("=")[1]) for part in told.remedy.split() if part.startswith("train.")}
    assert sets["train.batch_size"] * sets["train.gradient_accumulation"] == 24
    assert FinetuneConfig(model="m", data=Data(max_length=64), export=Export()).train.batch_size == 5


@pytest.mark.parametrize("gpu", [False, True])
def test_main_memory_that_is_short_beside_a_gpu_is_told_with_its_figures_where_the_message_has_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    cuda = SimpleNamespace(is_available=lambda: gpu)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    job = Job(Arguments(tmp_path, tmp_path, "", None, False), lambda event: None, SIZES)
    job.stage = "merge"
    told = sizes_that_fit(job, config(), RuntimeError(f"{ALLOCATOR}{9 * GIB} bytes. Error code 12"))
    assert told is not None and told.where == "config.export.merge"
    assert (sizes_that_fit(job, config(), RuntimeError(ONEDNN)) is None) == gpu
