"""Another backend of the fine-tune: what it cannot do is refused by its key, and it runs in an image that has it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from radeon_stack.catalog.load import Effective, read, resolve
from radeon_stack.catalog.platforms import load_platforms
from radeon_stack.errors import ImageError, MachineError, UsageError
from radeon_stack.host.known_issues import Setup
from radeon_stack.host.machine import probe
from radeon_stack.host.probes import Found
from radeon_stack.host.selection import Selection
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.images.render import description
from radeon_stack.images.spec import image_spec
from radeon_stack.launch import choose
from radeon_stack.launch.placement import placed
from radeon_stack.launch.probing import decided
from tests.stages import STAGES, build

HOME = Path("/nowhere")
NO_GPU = Selection((), "the recipe takes no GPU")


def unsloth(*sets: str, recipe: str = "train-llama", preset: str | None = None) -> Effective:
    return resolve(read(recipe), preset, ("backend=unsloth", *sets))


@pytest.mark.parametrize(
    "told",
    [
        "quantization.kind=fp8",
        "quantization.double=false",
        "quantization.experts=none",
        "quantization.keep=true",
        "lora.experts_rank=8",
        "train.parallel=layers",
        "train.processes=2",
        "train.precision=fp32",
        "model_options.attention=eager",
    ],
)
def test_what_unsloth_cannot_do_is_refused_by_its_key_before_anything_starts(told: str) -> None:
    key = told.partition("=")[0]
    with pytest.raises(UsageError, match="with backend = 'unsloth': ") as caught:
        unsloth(told)
    assert caught.value.where == f"--set {key}: config.{key}"
    assert resolve(read("train-llama"), None, (told,)).image_kind == "train"  # ours takes it


def test_a_recipe_that_needs_what_unsloth_lacks_is_refused_as_a_whole() -> None:
    with pytest.raises(UsageError, match=r"config\.quantization\.kind"):
        unsloth(recipe="train-llama-fp8")


def test_several_cards_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    cards = probe(Sysroot(build(STAGES["three-r9700"], tmp_path_factory.mktemp("three")))).gpus
    with pytest.raises(UsageError, match="trains on one GPU, and there are 3") as caught:
        placed(unsloth(), cards)
    assert "config.backend" in caught.value.where
    assert placed(unsloth(), cards[:1])[1].processes == 1


def test_it_runs_in_the_kind_of_image_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(choose, "require_engine", lambda *_: None)
    monkeypatch.setattr(choose, "find_image", lambda kind, platform: asked.append((kind, platform)))
    with pytest.raises(ImageError) as caught:
        choose.choose(unsloth(preset="demo"), NO_GPU, "docker", None, HOME)
    assert asked == [("train-unsloth", "cpu")]
    assert "make image ARCH=cpu KIND=train-unsloth" in caught.value.remedy


def test_without_an_engine_its_package_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> object:
        return None if name == "unsloth" else object()

    monkeypatch.setattr(importlib.util, "find_spec", found)
    with pytest.raises(MachineError, match="this Python lacks unsloth") as caught:
        choose.choose(unsloth(preset="demo"), NO_GPU, "local", None, HOME)
    assert "KIND=train-unsloth" in caught.value.remedy
    assert choose.choose(resolve(read("train-llama"), "demo"), NO_GPU, "local", None, HOME).engine == "local"


def test_attention_is_left_to_it() -> None:
    effective, taken = decided(unsloth(preset="demo"), Found(None, "never probed"), Setup(frozenset(), 0, "", "", {}))
    assert [(choice.name, choice.value) for choice in taken if choice.name == "attention"] == [("attention", "auto")]
    assert getattr(effective.config, "model_options").attention == "auto"  # noqa: B009 - a BaseModel to mypy


@pytest.mark.parametrize("name", [n for n in load_platforms() if n == "cpu" or n.endswith("gfx1201")])
def test_its_image_has_the_pinned_release_and_nothing_of_nvidias(name: str) -> None:
    spec = image_spec("train-unsloth", load_platforms()[name])
    packages = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", spec.requirements, re.MULTILINE))
    assert packages["unsloth"] == packages["unsloth-zoo"] == "2026.10.9"
    assert packages["transformers"] == "5.17.0" and packages["trl"] == "1.15.0"
    unwanted = ("torch", "torchvision", "triton", "xformers", "torchao", "diffusers", "mlx")
    assert not [p for p in packages if p in unwanted or p.startswith("nvidia")]
    told = description(spec, "k")
    assert told["apart"] == ["unsloth"] and "unsloth" not in told["imports"]


def test_the_usual_image_stays_without_it() -> None:
    spec = image_spec("train", load_platforms()["cpu"])
    assert "unsloth" not in spec.requirements and description(spec, "k")["apart"] == []
