"""What the recipes' layers launch, with stand-ins for tensors on a Radeon: nothing is computed, and no GPU is there.

`python -m tests.work.launched keys`: which of the launches are among the forms that images ship, by Triton's own keys.
`python -m tests.work.launched run`: a step through the whole launch path, with a driver that loads nothing.
Each prints JSON. They change torch and Triton, so for processes of their own.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from radeon_stack.kernels.experts import Adapter, gated_experts
from radeon_stack.kernels.fp8 import Fp8Weight, fp8_linear
from radeon_stack.kernels.head import score
from radeon_stack.kernels.launch import launch
from radeon_stack.kernels.linear import nf4_linear
from radeon_stack.kernels.nf4 import NF4, decode
from radeon_stack.kernels.router import router

GFX = "gfx1201"
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CARD = torch.device("cuda", 0)
# [rows, columns] of the layers that the recipes adapt: Llama-3.1-8B's, and the attention of Qwen3-30B-A3B.
LLAMA = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
QWEN = ((4096, 2048), (512, 2048), (2048, 4096))
EXPERTS, TOP_K, WIDTH, INNER = 128, 8, 2048, 768  # Qwen3-30B-A3B's
ROWS = (1, 16, 17, 33, 65, 129, 300, 512, 513, 2048, 5120)
TOKENS = (1, 5, 40, 170, 200, 400, 1024, 4096)
WORDS = {"train-qwen-moe": (151936, WIDTH)}  # [words, columns] of the heads; Llama-3.1-8B's is that of the others
FEW_TOKENS = (1, 40, 170, 400)  # of the row blocks for which adapters of experts are shipped
Step = Callable[[], object]


def main(what: str) -> None:
    stand_in()
    print(json.dumps(keys() if what == "keys" else run()))


def keys() -> dict[str, Any]:
    """How many launches there are, and those that are not shipped: kernel, recipe, shape."""
    from triton import knobs

    from radeon_stack.kernels.audit.launcher import compile_kernel, pretend
    from radeon_stack.kernels.variants import variants

    seen: set[tuple[str, str]] = set()
    pretend(GFX)

    def hook(*, fn: Any, key: Any, **_: Any) -> bool:
        seen.add((fn.name, str(key)))
        return True  # enough: it is not compiled

    knobs.runtime.jit_cache_hook = hook
    for variant in variants(GFX):
        try:
            compile_kernel(variant, GFX)
        except AttributeError:  # there is no compiled kernel to look at
            continue
    shipped, missing = set(seen), []
    launched: set[tuple[str, str]] = set()
    for name, step in steps():
        seen.clear()
        step()
        launched |= seen
        missing += [f"{kernel} of {name}" for kernel, _ in seen - shipped]
    return {"shipped": len(shipped), "launched": len(launched), "missing": sorted(missing)}


def run() -> dict[str, Any]:
    """Of a layer's step: how often kernels were called, and which it would have compiled; then of changed ones."""
    from triton.backends.amd import driver as amd
    from triton.backends.amd.compiler import HIPBackend
    from triton.backends.compiler import GPUTarget
    from triton.runtime import build, driver

    from radeon_stack.kernels import shipped
    from radeon_stack.kernels.configs import Tile
    from radeon_stack.kernels.linear import product as layer

    called: list[str] = []
    has_hip = "TRITON_LIBHIP_PATH" in os.environ

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("this would be compiled")

    def caller(src: Any, metadata: Any) -> Callable[..., None]:
        if has_hip:
            amd.HIPLauncher(src, metadata)
        return lambda *_, **__: called.append(metadata.name)

    HIPBackend.add_stages = build._build = refuse
    shipped.use()
    utils: Any = amd.HIPUtils() if has_hip else SimpleNamespace()
    utils.load_binary = lambda *_: (1, 1, 0, 0, 1024)
    utils.unload_module = lambda *_: None
    utils.get_device_properties = lambda _: {"max_shared_mem": 65536}
    here = SimpleNamespace(
        get_current_target=lambda: GPUTarget("hip", GFX, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        launcher_cls=caller,
        utils=utils,
    )
    driver.set_active(here)

    def outcome(step: Step) -> dict[str, Any]:
        called.clear()
        try:
            step()
        except RuntimeError as error:
            return {"called": len(called), "compiles": str(error)}
        return {"called": len(called), "compiles": None}

    def forward(width: int, chosen: Tile) -> Step:
        x, weight = tensor(3, width), packed(4096, width, double=True)
        return lambda: layer(x, weight, None, None, 1.0, None, over_columns=True, tile=chosen)

    return {
        "other kernel": outcome(lambda: decode(packed(4096, 2048, double=True))),
        "step": outcome(dense(3, 4096, 2048, double=True, rank=64)),
        "again": outcome(dense(3, 4096, 2048, double=True, rank=64)),
        "other shape": outcome(dense(16, 1024, 4096, double=True, rank=64)),
        "other option": outcome(forward(2048, Tile(16, 64, 64, 8, 2))),
        "address": outcome(dense(3, 4096, 2048, double=True, rank=64, offset=1)),
        "width": outcome(forward(2056, Tile(16, 64, 64, 4, 2))),
    }


def steps() -> Iterator[tuple[str, Step]]:
    """A step of each kind of layer of each recipe, forward and back, and forward alone as where tokens are made."""
    for name in ("train-llama", "train-llama-fp8", "train-qwen-moe"):
        recipe = tomllib.loads((RECIPES / f"{name}.toml").read_text())
        config, rank = recipe["config"], recipe["config"]["lora"]["rank"]
        quantization = config["quantization"]
        shapes = QWEN if "experts" in quantization else LLAMA
        for rows, (n, k) in product(ROWS, shapes):
            told = f"{name}, {rows} rows, {n} × {k}"
            if quantization["kind"] == "fp8":
                for by_block in (False, True):
                    yield told, fp8(rows, n, k, by_block=by_block)
                continue
            for trained in (True, False):
                yield told, dense(rows, n, k, double=quantization["double"], rank=rank, trained=trained)
        for trained in (True, False):
            yield f"{name}, the head, trained {trained}", head(*WORDS.get(name, (128256, 4096)), trained=trained)
        if "experts" in quantization:
            few = recipe["presets"]["experts"]["config"]["lora"]["experts_rank"]
            for rank, tokens in (*product((config["lora"]["experts_rank"],), TOKENS), *product((few,), FEW_TOKENS)):
                for nf4, trained in product((True, False), (True, False)):
                    if trained or tokens <= FEW_TOKENS[2]:
                        told = f"{name}, {tokens} tokens, {'nf4' if nf4 else '16 bit'}, rank {rank}, trained {trained}"
                        yield told, experts(tokens, nf4=nf4, double=quantization["double"], rank=rank, trained=trained)


def dense(rows: int, n: int, k: int, *, double: bool, rank: int, trained: bool = True, offset: int = 0) -> Step:
    def step() -> None:
        a, b = tensor(rank, k, dtype=torch.float32), tensor(n, rank, dtype=torch.float32)
        x = tensor(1, rows * k + offset)[:, offset:].view(1, rows, k)
        _there_and_back(lambda: nf4_linear(x, packed(n, k, double=double), a, b, 1.0), trained)

    return step


def head(words: int, width: int, *, trained: bool) -> Step:
    def step() -> None:
        targets, index = (plain(300, dtype=torch.int64) for _ in range(2))
        _there_and_back(lambda: score(tensor(300, width), plain(words, width), targets, index).log_probs, trained)

    return step


def fp8(rows: int, n: int, k: int, *, by_block: bool) -> Step:
    def step() -> None:
        scale = tensor(*((-(-n // 128), -(-k // 128)) if by_block else (n, 1)), dtype=torch.float32).detach()
        weight = Fp8Weight(plain(n, k, dtype=torch.float8_e4m3fn), scale)
        _there_and_back(lambda: fp8_linear(tensor(1, rows, k), weight), True)

    return step


def experts(tokens: int, *, nf4: bool, double: bool, rank: int, trained: bool) -> Step:
    """A router and its experts, with adapters as PEFT lays them out."""

    def adapter(rows: int, columns: int) -> Adapter | None:
        if not rank:
            return None
        a, b = tensor(EXPERTS * rank, columns, dtype=torch.float32), tensor(rows, rank * EXPERTS, dtype=torch.float32)
        return Adapter(a.view(EXPERTS, rank, columns), b.view(rows, rank, EXPERTS).permute(2, 0, 1), 1.0)

    def step() -> None:
        shapes = (EXPERTS, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER)
        up, down = (packed(*shape, double=double) if nf4 else plain(*shape) for shape in shapes)

        def forward() -> Tensor:
            weights, index = router(tensor(tokens, EXPERTS), TOP_K)
            adapters = adapter(2 * INNER, WIDTH), adapter(WIDTH, INNER)
            return gated_experts(tensor(tokens, WIDTH), index, weights, up, down, *adapters)

        _there_and_back(forward, trained)

    return step


def _there_and_back(forward: Callable[[], Tensor], trained: bool) -> None:
    with torch.set_grad_enabled(trained):
        out = forward()
    if trained:
        out.backward(torch.empty_like(out))


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """One that has a gradient."""
    return torch.empty(shape, dtype=dtype, device=CARD, requires_grad=True)


def plain(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=CARD)


def packed(*shape: int, double: bool) -> NF4:
    """A weight as bitsandbytes packs it."""
    size, real = torch.Size(shape).numel(), torch.float32
    codes, table = plain(size // 2, 1, dtype=torch.uint8), plain(16, dtype=real)
    if not double:
        return NF4(codes, plain(size // 64, dtype=real), table, torch.Size(shape), torch.bfloat16)
    nested = plain(-(-size // 64 // 256), dtype=real), plain(256, dtype=real), plain(dtype=real)
    return NF4(codes, plain(size // 64, dtype=torch.uint8), table, torch.Size(shape), torch.bfloat16, *nested)


def stand_in() -> None:
    """Tensors of torch's meta device, which have no memory, say that they are on a Radeon, and at what address.

    An address is a multiple of 512, as torch's allocator gives them, and the place in the storage.
    """
    real = torch.Tensor.device

    def device(self: Tensor) -> torch.device:
        ours = sys._getframe(1).f_globals["__name__"].startswith(("radeon_stack.", "tests.", "__main__"))
        return CARD if ours else real.__get__(self)  # torch itself must know that they are not

    def on_meta(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments, device=None, **more: make(*arguments, **more, device="meta" if device else None)

    torch.Tensor.device = property(device)
    torch.Tensor.data_ptr = lambda self: 512 + self.storage_offset() * self.itemsize
    torch.empty, torch.zeros = on_meta(torch.empty), on_meta(torch.zeros)
    torch.cuda.current_device = lambda: 0
    torch.version.hip = "7.1"
    assert launch  # the real one: nothing of it is replaced


if __name__ == "__main__":
    main(*sys.argv[1:])
